"""`distattn convert`: a pretrained checkpoint with another attention."""

from pathlib import Path
from typing import Annotated

import typer

from .choices import check_choices, check_min_weight, read_softening
from .flags import as_flags, given, option_names, reading
from .shared import DATA, Column, Overwrite, SourceArgument, begin, say

command = typer.Typer()


# Options of `convert` that a spec file replaces.
OF_SPEC = (
    "metric", "mechanism", "num_landmarks", "window_size", "num_sinks", "exact_below", "block_size", "num_blocks",
    "min_weight", "far_field",
    "cluster_keys", "beyond", "layers", "heads", "attention", "p", "lam", "transform", "softening",
)  # fmt: skip


@command.command(
    epilog="Examples:  distattn convert minilm out/minilm-l2 --metric l2 --calibration news   |   "
    "distattn convert openai-community/gpt2 out/gpt2-exact --metric sqeuclidean --init exact   |   "
    "distattn convert smollm2-135m out/smol-long --mechanism retrieval   |   "
    "distattn convert smollm2-135m out/smol-l1 --metric l1 --transform maps --layers 0-9 --calibration my.txt"
)
def convert(
    context: typer.Context,
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    spec_file: Annotated[
        Path | None, typer.Option("--spec", help="A YAML or JSON file with one AttentionSpec or a list (a mixed plan).")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="sqeuclidean, l2, l1, lp, cosine, chebyshev or an alias.")
    ] = "sqeuclidean",
    mechanism: Annotated[
        str,
        typer.Option(
            help="distance (exact); nystrom: linear in time, constant memory per generated token; or retrieval: all "
            "keys kept, few read, nothing to fit."
        ),
    ] = "distance",
    num_landmarks: Annotated[int | None, typer.Option(help="nystrom: landmarks per head. Default: 64.")] = None,
    window_size: Annotated[
        int | None, typer.Option(help="nystrom, retrieval: last keys seen exactly. Default: 64.")
    ] = None,
    num_sinks: Annotated[
        int | None, typer.Option(help="nystrom, retrieval: first tokens seen exactly. Default: 4.")
    ] = None,
    exact_below: Annotated[
        int | None,
        typer.Option(help="nystrom: queries that see at most so many keys attend exactly. Default: 2048, or 0."),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="retrieval: keys found and read together. Default: 16.")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(help="retrieval: blocks that a query reads at most. Default: 64.")
    ] = None,
    min_weight: Annotated[
        float | None,
        typer.Option(help="retrieval: share of the weight that makes a block be read. 0: num_blocks. Default: 0.003."),
    ] = None,
    far_field: Annotated[
        bool | None,
        typer.Option(help="retrieval: a block that is not read counts as one key that stands for it. Default: yes."),
    ] = None,
    cluster_keys: Annotated[
        bool | None, typer.Option(help="retrieval: older keys stand in blocks by their likeness. Default: yes.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="nystrom: heads that stay further off (relative error) use --beyond instead.")
    ] = None,
    beyond_share: Annotated[
        float | None,
        typer.Option(help="nystrom: in place of --max-error, the share of the key heads that use --beyond."),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="nystrom: which key heads --beyond-share takes: by error, or by probe (key-value texts need "
            "them; a share of 0.1 unless given). Default: error."
        ),
    ] = None,
    beyond: Annotated[
        str | None,
        typer.Option(
            help="nystrom: what heads past --max-error use: retrieval (whole key heads) or exact. Default: retrieval."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="calibrated, exact (sqeuclidean only) or plain (the control). Default: calibrated; of retrieval from "
            "the teacher's own logits exact."
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help=f"Text for --init calibrated, and to say what retrieval catches. {DATA}")
    ] = None,
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
    transform: Annotated[str | None, typer.Option(help="none, scalar or maps. Default: see AttentionSpec.")] = None,
    softening: Annotated[
        str | None,
        typer.Option(help="ε below which it is quadratic: a number, 0 (plain), or fit (default of --init calibrated)."),
    ] = None,
    fold_alpha: Annotated[
        bool, typer.Option("--fold-alpha", help="Move α into the query projections: the same attention, α = 1.")
    ] = False,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Save what differs from the source alone, a few kilobytes that load onto it."),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Calibration steps a layer. Default: 100, maps 200.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration.")] = 0,
    overwrite: Overwrite = False,
    per_head: Annotated[bool, typer.Option("--per-head", help="Print a line for every head.")] = False,
):
    """Convert a pretrained checkpoint to distance attention.

    Whatever else lies beside the source's weights and does not depend on the attention goes along (the pooling of a
    sentence-transformers model, a processor, a licence); what was left behind is said.
    """
    if spec_file is not None and (conflicting := given(context, OF_SPEC)):
        raise ValueError(f"{conflicting[0]} and --spec both say what the attention is; leave one of them out")
    check_choices(
        metric=metric, mechanism=mechanism, init=init, attention=attention, transform=transform, p=p, lam=lam,
        num_landmarks=num_landmarks, window_size=window_size, num_sinks=num_sinks, exact_below=exact_below,
        block_size=block_size, num_blocks=num_blocks, max_error=max_error, beyond_share=beyond_share,
        select=select, beyond=beyond, steps=steps, seed=seed,
    )  # fmt: skip
    check_min_weight(min_weight)
    if select == "error" and beyond_share is None:
        raise ValueError("--select error says which heads --beyond-share takes; give that share, or leave it out")
    epsilon = read_softening(softening)
    retrieves = mechanism == "retrieval" and spec_file is None
    if init is None:
        init = "exact" if retrieves and metric in ("sqeuclidean", "squared_l2", "l2_squared") else "calibrated"
    from ..core.attention_spec import AttentionSpec

    if spec_file is None:
        # What belongs to another mechanism is named before what this one lacks.
        if mechanism != "nystrom" and (others := given(context, ("max_error", "beyond_share", "select"))):
            raise ValueError(f"{others[0]} belongs to --mechanism nystrom, got --mechanism {mechanism}")
        spec = AttentionSpec(
            metric=metric, mechanism=mechanism, p=p, lam=lam, transform=transform, layers=layers, attention=attention,
            heads=heads, softening=epsilon,
            num_landmarks=num_landmarks, window_size=window_size, num_sinks=num_sinks, exact_below=exact_below,
            block_size=block_size, num_blocks=num_blocks, min_weight=min_weight, far_field=far_field,
            cluster_keys=cluster_keys, beyond=beyond,
        )  # fmt: skip
    if init == "calibrated" and calibration is None:
        raise ValueError("--init calibrated needs --calibration: a text file, 'news' or a data set; got none")
    used = ("calibration", "column") if retrieves else ()
    of_fits = [name for name in ("calibration", "column", "steps", "seed") if name not in used]
    if init != "calibrated" and (unused := given(context, of_fits)):
        raise ValueError(f"{unused[0]} is for the fit of --init calibrated; --init {init} fits nothing, leave it out")
    from ..storage.folders import check_output

    check_output(out, overwrite, source=source)
    if calibration is not None:
        from ..data.at_hand import check_at_hand

        with reading("calibration"):
            check_at_hand(calibration)
    begin(source)
    from ..conversion import convert as conversion
    from ..conversion import fold
    from ..conversion.calibrate import CalibrationOptions
    from ..data.config import read_specs
    from ..data.sources import TEXT_SUFFIXES, read_texts
    from ..storage.companions import Source, describe_source
    from ..storage.folders import save_checkpoint
    from ..storage.models import load_checkpoint, load_processor

    if spec_file is not None:
        with reading("spec_file"):
            spec = read_specs(spec_file)
    texts = None
    if calibration is not None and Path(calibration).suffix in TEXT_SUFFIXES:
        # Before a model is loaded.
        with reading("calibration", "column"):
            texts = read_texts(calibration, column=column)
    model, tokenizer = load_checkpoint(source)
    if model.main_input_name not in ("input_ids", "inputs_embeds"):
        tokenizer = load_processor(source)
    elif calibration is not None and tokenizer is None:
        raise ValueError(f"{source!r} has no tokenizer files, so it cannot read the text of --calibration")
    if calibration is not None and texts is None:
        with reading("calibration", "column"):
            texts = _calibration(calibration, column, model, tokenizer)
    source_files = Source(source)
    if fold_alpha:
        fold.check_foldable(model, [spec] if isinstance(spec, AttentionSpec) else spec)
    options = CalibrationOptions(
        steps=steps, seed=seed, max_error=max_error, beyond_share=beyond_share, select=select or "error"
    )
    if init == "calibrated":
        specs = [spec] if isinstance(spec, AttentionSpec) else spec
        say(conversion.describe_fit(specs, options, model.main_input_name in ("input_ids", "inputs_embeds")))
    student = conversion.convert(model, spec, init=init, calibration=texts, tokenizer=tokenizer, options=options)
    student = fold.fold_alpha(student) if fold_alpha else student
    report = student.conversion_report
    if report.source is None:
        report.source = describe_source(source_files)
        student.conversion_report = report
    left_behind = save_checkpoint(
        student, tokenizer, out, overwrite=overwrite, source=source_files, adapter_of=model if adapter else None
    )
    for line in report.table(per_head).splitlines():
        # The other lines are the report's own and keep its names.
        print(as_flags(line, option_names(context.command)) if line.startswith("warning: ") else line)
    _print_left(source, left_behind)
    print(f"saved to {out}")


def _calibration(source: str, column: str | None, model, processor) -> list:
    """Return texts to fit on, or batches of pictures or sound for a model that reads those."""
    from ..data.features import READY, input_batches
    from ..data.sources import open_data, read_texts

    if not any(model.main_input_name in names for names in READY.values()):
        return read_texts(source, column=column)
    data = open_data(source)
    return input_batches(data["train"] if isinstance(data, dict) else data, model, processor, column)


def _print_left(source: str, left: list[str]) -> None:
    """Print which files of a source were not copied."""
    if left:
        listed = left if len(left) <= 8 else [*left[:8], f"{len(left) - 8} more"]
        print(f"left behind in {source}: {', '.join(listed)}")
