"""The command line: `distattn VERB`, see `distattn --help`. Each verb only calls the package."""

import json
import logging
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from . import __version__

# No module here may import torch: help and refused arguments must not wait for it. What needs it is imported where it
# is used, after `start`.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The registered metrics and their aliases, and what else can be told without torch (tests/test_cli.py compares).
METRICS = {
    "sqeuclidean": ("squared_l2", "l2_squared"),
    "l2": ("euclidean",),
    "l1": ("manhattan", "cityblock"),
    "lp": ("minkowski",),
    "cosine": (),
    "chebyshev": ("linf",),
    "lifted_sqeuclidean": (),
    "dot": (),
}
CHOICES = {
    "mechanism": ("distance", "nystrom"),
    "init": ("exact", "calibrated", "plain"),
    "attention": ("self", "cross"),
    "transform": ("none", "scalar", "linear"),
}
# Least values of the numbers; p and λ are checked apart.
LEAST = {
    "num_landmarks": 1, "window_size": 0, "num_sinks": 0, "exact_below": 0, "steps": 0,
    "max_tokens": 1, "max_length": 1, "max_texts": 1,
}  # fmt: skip

_SOURCE = "A Hub name, a folder, or an embedded checkpoint: minilm, smollm2-135m, iglm, iglm-s."
_DATA = "A .txt, .json, .jsonl, .csv, .tsv or .parquet file, 'news', or a data set's Hub name."
_LIST = "Separated by commas."

Source = Annotated[str, typer.Argument(help=_SOURCE)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]
Column = Annotated[str | None, typer.Option(help="The text column of the data set.")]


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


def start() -> None:
    """Make ready for work, once the arguments are in order: torch and transformers take seconds to import."""
    from transformers.utils import logging as transformers_logging

    from .auto_classes import register_all

    register_all()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def begin(*sources: str | None) -> None:
    """`start`, after a check that these sources of models can be some."""
    from .storage.embedded import check_source

    for source in filter(None, sources):
        check_source(source)
    start()


def check_choices(**values) -> None:
    """Raise `ValueError`, without torch, for a name that no option takes, and for a number out of its range."""
    metric = values.pop("metric", None)
    if metric is not None and metric.lower() not in {
        *METRICS,
        *(alias for names in METRICS.values() for alias in names),
    }:
        if metric.lower() in CHOICES["mechanism"]:
            raise ValueError(f"{metric!r} is a mechanism and not a metric; give --mechanism {metric.lower()}")
        usual = {name: aliases for name, aliases in METRICS.items() if name not in ("lifted_sqeuclidean", "dot")}
        shown = ", ".join(f"{name} ({', '.join(aliases)})" if aliases else name for name, aliases in usual.items())
        raise ValueError(
            f"unknown metric {metric!r}; --metric is one of {shown}. A metric of your own must be registered, so it is "
            "converted from Python"
        )
    order = values.get("p")
    if metric is not None and order is not None and metric.lower() not in ("lp", *METRICS["lp"]):
        raise ValueError(f"--p {order:g} was given with --metric {metric}; only lp takes an order")
    if metric is not None and order is None and metric.lower() in ("lp", *METRICS["lp"]):
        raise ValueError(f"--metric {metric} needs its order: give --p, a number >= 1")
    squared = metric is None or metric.lower() in ("sqeuclidean", *METRICS["sqeuclidean"])
    for name, value in (("mechanism", "nystrom"), ("init", "exact")):
        if values.get(name) == value and not squared:
            raise ValueError(f"{flag(name)} {value} needs --metric sqeuclidean, got {metric}")
    for name, value in values.items():
        if value is None:
            continue
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{flag(name)} must be one of {', '.join(CHOICES[name])}, got {value!r}")
        if name in LEAST and value < LEAST[name]:
            raise ValueError(f"{flag(name)} must be an integer >= {LEAST[name]}, got {value}")
        if name == "p" and not 1 <= value < float("inf"):
            raise ValueError(f"--p must be a finite number >= 1, got {value:g}")
        if name in ("lam", "max_error") and not 0 < value < float("inf"):
            raise ValueError(f"{flag(name)} must be a positive finite number, got {value:g}")


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


