"""The root command and the boundary where errors become one line. Heavy imports live inside the commands."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from csqcli.cli import output, recipes
from csqcli.cli.allocate import allocate
from csqcli.cli.bench import bench
from csqcli.cli.compare import compare
from csqcli.cli.diff import diff
from csqcli.cli.doctor import doctor
from csqcli.cli.evaluate import evaluate
from csqcli.cli.explain import explain
from csqcli.cli.export import export
from csqcli.cli.finetune import finetune
from csqcli.cli.init import init
from csqcli.cli.inspect import inspect
from csqcli.cli.methods import methods
from csqcli.cli.plan import plan
from csqcli.cli.report import report
from csqcli.cli.reproduce import reproduce
from csqcli.cli.search import search
from csqcli.cli.sensitivity import sensitivity
from csqcli.cli.suggesting import Commands, no_such_option
from csqcli.cli.sweep import sweep, sweep_run
from csqcli.errors import UserError, as_line
from csqcli.system.heap import keep_freed_memory
from csqcli.system.interrupt import Interrupted, Signals
from csqcli.system.launcher import is_main_process
from csqcli.version import __version__

app = typer.Typer(
    name="csq",
    cls=Commands,
    help=(
        "Quantize pretrained vision checkpoints in mixed precision, within the mean bits you type; CSQ is among the methods.\n\n"
        "To begin: `csq doctor`, then `csq search --recipe digits --target-bits 2`, which takes seconds and downloads nothing."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    search,
    plan,
    sweep,
    finetune,
    methods,
    allocate,
    sensitivity,
    evaluate,
    report,
    compare,
    explain,
    diff,
    inspect,
    export,
    bench,
    reproduce,
    init,
    doctor,
):
    app.command()(command)
app.command("sweep-run", hidden=True)(sweep_run)
app.add_typer(recipes.app, name="recipes")

_BAD_INPUT, _INTERRUPTED = 2, 130  # 130 is what a shell reports for SIGINT
_GO_ON_BY_THEMSELVES = ("reproduce", "sweep", "sweep-run")
_SAVE_STATES = ("search", "finetune")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        output.line(f"csq {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    output.tolerate_any_text()
    keep_freed_memory()
    with Signals() as signals:
        code = _run(signals)
    sys.exit(code)


def _run(signals: Signals) -> int:
    """The exit code of the command."""
    click = sys.modules[typer.BadParameter.__module__]  # the exceptions of typer's click, vendored in newer releases
    try:
        result = app(prog_name="csq", standalone_mode=False)
        if result != _INTERRUPTED:  # some releases of typer turn KeyboardInterrupt into this exit code
            return result if isinstance(result, int) else 0
    except UserError as error:
        if os.environ.get("CSQ_DEBUG") == "1":
            traceback.print_exc()
        _fail(error.line())
    except getattr(click, "NoArgsIsHelpError", ()) as error:  # click 8.2 and later
        output.block(error.format_message())
        return 0
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "csq"
        if isinstance(error, click.NoSuchOption) and error.ctx:
            _fail(no_such_option(error.option_name, error.ctx).line())
        _fail(f"{error.format_message().rstrip('.')}; see `{path} --help`")
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        pass
    except Interrupted as stop:
        signals.ignore()
        if is_main_process():
            again = "" if _command() in _GO_ON_BY_THEMSELVES else " with --resume"
            output.error_line(f"csq: stopped and saved ({stop.where}); the same command{again} goes on")
        return 128 + stop.signum
    except Exception as error:
        fault = as_line(error)  # the machine's, or of code that the user brought
        if fault is None:  # csq's own mistakes keep their traceback
            raise
        if os.environ.get("CSQ_DEBUG") == "1":
            traceback.print_exc()
        _fail(fault.line())
    signals.ignore()
    output.error_line(f"csq: interrupted{_way_on(signals)}")
    return 128 + signals.signum


def _way_on(signals: Signals) -> str:
    """How to go on with what an interrupted command left behind; most leave nothing."""
    if _command() in _GO_ON_BY_THEMSELVES:
        return "; the same command goes on"
    if signals.left_state:
        return "; the same command with --resume goes on from the last saved state"
    if _command() in _SAVE_STATES and "--resume" not in sys.argv:  # there may be one that was not looked for yet
        return "; nothing was saved yet, and the same command starts over"
    return ""


def _command() -> str:
    return sys.argv[1] if len(sys.argv) > 1 else ""


def _fail(text: str) -> NoReturn:
    output.error_line(f"csq: error: {text}")
    sys.exit(_BAD_INPUT)


if __name__ == "__main__":
    main()
