"""``csq report``: without torch, in well under a second."""

from __future__ import annotations

from csqcli.cli import output
from csqcli.cli.options import FileArgument, JsonOption


def report(file: FileArgument, as_json: JsonOption = False) -> None:
    """Per-layer bits, sizes and accuracy of a file; needs neither model code nor data."""
    if as_json:
        from csqcli.reporting.build import describe

        output.as_json(describe(file))
        return
    from csqcli.reporting.recompute import recomputed
    from csqcli.reporting.terminal import print_table

    manifest, _ = recomputed(file)
    print_table(manifest, output.console(), as_stated=True)
