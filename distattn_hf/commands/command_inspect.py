"""`distattn inspect`: what is converted, and what the conversion lost."""

import json
from typing import Annotated

import typer

from .shared import begin

command = typer.Typer()


@command.command(epilog="Example:  distattn inspect out/minilm-l2 --per-head")
def inspect(
    path: Annotated[str, typer.Argument(help="A converted or native checkpoint: a folder or a Hub name.")],
    per_head: Annotated[bool, typer.Option("--per-head", help="Print a line for every head.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Show what is converted, and what the conversion lost.

    With λ and α of every module, or of every head. Of a native model: which attention its config names.
    """
    begin(path)
    from ..conversion.report_of_model import current_report
    from ..storage.models import load_checkpoint

    model = load_checkpoint(path)[0]
    if hasattr(model.config, "mechanism"):
        if per_head:
            raise ValueError(f"--per-head is about what a conversion fitted, and {path!r} is a native model")
        about = _describe(model.config)
        print(
            json.dumps(about, indent=1) if as_json else "\n".join(f"{name}: {value}" for name, value in about.items())
        )
        return
    report = current_report(model)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.table(per_head))


def _describe(config) -> dict[str, str]:
    """Return {what: words} of the attention that a config names, for people."""
    from ..core.mechanisms import MECHANISMS
    from ..core.native_attention import attention_choice

    heads = f"{config.num_attention_heads} heads, head_dim {config.head_dim}"
    about = {"native model": f"{config.num_hidden_layers} layers of {heads}"}
    crosses = hasattr(config, "cross_mechanism")
    for what, is_cross in (("attention", False), ("cross-attention", True))[: 1 + crosses]:
        mechanism, metric, options = attention_choice(config, is_cross)
        settings = {"metric": metric, **options} if metric else options
        about[what] = ", ".join([mechanism, *(f"{name}={value}" for name, value in settings.items())])
        if mechanism in MECHANISMS:
            kind = MECHANISMS.get(mechanism)
            about[f"{what} costs"] = f"time {kind.complexity}, memory {kind.memory}"
    return about | {"positions": config.positional_encoding}
