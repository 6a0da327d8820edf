"""``python -m csqcli`` and ``torchrun -m csqcli``."""

from csqcli.cli import main

if __name__ == "__main__":
    main()
