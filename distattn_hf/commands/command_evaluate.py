"""`distattn evaluate`: score a model on text, on what it finds in long texts, or on labels."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .choices import CHOICES, check_choices, read_numbers
from .flags import Worded, flag, given, reading
from .shared import DATA, Column, SourceArgument, begin, say

command = typer.Typer()

_LONG = ("passkey", "needle", "kv", "perplexity", "generation")
_LABELS = ("classification", "speech")
# Which tasks have an option; None: without --task.
_OF_TASK = {
    "max_tokens": (None,),
    "max_length": (None, *_LABELS),
    "max_texts": (None, *_LABELS),
    "label_column": _LABELS,
    "lengths": (*_LONG, "ruler"),
    "depths": ("passkey", "needle", "kv"),
    "samples": (*_LONG, "ruler"),
    "new_tokens": ("generation",),
    "tail": ("perplexity",),
    "control": (*_LONG, "ruler"),
}


@command.command(
    epilog="Examples:  distattn evaluate out/minilm-l2 --against minilm --data news   |   distattn evaluate "
    "out/smollm2-retrieval --against smollm2-135m --task passkey --lengths 1024,2048 --control --out out/passkey"
)
def evaluate(
    context: typer.Context,
    path: SourceArgument,
    data: Annotated[
        str | None, typer.Option(help=f"Text to evaluate on; with --task and no labels: 'news' by default. {DATA}")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The teacher to print beside it.")] = None,
    column: Column = None,
    max_tokens: Annotated[int, typer.Option(help="How many tokens of the data to use.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    max_texts: Annotated[int, typer.Option(help="How many texts to use.")] = 256,
    task: Annotated[str | None, typer.Option(help=f"One of {', '.join(CHOICES['task'])}; see above.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a long text, question and answer included.")] = "1024,2048",
    depths: Annotated[str, typer.Option(help="Where it is hidden: 0 (first) to 1 (last).")] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Texts of each length and depth.")] = 20,
    new_tokens: Annotated[int, typer.Option(help="generation: how many tokens to compare.")] = 64,
    tail: Annotated[int, typer.Option(help="perplexity: how many last tokens of a text are scored.")] = 256,
    control: Annotated[
        bool, typer.Option("--control", help="Also the same model with sinks and window alone (nystrom, retrieval).")
    ] = False,
    label_column: Annotated[str | None, typer.Option(help="classification, speech: the column of the labels.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for TASK.json (text.json) and its figure; distattn push --results takes it."),
    ] = None,
):
    """Score a model on text, alone or beside its teacher.

    By what the model's head allows: perplexity (causal), loss on 15% masked tokens (masked-LM), loss of each text as
    its own target (sequence-to-sequence), or retrieval (encoders): the first sentence of each text is to find the rest
    of it among those of all texts, by the cosine of embeddings, pooled as a sentence-transformers folder says.

    --task asks a causal model about long texts: passkey hides a number and asks for it, needle a sentence, kv pairs of
    random tokens; perplexity is of the same last tokens after more and more text; generation is how many of the tokens
    that --against goes on with are the same. ruler runs lm-eval's own six tasks that need no download (pip install
    'lm-eval[ruler]'); those that need longer texts are left out of a length. classification gives accuracy and macro
    F1 of a classifier of texts, words, pictures or sound on data with labels; speech the perplexity of transcripts,
    given the sound; both on the split validation or test of data with splits.
    """
    counts = {"samples": samples, "new_tokens": new_tokens, "tail": tail}
    check_choices(max_tokens=max_tokens, max_length=max_length, max_texts=max_texts, task=task, **counts)
    of_task = _OF_TASK if task != "ruler" else _OF_TASK | {"data": (), "column": ()}
    for name, tasks in of_task.items():
        if task not in tasks and given(context, [name]):
            raise ValueError(_misplaced(name, task, of_task))
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {str(out)!r}")
    if out is not None:
        from ..storage.folders import check_writable

        check_writable(out / "any")
    if data is None and task not in (*_LONG, "ruler"):
        raise ValueError(f"--data must be given. {DATA}")
    if task == "generation" and against is None:
        raise ValueError("--task generation compares with a teacher: give --against")
    if against == path:
        raise ValueError(f"--against must be another model than the one that is evaluated, got {against!r} twice")
    lengths, depths = read_numbers("lengths", lengths), read_numbers("depths", depths, float)
    begin(path, against)
    if task in _LABELS:
        _score_labels(task, path, against, data, column, label_column, max_length, max_texts, as_json, out)
    elif task == "ruler":
        _score_ruler(path, against, lengths, samples, control, as_json, out)
    elif task is not None:
        about = {"task": task, "lengths": lengths, "depths": depths, **counts}
        _score_long_texts(path, against, data, column, about, control, as_json, out)
    else:
        _score_texts(path, against, data, column, max_length, max_tokens, max_texts, as_json, out)


def _misplaced(name: str, task: str | None, of_task: dict[str, tuple]) -> str:
    """Say that an option does nothing with a task, or without one, what it is for, and which options there are."""

    now = f"with --task {task}" if task else "without --task"
    others = [f"--task {', '.join(own)}"] if (own := [other for other in of_task[name] if other]) else []
    others = " and ".join(others + ["evaluation without --task"] * (None in of_task[name])) or "any other --task"
    has = ", ".join(flag(option) for option, tasks in of_task.items() if task in tasks)
    return f"{flag(name)} does nothing {now}: it is for {others}; {now} there are {has}"


def _load(path: str, against: str | None) -> dict[str, tuple]:
    from ..storage.models import load_checkpoint

    return {path: load_checkpoint(path), **({against: load_checkpoint(against)} if against else {})}


def _load_labelled(path: str, against: str | None) -> dict[str, tuple]:
    """Return {name: (model, its tokenizer, or processor where it reads no text)}."""
    from ..data.tasks import TASKS, task_of
    from ..storage.models import load_processor

    return {
        name: (model, tokenizer if TASKS[task_of(model)].inputs == "text" else load_processor(name))
        for name, (model, tokenizer) in _load(path, against).items()
    }


def _score_texts(path, against, data, column, max_length, max_tokens, max_texts, as_json, out) -> None:
    from ..data.sources import read_texts
    from ..data.tasks import text_task_of
    from ..evaluation.score import EvaluationOptions, compare_models, describe_scores
    from ..storage.pooling import read_pooling

    with reading("data", "column"):
        texts = read_texts(data, column=column, split="test")[:max_texts]
    models = _load(path, against)
    options = EvaluationOptions(max_length=max_length, max_tokens=max_tokens, progress=sys.stderr.isatty())
    kind = text_task_of(models[path][0])
    poolings = {name: read_pooling(name) for name in models} if kind == "embedding" else {}
    result = compare_models(models, texts, options, poolings)
    print(json.dumps(result, indent=1) if as_json else _table(result))
    if not as_json:
        print(describe_scores(kind, result[path], poolings.get(path, "")))
    if out is not None:
        rows = [{"model": name, **row} for name, row in result.items()]
        options = {"max_length": max_length, "max_tokens": max_tokens, "max_texts": max_texts}
        _write(_about("text", path, against, data) | options, rows, out)


def _score_labels(task, path, against, data, column, label_column, max_length, max_texts, as_json, out) -> None:
    from ..data.datasets import DataArguments
    from ..evaluation.classification import evaluate_labels

    arguments = DataArguments(
        train_data=data, text_column=column, label_column=label_column, max_length=max_length,
        max_train_samples=max_texts,
    )  # fmt: skip
    with reading("data", "column", "label_column"):
        scores = evaluate_labels(_load_labelled(path, against), arguments, task=task, progress=sys.stderr.isatty())
    rows = [{"model": name, **row} for name, row in scores.items()]
    _report(_about(task, path, against, data), rows, _table(scores), as_json, out)


def _score_long_texts(path, against, data, column, about: dict, control: bool, as_json, out) -> None:
    from ..analysis.figure_style import require_matplotlib
    from ..data.sources import read_texts
    from ..evaluation.long_text_scores import LongTextOptions, evaluate_long_texts, score_table
    from ..evaluation.retrieval_tasks import RETRIEVAL_TASKS, Haystack

    options = LongTextOptions(**about, progress=sys.stderr.isatty())
    if out is not None and options.task in RETRIEVAL_TASKS:
        require_matplotlib()
    try:
        with reading("data", "column"):
            texts = read_texts(data or "news", column=column, split="test")
    except ValueError as error:
        if data is not None:
            raise
        raise Worded(
            f"--task {about['task']} is about long texts, made of 'news' unless --data names other text (a .txt file "
            f"will do); {str(error).removeprefix('--data: ')}"
        ) from error
    models, tokenizer = _load_readers(path, against, control)
    with reading("data", "lengths", "depths"):
        haystack = Haystack(tokenizer, texts)
    count, cells = len(models), len(options.lengths) * (len(options.depths) if options.task in RETRIEVAL_TASKS else 1)
    # Without a terminal there is no bar, and this takes minutes.
    print(f"{options.task}: {options.samples} texts in {cells} cells for {count} models", file=sys.stderr)
    rows = evaluate_long_texts(models, haystack, options, teacher=against)
    figure = None
    if out is not None and options.task in RETRIEVAL_TASKS:
        from ..analysis.retrieval_map import retrieval_map

        figure = retrieval_map(rows, f"{options.task}: exact answers, {options.samples} texts a cell (%)")
    about |= _about(options.task, path, against, data or "news")
    _report(about, rows, score_table(rows), as_json, out, figure)


def _load_readers(path: str, against: str | None, control: bool) -> tuple[dict, object]:
    """Return {name: model}, the control among them, and their tokenizer; raises `ValueError` without one."""
    from ..data.datasets import check_tokenizers
    from ..evaluation.scorecard import without_far_field

    loaded = _load(path, against)
    models = {name: model for name, (model, _) in loaded.items()}
    tokenizer = loaded[path][1] or loaded.get(against, (None, None))[1]
    if tokenizer is None:
        raise ValueError(f"{path!r} has no tokenizer files, so it cannot read text")
    for model, own in loaded.values():
        check_tokenizers(model, tokenizer, own)
    if control:
        try:
            models[f"{path}, sinks and window"] = without_far_field(models[path])
        except ValueError:
            raise Worded(
                f"--control runs the model with sinks and window alone, and in {path!r} no attention is nystrom or "
                "retrieval, which read more; leave it out"
            ) from None
    return models, tokenizer


def _score_ruler(path, against, lengths, samples: int, control: bool, as_json, out) -> None:
    from ..evaluation.ruler import RulerOptions, evaluate_ruler, require_lm_eval, ruler_table

    require_lm_eval()
    options = RulerOptions(lengths, samples, progress=sys.stderr.isatty())
    rows = evaluate_ruler(*_load_readers(path, against, control), options)
    about = {**_about("ruler", path, against, "texts that lm-eval makes"), "lengths": lengths, "samples": samples}
    _report(about, rows, ruler_table(rows), as_json, out)


def _about(task: str, path: str, against: str | None, data: str) -> dict:
    """Return what a file says of its rows; digest: of the checkpoint, by which its card knows them for its own."""
    from ..storage.files import checkpoint_digest

    return {"task": task, "model": path, "against": against, "digest": checkpoint_digest(path), "data": data}


def _report(about: dict, rows: list[dict], table: str, as_json: bool, out: Path | None, figure=None) -> None:
    """Print the rows, and write them, and the figure, into a folder."""
    from ..storage.folders import json_values

    print(json.dumps(json_values({**about, "rows": rows}), indent=1) if as_json else table)
    if out is not None:
        _write(about, rows, out, figure)


def _write(about: dict, rows: list[dict], out: Path, figure=None) -> None:
    """Write the rows with where they come from, and the figure, into a folder."""
    from ..benchmark.results import provenance
    from ..storage.folders import json_values, write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{about['task']}.json", {**provenance("cpu"), **json_values({**about, "rows": rows})})
    if figure is not None:
        from ..analysis.figure_style import save_figure

        save_figure(figure, out / about["task"])
    say(f"saved to {out}")


def _table(result: dict[str, dict[str, float]]) -> str:
    names = [name for name in next(iter(result.values())) if name not in ("texts", "tokens")]
    width = max(len(model) for model in result)
    lines = [f"{'model':<{width}} " + " ".join(f"{n:>18}" for n in names)]
    lines += [f"{m:<{width}} " + " ".join(f"{s.get(n, float('nan')):>18.4f}" for n in names) for m, s in result.items()]
    return "\n".join(lines)
