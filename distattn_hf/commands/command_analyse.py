"""`distattn analyse`: a report on what the attention does."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .choices import check_choices
from .flags import reading
from .shared import DATA, Column, Overwrite, SourceArgument, begin

command = typer.Typer()


@command.command(
    epilog="Examples:  distattn analyse out/minilm-l2 --against minilm --data news --out out/report   |   "
    "distattn analyse smollm2-135m --text 'In the beginning God created the heaven and the earth.' --out out/report"
)
def analyse(
    path: SourceArgument,
    out: Annotated[Path, typer.Option(help="The folder to write: report.html, analysis.json, heads.csv, figures.")],
    against: Annotated[str | None, typer.Option(help="The teacher to compare with.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text to analyse; may be given several times.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Texts to analyse. {DATA}")] = None,
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
    from ..analysis.analyse import AnalyseOptions, parse_heads
    from ..analysis.analyse import analyse as run
    from ..data.sources import read_texts

    options = AnalyseOptions(
        max_length=max_length, max_tokens=max_tokens, importance=importance, heads=parse_heads(heads),
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    texts = text
    if data is not None:
        with reading("data", "column"):
            texts = read_texts(data, column=column, split="test")[:max_texts]
    analysis = run(path, texts, out, against=against, options=options, overwrite=overwrite)
    print(analysis.summary())
    print(f"saved to {out}; open {out / 'report.html'}")
