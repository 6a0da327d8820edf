"""``csq report``: without torch, in well under a second."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csqcli.cli import output
from csqcli.cli.options import JsonOption
from csqcli.errors import UserError, install


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or any file that csq wrote.")],
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write the report as one page, OUT.html, complete offline.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each figure of that page into a folder, for papers.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help=f"The same as PNG; needs `{install('png')}`.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the bits, sizes and accuracy of a model.

    Layer by layer and in all, in the terminal or as a page. Needs neither the model's code nor data.

    Example: csq report runs/resnet18 --html report.html
    """
    from csqcli.reporting.build import describe, history_beside
    from csqcli.system.run_files import model_of

    file = model_of(run)
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise UserError("the page's name must end in .html", where=str(html))
    written = []
    if html is not None:
        from csqcli.reporting.report_page import report_page
        from csqcli.system.files import write_text

        write_text(html, report_page(file))
        written.append(str(html))
    for folder, as_png in ((svg, False), (png, True)):
        if folder is not None:
            from csqcli.reporting.report_page import report_figures, write_figures

            written += map(str, write_figures(report_figures(file), folder, as_png=as_png))
    if as_json:
        output.as_json(describe(file))
        return
    if not written:
        from csqcli.reporting.recompute import recomputed
        from csqcli.reporting.terminal import print_report

        found, lines = recomputed(file), history_beside(file)
        print_report(found.manifest, output.console(), history=lines, sparsity=found.sparsity, as_stated=True)
    for name in written:
        output.line(f"wrote {name}")