def option_names(command) -> list[str]:
    """The names of a verb's options, as Python has them; those of arguments are on no command line."""
    return [parameter.name for parameter in command.params if parameter.param_type_name == "option"]


# Options of `convert` that a file of specs takes the place of.
_OF_SPEC = (
    "metric", "mechanism", "num_landmarks", "window_size", "num_sinks", "exact_below", "layers", "heads", "attention",
    "p", "lam", "transform",
)  # fmt: skip


def _given(context: typer.Context, names) -> list[str]:
    """Which of a command's options the command line has, as they are written there."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [flag(n) for n, source in sources.items() if source and source.name == "COMMANDLINE"]


@app.command(
    epilog="Examples:  distattn convert minilm out/minilm-l2 --metric l2 --calibration news   |   "
    "distattn convert openai-community/gpt2 out/gpt2-exact --metric sqeuclidean --init exact   |   "
    "distattn convert smollm2-135m out/smol-l1 --metric l1 --transform linear --layers 0-9 --calibration my.txt"
)
def convert(
    context: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    spec_file: Annotated[
        Path | None, typer.Option("--spec", help="A YAML or JSON file with one AttentionSpec or a list (a mixed plan).")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="sqeuclidean, l2, l1, lp, cosine, chebyshev or an alias.")
    ] = "sqeuclidean",
    mechanism: Annotated[
        str, typer.Option(help="distance (exact), or nystrom: linear in time, constant memory per generated token.")
    ] = "distance",
    num_landmarks: Annotated[int | None, typer.Option(help="nystrom: landmarks per head. Default: 64.")] = None,
    window_size: Annotated[int | None, typer.Option(help="nystrom: keys seen exactly. Default: 64.")] = None,
    num_sinks: Annotated[int | None, typer.Option(help="nystrom: first tokens seen exactly. Default: 4.")] = None,
    exact_below: Annotated[
        int | None,
        typer.Option(help="nystrom: queries that see at most so many keys attend exactly. Default: 2048, or 0."),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="nystrom: heads that stay further off (relative error) keep exact attention.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="calibrated, exact (sqeuclidean only) or plain (the control).")
    ] = "calibrated",
    calibration: Annotated[str | None, typer.Option(help=f"Text for --init calibrated. {_DATA}")] = None,
    column: Column = None,
    layers: Annotated[
        str | None, typer.Option(help="'0-5', '0,2,4', a glob on names, or full_attention. Default: all.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="'0-3' or '0,2'. Default: all.")] = None,
    attention: Annotated[str | None, typer.Option(help="Only 'self' or only 'cross' attention. Default: both.")] = None,
    p: Annotated[float | None, typer.Option(help="Order of the lp metric, p >= 1.")] = None,
    lam: Annotated[
        float | None, typer.Option(help="λ at the start, which --init calibrated fits anew. Default: the metric's own.")
    ] = None,
    transform: Annotated[str | None, typer.Option(help="none, scalar or linear. Default: see AttentionSpec.")] = None,
    fold_alpha: Annotated[
        bool, typer.Option("--fold-alpha", help="Move α into the query projections: plain distances, α = 1.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Calibration steps a layer. Default: 100, linear 200.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration.")] = 0,
    overwrite: Overwrite = False,
    per_head: Annotated[bool, typer.Option("--per-head", help="Print a line for every head.")] = False,
):
    """Convert a pretrained checkpoint to distance attention.

    Whatever else lies beside the source's weights and does not depend on the attention goes along (the pooling of a
    sentence-transformers model, a processor, a licence); what was left behind is said.
    """
    if spec_file is not None and (doubled := _given(context, _OF_SPEC)):
        raise ValueError(f"{doubled[0]} and --spec both say what the attention is; leave one of them out")
    check_choices(
        metric=metric, mechanism=mechanism, init=init, attention=attention, transform=transform, p=p, lam=lam,
        num_landmarks=num_landmarks, window_size=window_size, num_sinks=num_sinks, exact_below=exact_below,
        max_error=max_error, steps=steps,
    )  # fmt: skip
    if init == "calibrated" and calibration is None:
        raise ValueError("--init calibrated needs --calibration: a text file, 'news' or a data set; got none")
    if init != "calibrated" and (unused := _given(context, ("calibration", "column", "steps", "seed"))):
        raise ValueError(f"{unused[0]} is for the fit of --init calibrated; --init {init} fits nothing, leave it out")
    from .storage.folders import check_output

    check_output(out, overwrite)
    begin(source)
    from .conversion import convert as conversion
    from .conversion import fold
    from .conversion.calibrate import CalibrationOptions
    from .conversion.report import ConversionReport
    from .core.configuration_distattn import AttentionSpec
    from .data.config import read_specs
    from .data.sources import read_texts
    from .storage.companions import Source, describe_source
    from .storage.folders import save_checkpoint
    from .storage.models import load_checkpoint

    if spec_file is not None:
        spec = read_specs(spec_file)
    else:
        spec = AttentionSpec(
            metric=metric, mechanism=mechanism, p=p, lam=lam, transform=transform, layers=layers, attention=attention,
            heads=heads,
            num_landmarks=num_landmarks, window_size=window_size, num_sinks=num_sinks, exact_below=exact_below,
        )  # fmt: skip
    texts = read_texts(calibration, column=column) if calibration and init == "calibrated" else None
    model, tokenizer = load_checkpoint(source)
    beside = Source(source)
    if fold_alpha:
        fold.check_foldable(model, [spec] if isinstance(spec, AttentionSpec) else spec)
    options = CalibrationOptions(steps=steps, seed=seed, max_error=max_error)
    student = conversion.convert(model, spec, init=init, calibration=texts, tokenizer=tokenizer, options=options)
    student = fold.fold_alpha(student) if fold_alpha else student
    if student.conversion_report["source"] is None:
        student.conversion_report = {**student.conversion_report, "source": describe_source(beside)}
    left = save_checkpoint(student, tokenizer, out, overwrite=overwrite, source=beside)
    report = ConversionReport.from_dict(student.conversion_report)
    for line in report.table(per_head).splitlines():
        # The rest is what the checkpoint's report says, in its own words.
        print(as_flags(line, option_names(context.command)) if line.startswith("warning: ") else line)
    print_left(source, left)
    print(f"saved to {out}")


def print_left(source: str, left: list[str]) -> None:
    """Say which files of a source did not come along."""
    if left:
        shown = left if len(left) <= 8 else [*left[:8], f"{len(left) - 8} more"]
        print(f"left behind in {source}: {', '.join(shown)}")


@app.command(epilog="Example:  distattn inspect out/minilm-l2 --per-head")
def inspect(
    path: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub name.")],
    per_head: Annotated[bool, typer.Option("--per-head", help="Print a line for every head.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Show what is converted, and what the conversion lost.

    With λ and α of every module, or of every head.
    """
    begin(path)
    from .conversion.convert import current_report
    from .storage.models import load_checkpoint

    report = current_report(load_checkpoint(path)[0])
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.table(per_head))


