"""The guide's tables of mechanisms and encodings name what the registries have, with its defaults."""

import re
from dataclasses import fields
from pathlib import Path

from distattn_hf.core.attention_spec import AttentionSpec
from distattn_hf.core.configuration_native import DEFAULT_METRICS, SPEC_MECHANISMS, spec_of
from distattn_hf.core.encodings import POSITIONAL_ENCODINGS, PositionalEncoding
from distattn_hf.core.mechanisms import MECHANISMS

GUIDE = Path(__file__).parents[2] / "model_cards" / "guides" / "native.md"


def table(first_column: str) -> dict[str, list[str]]:
    """{first cell: the others} of the guide's table with this first column and a column of advice."""
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |") and "take it when" in line)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :]]
    end = next(i for i, line in enumerate(lines[start + 2 :]) if not line.startswith("|"))
    return {cells[0].strip("`"): cells[1:] for cells in rows[:end]}


def options_of(mechanism: str) -> dict:
    if mechanism == "dot":
        return {}
    if mechanism not in SPEC_MECHANISMS:
        return {name: option.default for name, option in MECHANISMS.get(mechanism).options.items()}
    spec, found = spec_of(mechanism, DEFAULT_METRICS[mechanism], {}), {}
    for field in fields(AttentionSpec):
        if field.name in ("metric", "mechanism"):
            continue
        # Only "lp" has an order.
        metric = "lp" if field.name == "p" else DEFAULT_METRICS[mechanism]
        try:  # what a config of this mechanism takes
            again = spec_of(mechanism, metric, {field.name: other(field.name, spec)})
        except ValueError:
            continue
        if again != spec:
            found[field.name] = getattr(spec, field.name)
    return found


def other(name: str, spec: AttentionSpec):
    """A value of an option that is not its default, and that some mechanism takes."""
    value = getattr(spec, name)
    words = {"transform": "scalar", "backend": "reference", "lam": 2.0, "p": 3.0, "softening": 1.0, "min_weight": 0.5}
    if isinstance(value, bool):
        return not value
    return words.get(name, 7)


def test_options_and_defaults_of_every_mechanism():
    rows = table("mechanism")
    assert list(rows) == ["dot", *SPEC_MECHANISMS, *MECHANISMS]
    for mechanism, (options, advice) in rows.items():
        written = dict(re.findall(r"`(\w+)=([^`]+)`", options))
        expected = {name: repr(default).replace("'", '"') for name, default in options_of(mechanism).items()}
        assert written == expected, mechanism
        assert len(advice) > 20


def test_every_encoding():
    rows = table("encoding")
    assert sorted(rows) == sorted(POSITIONAL_ENCODINGS)
    for name, (where, learned, beyond, _) in rows.items():
        kind = POSITIONAL_ENCODINGS.get(name)
        assert beyond == kind.extrapolates
        assert (where == "on the logits") == kind.is_bias
        assert (where == "turns query and key") == (kind.rotation is not PositionalEncoding.rotation)
        assert (where == "added to the embeddings") == (kind.embed is not PositionalEncoding.embed)
        assert (learned == "yes") == (name in ("relative", "learned", "decay"))
