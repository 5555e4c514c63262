"""The words of the command line: what the package says with Python names, said with flags."""

import logging
import re
from contextlib import contextmanager

import typer


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return "--spec" if name == "spec_file" else f"--{name.replace('_', '-')}"


def as_flags(text: str, options) -> str:
    """A message of the package, which names Python arguments, in the words of the command line.

    options: the names of the verb's options. `name=value`, a name at the beginning, and any name with an underscore
    become the flag; None, which nobody can type, goes.
    """
    for name in sorted(options, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.\-'\"/]){name}=True\b", flag(name), text)
        text = re.sub(rf"(?<![\w.\-'\"/]){name}=(?=\S)", f"{flag(name)} ", text)
        text = re.sub(rf"^{name}(?=\W)(?!-)", flag(name), text)
        if "_" in name:
            text = re.sub(rf"(?<![\w.\-'\"/]){name}(?![\w./])", flag(name), text)
    text = re.sub(r"must be None(?:,| or) ", "must be ", text)
    return text.replace("call distattn_hf.revert(model) first", "run distattn revert first")


class Worded(ValueError):
    """An error whose message is in the words of the command line already."""


@contextmanager
def reading(option: str, *also: str):
    """While it is open, an error is one of what this option names, whose own words are not those of options.

    also: other options that say how to read it.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise Worded(f"{flag(option)}: {as_flags(str(error), also)}") from error


def describe(error: Exception, options) -> str:
    """What an error says, in the words of the command line."""
    return str(error) if isinstance(error, Worded) else as_flags(str(error), options)


def option_names(command) -> list[str]:
    """The names of a verb's options, as Python has them; those of arguments are on no command line."""
    return [parameter.name for parameter in command.params if parameter.param_type_name == "option"]


def given(context: typer.Context, names) -> list[str]:
    """Which of a command's options the command line has, as they are written there."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [flag(n) for n, source in sources.items() if source and source.name == "COMMANDLINE"]


class _InFlags(logging.Formatter):
    """Warnings of the package in the words of the command line."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def format(self, record) -> str:
        return f"{record.levelname.lower()}: {as_flags(record.getMessage(), self.options)}"


@contextmanager
def warnings_in_flags(options):
    """While it is open, print the package's warnings in flags, on standard error and nowhere else."""
    logger, handler = logging.getLogger("distattn_hf"), logging.StreamHandler()
    handler.setFormatter(_InFlags(options))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