@app.command("set", epilog="Example:  distattn set out/smollm2-nystrom --exact-below 2048")
def set_options(
    path: Annotated[Path, typer.Argument(help="The folder of a converted checkpoint; its config.json is changed.")],
    exact_below: Annotated[
        int | None, typer.Option(help="nystrom: queries that see at most so many keys attend exactly. 0: none.")
    ] = None,
    window_size: Annotated[
        int | None, typer.Option(help="nystrom: keys seen exactly; no fewer than the conversion had.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="distance: auto, cpp, sdpa, triton, chunked or reference.")
    ] = None,
):
    """Set what needs no fit on a converted checkpoint."""
    from .storage.folders import change_options

    given = {"exact_below": exact_below, "window_size": window_size, "backend": backend}
    change_options(path, **{name: value for name, value in given.items() if value is not None})
    print(f"changed {path / 'config.json'}")


@app.command(epilog="Example:  distattn evaluate out/minilm-l2 --against minilm --data news")
def evaluate(
    path: Source,
    data: Annotated[str, typer.Option(help=f"Text to evaluate on. {_DATA}")],
    against: Annotated[str | None, typer.Option(help="The teacher to print beside it.")] = None,
    column: Column = None,
    max_tokens: Annotated[int, typer.Option(help="How many tokens of the data to use.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    max_texts: Annotated[int, typer.Option(help="How many texts to use.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Score a model on text, alone or beside its teacher.

    By what the model's head allows: perplexity (causal), loss on 15% masked tokens (masked-LM), loss of each text as
    its own target (sequence-to-sequence), or retrieval (encoders): the first sentence of each text is to find the rest
    of it among those of all texts, by the cosine of embeddings.
    """
    check_choices(max_tokens=max_tokens, max_length=max_length, max_texts=max_texts)
    begin(path, against)
    from .data.sources import read_texts
    from .data.tasks import text_task_of
    from .evaluation.score import EvaluationOptions, compare_models, describe_scores
    from .storage.models import load_checkpoint

    texts = read_texts(data, column=column, split="test")[:max_texts]
    models = {path: load_checkpoint(path), **({against: load_checkpoint(against)} if against else {})}
    options = EvaluationOptions(max_length=max_length, max_tokens=max_tokens, progress=sys.stderr.isatty())
    result = compare_models(models, texts, options)
    print(json.dumps(result, indent=1) if as_json else _score_table(result))
    if not as_json:
        print(describe_scores(text_task_of(models[path][0]), result[path]))


def _score_table(result: dict[str, dict[str, float]]) -> str:
    names = [name for name in next(iter(result.values())) if name not in ("texts", "tokens")]
    width = max(len(model) for model in result)
    lines = [f"{'model':<{width}} " + " ".join(f"{n:>18}" for n in names)]
    lines += [f"{m:<{width}} " + " ".join(f"{s.get(n, float('nan')):>18.4f}" for n in names) for m, s in result.items()]
    return "\n".join(lines)


@app.command(
    epilog="Examples:  distattn analyse out/minilm-l2 --against minilm --data news --out out/report   |   "
    "distattn analyse smollm2-135m --text 'In the beginning God created the heaven and the earth.' --out out/report"
)
def analyse(
    path: Source,
    out: Annotated[Path, typer.Option(help="The folder to write: report.html, analysis.json, heads.csv, figures.")],
    against: Annotated[str | None, typer.Option(help="The teacher to compare with.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text to analyse; may be given several times.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Texts to analyse. {_DATA}")] = None,
    column: Column = None,
    max_texts: Annotated[int, typer.Option(help="How many texts of --data to use.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens a text.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="How many tokens to use in all.")] = 8192,
    heads: Annotated[
        list[str] | None, typer.Option(help="layer:head to show large; may be given several times.")
    ] = None,
    importance: Annotated[bool, typer.Option(help="Measure which heads matter: two passes, and one a head.")] = True,
    overwrite: Overwrite = False,
):
    """Report what the attention does: numbers, figures, one page.

    Statistics, figures and a report in one HTML page, of a model alone or beside its teacher.
    """
    if (text is None) == (data is None):
        raise ValueError("give either --text or --data")
    check_choices(max_tokens=max_tokens, max_length=max_length, max_texts=max_texts)
    begin(path, against)
    from .analysis.analyse import AnalyseOptions, parse_heads
    from .analysis.analyse import analyse as run
    from .data.sources import read_texts

    options = AnalyseOptions(
        max_length=max_length, max_tokens=max_tokens, importance=importance, heads=parse_heads(heads),
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    texts = text if data is None else read_texts(data, column=column, split="test")[:max_texts]
    found = run(path, texts, out, against=against, options=options, overwrite=overwrite)
    print(found.summary())
    print(f"saved to {out}; open {out / 'report.html'}")


@app.command(epilog="Example:  distattn revert out/minilm-l2 out/minilm-again")
def revert(
    path: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub name.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    overwrite: Overwrite = False,
):
    """Write the original model again, with dot-product attention.

    Its class and its weights, bit for bit unless they were trained since, and what lies beside them.
    """
    from .storage.folders import check_output

    check_output(out, overwrite)
    begin(path)
    from .conversion.convert import revert as revert_model
    from .storage.companions import Source
    from .storage.folders import save_checkpoint
    from .storage.models import load_checkpoint

    model, tokenizer = load_checkpoint(path)
    original = revert_model(model)
    save_checkpoint(original, tokenizer, out, overwrite=overwrite, source=Source(path))
    print(f"{type(model).__name__} -> {type(original).__name__}, saved to {out}")


@app.command(
    epilog="Examples:  distattn push out/minilm-l2 me/minilm-l2 --base-model minilm   |   "
    "distattn push out/minilm-l2 me/minilm-l2 --license apache-2.0 --dry-run"
)
def push(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="The folder of a converted checkpoint; its code is run to check it.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    license: Annotated[str | None, typer.Option(help="The licence's identifier. Default: the base model's.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help=f"{_SOURCE} Default: the scorecard's teacher, if it is known.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a README.md that somebody wrote or edited.")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Your own results for the card, marked as yours: a JSON list of "
            '{"dataset", "metric", "value"}, optionally "base" (the base model\'s value) and "note".'
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print the card, upload nothing.")] = False,
):
    """Check a converted checkpoint, write its card, upload it.

    It must load both ways, with the package and without. The token is taken from HF_TOKEN or `hf auth login`.
    """
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a folder; give the folder of a converted checkpoint")
    if results is not None and not results.is_file():
        raise ValueError(f"--results {str(results)!r} does not exist")
    start()
    from .hub import push as push_folder

    result = push_folder(
        path, repo, private=private, license=license, base_model=base_model, commit_message=message,
        overwrite_card=overwrite_card, results=results, dry_run=dry_run,
    )  # fmt: skip
    for note in result.notes:
        print(f"note: {as_flags(note, option_names(context.command))}", file=sys.stderr)
    print(result.card if dry_run else result.url, end="" if dry_run else "\n")


@app.command(
    epilog="Examples:  distattn adapt configs/training/minilm_l1.yaml   |   "
    "distattn adapt configs/training/minilm_l1.yaml spec.metric=l2 max_steps=50 output_dir=out/minilm-l2   |   "
    "torchrun --nproc-per-node 2 -m distattn_hf.cli adapt configs/training/minilm_l1.yaml use_cpu=true"
)
def adapt(
    config: Annotated[Path, typer.Argument(help="A YAML file as those in configs/training.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, with dots for nested keys: spec.metric=l2")
    ] = None,
):
    """Convert a checkpoint and train it back to its teacher.

    In stages; run it again to go on where it stopped.
    """
    check_config(config)
    start()
    from .training.adapt import adapt as run
    from .training.arguments import read_config

    arguments = read_config(config, overrides or ())
    with resumable(arguments.training.output_dir):
        card = run(arguments, say=say)
    if arguments.training.process_index == 0:
        print(card.table())
        print(f"saved to {Path(arguments.training.output_dir) / 'student'}")


@app.command(
    epilog="Examples:  distattn train configs/training/native_causal_lm.yaml   |   "
    "distattn train configs/training/native_causal_lm.yaml model.mechanism=l1 output_dir=out/native-l1"
)
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file as configs/training/native_*.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, with dots for nested keys: model.mechanism=l2")
    ] = None,
):
    """Train a model of the native family from scratch.

    Run it again to go on where it stopped.
    """
    check_config(config)
    start()
    from .training.arguments_scratch import read_scratch_config
    from .training.from_scratch import summary, train_from_scratch

    arguments = read_scratch_config(config, overrides or ())
    with resumable(arguments.training.output_dir):
        result = train_from_scratch(arguments)
    if arguments.training.process_index == 0:
        print(summary(result))
        print(f"saved to {Path(arguments.training.output_dir) / 'final'}")


@app.command(
    epilog="Example:  distattn compare configs/experiments/native_comparison.yaml max_steps=100 output_dir=out/c"
)
def compare(
    config: Annotated[Path, typer.Argument(help="A YAML file as configs/experiments/native_comparison.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for all runs.")] = None,
):
    """Train from scratch with several attentions and seeds.

    Gives a table and a figure; finished runs are not done again.
    """
    check_config(config)
    start()
    from .experiments.native_comparison import compare as run
    from .experiments.native_comparison import read_comparison, table

    comparison = read_comparison(config, overrides or ())
    with resumable(comparison.output_dir):
        found = run(comparison)
    print(table(found))
    print(f"saved to {comparison.output_dir}")


@app.command(
    epilog="Example:  distattn benchmark --config configs/experiments/benchmark_quick.yaml --metrics l1,lp3 --out out/b"
)
def benchmark(
    config: Annotated[Path | None, typer.Option(help="A YAML file of options; those given here win.")] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="distance, nystrom (linear), or native (the native family). Default: distance.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help=f"distance: l2, l1, ...; lp with its order: lp3, lp1.5. {_LIST}")
    ] = None,
    backends: Annotated[str | None, typer.Option(help=f"distance: auto or names. {_LIST}")] = None,
    passes: Annotated[
        str | None, typer.Option(help=f"all: forward, forward_backward; distance also decode. {_LIST}")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help=f"all: N of forward and forward_backward. {_LIST}")] = None,
    decode_lengths: Annotated[
        str | None, typer.Option(help=f"distance: keys that the query of decode sees. {_LIST}")
    ] = None,
    head_sizes: Annotated[str | None, typer.Option(help=f"distance: d. {_LIST}")] = None,
    heads: Annotated[int | None, typer.Option(help="all: query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="distance: key heads. Default: as many as query heads.")] = None,
    batch: Annotated[int | None, typer.Option(help="all: sequences.")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"distance: float32, float16, bfloat16, float64. {_LIST}")] = None,
    causal: Annotated[str | None, typer.Option(help="all: false, true or both.")] = None,
    device: Annotated[str | None, typer.Option(help="all: auto, cpu or cuda.")] = None,
    repeats: Annotated[int | None, typer.Option(help="all: pairs that are timed at least.")] = None,
    warmup: Annotated[int | None, typer.Option(help="all: untimed calls before.")] = None,
    min_seconds: Annotated[float | None, typer.Option(help="all: add pairs until so many seconds are sampled.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="all: start no pair after so many seconds.")] = None,
    naive: Annotated[
        bool | None, typer.Option("--naive/--no-naive", help="distance: also time cdist + softmax.")
    ] = None,
    naive_max_length: Annotated[int | None, typer.Option(help="distance: the longest length naive runs at.")] = None,
    memory: Annotated[
        bool | None, typer.Option("--memory/--no-memory", help="all: also measure peak memory (nystrom: on CPU).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="all: CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int | None, typer.Option(help="all: of the inputs and the order in a pair.")] = None,
    out: Annotated[
        str | None, typer.Option(help="all: the folder to write. Default: out/benchmark, -nystrom, -native.")
    ] = None,
    plot: Annotated[
        bool | None, typer.Option("--plot/--no-plot", help="all: draw the figures (needs matplotlib).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
):
    """Measure time and memory of each metric, once it is right.

    Each is checked against the reference, then measured beside PyTorch's own attention. nystrom: linear attention
    beside PyTorch's and other packages', with the error of each. native: local, strided, landmark, linear, performer,
    ... of the native family.

    Each option says whether the distance mechanism has it or all. What the others alone have are
    keys of their YAML files: nystrom strategies, peers, num_landmarks, window_size, num_sinks, head_size,
    sdpa_max_length, error_max_length; native mechanisms, head_size, sdpa_max_length.

    Exit code 1: a result was wrong (its line says WRONG and no time) or a case failed.
    """
    options = {name: value for name, value in locals().items() if name not in ("config", "overwrite")}
    if config is not None:
        check_config(config)
    start()
    from .benchmark.run_exact import benchmark as run

    if code := run(config, options, overwrite=overwrite):
        raise typer.Exit(code)


def check_config(path: Path) -> None:
    """Raise `ValueError` for a file that is not there."""
    if not path.is_file():
        raise ValueError(f"config {str(path)!r} does not exist")


def say(text: str) -> None:
    """Print progress, apart from results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def resumable(output_dir):
    """While it is open, Ctrl-C says how to go on, and ends with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nstopped. The same command again goes on from the last checkpoint in {output_dir}")
        raise typer.Exit(130) from None


class _InFlags(logging.Formatter):
    """Warnings of the package in the words of the command line."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def format(self, record) -> str:
        return f"{record.levelname.lower()}: {as_flags(record.getMessage(), self.options)}"


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 1."""
    verbs = typer.main.get_command(app).commands
    verb = next((verbs[word] for word in sys.argv[1:2] if word in verbs), None)
    options = option_names(verb) if verb is not None else []
    handler = logging.StreamHandler()
    handler.setFormatter(_InFlags(options))
    logging.getLogger("distattn_hf").addHandler(handler)
    logging.getLogger("distattn_hf").propagate = False
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {as_flags(str(error), options)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
