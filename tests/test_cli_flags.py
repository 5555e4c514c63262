"""Whatever is wrong with an option of `convert`, the message names the option as it is written on the command line."""

import logging
import re
import sys

import pytest
import typer
from transformers import BertTokenizerFast
from transformers.utils import logging as transformers_logging

from distattn_hf.cli import app, describe, main, option_names
from tests.conversion.models import llama
from tests.conversion.test_companions import WORDS

CONVERT = typer.main.get_command(app).commands["convert"]
NYSTROM = ("--mechanism", "nystrom", "--calibration", "TEXT")
PLAIN = ("--init", "plain")
# Option -> its bad values, and what else stands on the command line.
BAD = {
    "--spec": (["nowhere.yaml", "WRONG", "EMPTY"], PLAIN),
    "--metric": (["l7", "", "nystrom", "lp"], PLAIN),
    "--mechanism": (["linear", ""], PLAIN),
    "--num-landmarks": (["0", "x", "1.5", "-1"], NYSTROM),
    "--window-size": (["-1", "x"], NYSTROM),
    "--num-sinks": (["-1", "x"], NYSTROM),
    "--exact-below": (["-1", "x"], NYSTROM),
    "--block-size": (["0", "x"], ("--mechanism", "retrieval")),
    "--num-blocks": (["-1", "x"], ("--mechanism", "retrieval")),
    "--min-weight": (["-0.1", "1", "nan", "x"], ("--mechanism", "retrieval")),
    "--max-error": (["0", "-1", "nan", "x"], NYSTROM),
    "--beyond-share": (["0", "1.5", "nan", "x"], NYSTROM),
    "--select": (["all", "", "error"], NYSTROM),
    "--beyond": (["window", ""], (*NYSTROM, "--max-error", "0.4")),
    "--init": (["random", ""], ()),
    "--calibration": (["nowhere.txt", "BLANK", "EMPTY", "no/where"], ()),
    "--column": (["nope"], ("--calibration", "TABLE")),
    "--layers": (["99", "0-", "nowhere.*", ""], PLAIN),
    "--heads": (["99", "x", "0-", ""], PLAIN),
    "--attention": (["both", "cross"], PLAIN),
    "--p": (["0.5", "nan", "x"], ("--metric", "lp", *PLAIN)),
    "--lam": (["0", "-1", "nan", "x"], PLAIN),
    "--transform": (["square", ""], PLAIN),
    "--softening": (["-1", "x", "nan", ""], ("--metric", "l2", *PLAIN)),
    "--steps": (["-1", "x"], ("--calibration", "TEXT")),
    "--seed": (["x", "-99999999999999999999", "99999999999999999999"], ("--calibration", "TEXT")),
}
# Given where they do nothing.
IDLE = [
    (option, value, ("--metric", "l2", *PLAIN))
    for option, value in (
        ("--num-landmarks", "4"), ("--window-size", "4"), ("--num-sinks", "1"), ("--exact-below", "4"),
        ("--block-size", "4"), ("--num-blocks", "4"), ("--min-weight", "0.1"),
        ("--max-error", "0.4"), ("--beyond", "exact"),
        ("--beyond-share", "0.2"), ("--select", "probe"), ("--p", "2"), ("--steps", "4"), ("--seed", "1"),
        ("--column", "words"), ("--calibration", "TEXT"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    llama().save_pretrained(folder / "teacher")
    BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder / "teacher")
    (folder / "empty").mkdir()
    for name, text in {
        "text.txt": "the cat sat on the mat " * 40, "blank.txt": " \n\n ", "table.csv": "words\nthe cat\nthe dog\n",
        "wrong.yaml": "metrik: l2\n",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    names = {"TEXT": "text.txt", "BLANK": "blank.txt", "TABLE": "table.csv", "WRONG": "wrong.yaml", "EMPTY": "empty"}
    return folder, {key: str(folder / name) for key, name in names.items()}


@pytest.fixture(autouse=True)
def _settings_kept(monkeypatch):
    """The command line changes how the process logs."""
    logger = logging.getLogger("distattn_hf")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    shown = transformers_logging.is_progress_bar_enabled()
    yield
    if shown:
        transformers_logging.enable_progress_bar()


def test_every_option_with_a_value_has_bad_ones():
    options = {p.opts[0] for p in CONVERT.params if p.param_type_name == "option" and not p.is_flag}
    assert options == set(BAD)


def message_of(places, *arguments) -> str:
    """What `convert` says is wrong, in the words of the command line."""
    folder, names = places
    words = ["convert", str(folder / "teacher"), str(folder / "out"), *(names.get(a, a) for a in arguments)]
    with pytest.raises((ValueError, OSError, typer.BadParameter)) as caught:
        app(words, standalone_mode=False)
    assert not (folder / "out").exists()
    if isinstance(caught.value, typer.BadParameter):
        return caught.value.format_message()
    return describe(caught.value, option_names(CONVERT))


def assert_names(message: str, flag: str) -> None:
    assert re.search(rf"{flag}(?![\w-])", message), message
    # No name of Python's is left, such as num_landmarks or init=; a file of specs has those of its own.
    for name in option_names(CONVERT) if flag != "--spec" else ():
        assert not re.search(rf"(?<![\w\-./'\"]){name}=", message), message
        assert "_" not in name or not re.search(rf"(?<![\w./'\"]){name}(?!\w)", message), message


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, (values, _) in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_the_flags_name(places, flag, value):
    assert_names(message_of(places, *BAD[flag][1], flag, value), flag)


@pytest.mark.parametrize(("flag", "value", "rest"), IDLE)
def test_an_option_that_does_nothing_is_refused_by_the_flags_name(places, flag, value, rest):
    assert_names(message_of(places, *rest, flag, value), flag)


def test_what_a_file_of_specs_says_keeps_its_own_words(places, monkeypatch, capsys):
    folder, _ = places
    for text, said in (("layers: '99'\n", "error: layers"), ("num_landmark: 3\n", "error: --spec: ")):
        (folder / "spec.yaml").write_text(text)
        words = ["convert", str(folder / "teacher"), str(folder / "out"), *PLAIN, "--spec", str(folder / "spec.yaml")]
        monkeypatch.setattr(sys, "argv", ["distattn", *words])
        with pytest.raises(SystemExit):
            main()
        error = capsys.readouterr().err
        assert said in error
        assert "--layers" not in error
        assert "--num-landmarks" not in error


def test_set_names_its_flags(tmp_path):
    with pytest.raises(ValueError, match="nothing to set; give one of --exact-below, --window-size, --num-blocks"):
        app(["set", str(tmp_path)], standalone_mode=False)


@pytest.mark.parametrize("verb", ["evaluate", "analyse"])
def test_data_that_cannot_be_read_is_named_by_its_flag(places, verb):
    folder, names = places
    rest = ["--out", str(folder / "report")] if verb == "analyse" else []
    for more, said in (
        (["nowhere.txt"], "--data: data 'nowhere.txt' does not exist"),
        ([names["TABLE"], "--column", "x"], "--data: --column"),
    ):
        with pytest.raises(ValueError, match=said):
            app([verb, str(folder / "teacher"), *rest, "--data", *more], standalone_mode=False)
