"""The command line: `distattn VERB`, see `distattn --help`. Each verb only calls the package."""

import sys
from typing import Annotated

import typer

from . import __version__
from .commands import (
    command_adapt,
    command_analyse,
    command_benchmark,
    command_check,
    command_compare,
    command_convert,
    command_evaluate,
    command_experiment,
    command_inspect,
    command_plan,
    command_push,
    command_revert,
    command_serve,
    command_set,
    command_train,
)
from .commands.command_convert import OF_SPEC
from .commands.flags import describe, option_names, warnings_in_flags

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"distattn_hf {__version__}")
        raise typer.Exit


@app.callback()
def _command_line(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
):
    """Distance-based attention for Hugging Face transformers."""


# In the order of --help.
for module in (
    command_plan, command_convert, command_inspect, command_set, command_evaluate, command_analyse, command_revert,
    command_push, command_serve, command_adapt, command_train, command_compare, command_benchmark, command_experiment,
    command_check,
):  # fmt: skip
    app.add_typer(module.command)


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 1."""
    verbs = typer.main.get_command(app).commands
    verb = next((verbs[word] for word in sys.argv[1:2] if word in verbs), None)
    options = option_names(verb) if verb is not None else []
    if any(word.partition("=")[0] == "--spec" for word in sys.argv):
        # The attention is then set in a file, so errors keep the names of its fields.
        options = [name for name in options if name not in OF_SPEC]
    try:
        with warnings_in_flags(options):
            app()
    except (ValueError, OSError) as error:
        print(f"error: {describe(error, options)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
