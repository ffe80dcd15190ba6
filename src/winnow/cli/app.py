"""The command tree. Each command lives in the file of its topic and imports heavy parts only when it runs."""

from __future__ import annotations

import sys

import typer

from winnow import __version__
from winnow.cli import ask, calibrate, doctor, evaluate, info, pipeline, ranking, settings_commands, tokens
from winnow.cli.exits import FAILED
from winnow.cli.screen import stderr

EPILOG = (
    "Exit codes: 0 done · 1 failed · 2 wrong usage or refused request · 69 nothing answers · 75 not now, try again · "
    "77 not allowed · 130 stopped with Ctrl-C."
)

app = typer.Typer(
    name="winnow",
    help="Long-context inference that reads only what matters: start a pipeline, ask about long texts, rank documents.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

START, WORK, LOOK, SETUP = "Run a pipeline", "Use it", "Look at it", "Set up"

app.command(rich_help_panel=START)(pipeline.up)
app.command(rich_help_panel=START)(pipeline.down)
app.command(rich_help_panel=START)(pipeline.demo)
app.command(rich_help_panel=WORK)(ask.generate)
app.command(rich_help_panel=WORK)(ranking.rank)
app.command("rank-batch", rich_help_panel=WORK)(ranking.rank_batch)
app.command(rich_help_panel=LOOK)(info.status)
app.command(rich_help_panel=LOOK)(info.methods)
app.command(rich_help_panel=LOOK)(info.models)
app.command(rich_help_panel=LOOK)(doctor.doctor)
app.command(rich_help_panel=LOOK)(evaluate.evaluate)
app.command(rich_help_panel=LOOK)(evaluate.capture)
app.command(rich_help_panel=SETUP)(calibrate.calibrate)
app.add_typer(settings_commands.app, name="config", rich_help_panel=SETUP)
app.add_typer(tokens.app, name="token", rich_help_panel=SETUP)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"winnow {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show the whole trace of an unexpected error."),
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""
    context.obj = {"debug": debug}


def main() -> None:
    """Entry point of the console script. An error nobody foresaw is one line too, unless --debug asks for its trace."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        stderr.print(f"[bold red]error:[/] unexpected {type(error).__name__}; `winnow --debug …` shows where, please report it")
        raise SystemExit(FAILED) from None
