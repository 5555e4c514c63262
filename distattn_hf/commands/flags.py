"""Messages of the package, which use Python names, rewritten with command-line flags."""

import logging
import re
from contextlib import contextmanager

import typer


def flag(name: str) -> str:
    """Return an option as it is written on the command line."""
    return "--spec" if name == "spec_file" else f"--{name.replace('_', '-')}"


def as_flags(text: str, options) -> str:
    """Rewrite a message of the package, which names Python arguments, with command-line flags.

    options: the names of the verb's options. `name=value`, a name at the beginning, and any name with an underscore
    become the flag; None, which cannot be typed, is removed.
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
    """An error whose message already uses flags."""


@contextmanager
def reading(option: str, *also: str):
    """Attribute errors within the context to the file or data that `option` names, without rewriting their words.

    also: other options that affect how it is read.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise Worded(f"{flag(option)}: {as_flags(str(error), also)}") from error


def describe(error: Exception, options) -> str:
    """Return an error's message with flags."""
    return str(error) if isinstance(error, Worded) else as_flags(str(error), options)


def option_names(command) -> list[str]:
    """Return the Python names of a verb's options, without its positional arguments."""
    return [parameter.name for parameter in command.params if parameter.param_type_name == "option"]


def given(context: typer.Context, names) -> list[str]:
    """Return which of a command's options `names` the command line sets, as flags."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [flag(option) for option, source in sources.items() if source and source.name == "COMMANDLINE"]


class _InFlags(logging.Formatter):
    """Formats the package's warnings with flags."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def format(self, record) -> str:
        return f"{record.levelname.lower()}: {as_flags(record.getMessage(), self.options)}"


@contextmanager
def warnings_in_flags(options):
    """Print the package's warnings with flags within the context, on standard error only."""
    logger, handler = logging.getLogger("distattn_hf"), logging.StreamHandler()
    handler.setFormatter(_InFlags(options))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
