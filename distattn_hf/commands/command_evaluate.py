"""`distattn evaluate`: score a model on text."""

import json
import sys
from typing import Annotated

import typer

from .choices import check_choices
from .flags import reading
from .shared import DATA, Column, SourceArgument, begin

command = typer.Typer()


@command.command(epilog="Example:  distattn evaluate out/minilm-l2 --against minilm --data news")
def evaluate(
    path: SourceArgument,
    data: Annotated[str, typer.Option(help=f"Text to evaluate on. {DATA}")],
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
    of it among those of all texts, by the cosine of embeddings, pooled as a sentence-transformers folder says.
    """
    check_choices(max_tokens=max_tokens, max_length=max_length, max_texts=max_texts)
    begin(path, against)
    from ..data.sources import read_texts
    from ..data.tasks import text_task_of
    from ..evaluation.score import EvaluationOptions, compare_models, describe_scores
    from ..storage.models import load_checkpoint
    from ..storage.pooling import read_pooling

    with reading("data", "column"):
        texts = read_texts(data, column=column, split="test")[:max_texts]
    models = {path: load_checkpoint(path), **({against: load_checkpoint(against)} if against else {})}
    options = EvaluationOptions(max_length=max_length, max_tokens=max_tokens, progress=sys.stderr.isatty())
    kind = text_task_of(models[path][0])
    poolings = {name: read_pooling(name) for name in models} if kind == "embedding" else {}
    result = compare_models(models, texts, options, poolings)
    print(json.dumps(result, indent=1) if as_json else _score_table(result))
    if not as_json:
        print(describe_scores(kind, result[path], poolings.get(path, "")))


def _score_table(result: dict[str, dict[str, float]]) -> str:
    names = [name for name in next(iter(result.values())) if name not in ("texts", "tokens")]
    width = max(len(model) for model in result)
    lines = [f"{'model':<{width}} " + " ".join(f"{n:>18}" for n in names)]
    lines += [f"{m:<{width}} " + " ".join(f"{s.get(n, float('nan')):>18.4f}" for n in names) for m, s in result.items()]
    return "\n".join(lines)
