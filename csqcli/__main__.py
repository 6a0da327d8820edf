"""``python -m csqcli`` and ``torchrun -m csqcli``."""

from csqcli.cli.app import main

if __name__ == "__main__":
    main()
