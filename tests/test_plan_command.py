"""`distattn plan`: bytes as caches have them, the choice that fits, and figures that the cards have."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from distattn_hf.benchmark.plan import MEASURED, lines, make_plan
from distattn_hf.cli import app
from distattn_hf.commands.command_plan import read_bytes
from tests.conversion.models import bert, gpt2, llama

PLENTY = 10**9


def long_llama():
    """Rotary positions: its configs say how many it was trained on."""
    model = llama()
    model.config.max_position_embeddings = 200_000
    return model


def sizes(plan) -> dict[str, int]:
    return {choice.attention: choice.cache_bytes for choice in plan.choices}


def test_bytes_are_those_of_a_cache():
    model = long_llama()
    cache = DynamicCache(config=model.config)
    ids = torch.randint(5, 50, (3, 40))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    plan = make_plan(model, 40, PLENTY, batch=3, measure=False)
    assert sizes(plan)["dot"] == held
    weights = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert plan.choices[0].weight_bytes == weights
    assert sizes(plan)["retrieval"] > held
    longer = (
        sizes(make_plan(model, 80_000, PLENTY, measure=False)),
        sizes(make_plan(model, 160_000, PLENTY, measure=False)),
    )
    assert longer[0]["nystrom"] == longer[1]["nystrom"] < longer[0]["dot"]
    assert longer[1]["dot"] == 2 * longer[0]["dot"]


def test_what_fits_is_taken():
    model = long_llama().train()
    bytes_of = sizes(make_plan(model, 80_000, PLENTY, measure=False))
    weights = make_plan(model, 10, PLENTY, measure=False).choices[0].weight_bytes
    for length, memory, expected in (
        (80_000, weights + bytes_of["retrieval"], "retrieval"),
        (80_000, weights + bytes_of["dot"], "dot"),
        (80_000, weights + bytes_of["nystrom"], "nystrom"),
        (80_000, weights + bytes_of["nystrom"] - 1, None),
        (1000, PLENTY, "dot"),
    ):
        plan = make_plan(model, length, memory, measure=False)
        assert plan.take == expected
        assert plan.why in lines(plan)[-1]
        assert all(choice.time_ratio is None for choice in plan.choices)
    assert all(module.training for module in model.modules())


def test_a_short_measurement(monkeypatch):
    monkeypatch.setattr("distattn_hf.benchmark.plan.TIMED_TOKENS", 64)
    teacher = long_llama()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    said = []
    plan = make_plan(teacher, 500, PLENTY, say=said.append)
    assert [line.split(":")[0] for line in said] == ["retrieval", "nystrom"]
    assert "reads 64 tokens in turns with the model's own attention, 3 times each" in said[0]
    assert [choice.timed_tokens for choice in plan.choices] == [None, 64, 64]
    assert all(choice.time_ratio > 0 for choice in plan.choices[1:])
    assert "time: of reading 64 tokens here" in lines(plan)[-2]
    assert "weights and cache in float32" in lines(plan)[-3]
    assert all(t.equal(before[name]) for name, t in teacher.state_dict().items())


def test_the_figures_are_those_of_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name in ("retrieval", "nystrom"):
        row = next(line for line in readme.splitlines() if line.startswith(f'| `"{name}"` |'))
        said = MEASURED[name].replace("perplexity ", "").partition(";")[0]
        assert all(part in row.replace("`", "") for part in said.split(", ")), (said, row)


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match="a cache of all keys, which Bert.* does not have"):
        make_plan(bert(), 10, PLENTY)
    with pytest.raises(ValueError, match="length must be at most the .* positions of GPT2.*, got 100,000"):
        make_plan(gpt2(), 100_000, PLENTY)
    with pytest.raises(ValueError, match="length must be an integer >= 1, got 0"):
        make_plan(gpt2(), 0, PLENTY)
    broken = gpt2().train()
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN|not finite"):
        make_plan(broken, 10, PLENTY)
    assert all(module.training for module in broken.modules())


def test_the_command(tmp_path):
    gpt2().save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--length", "64", "--memory", "1GB", "--no-measure"]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert "take dot: " in run.output
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [choice["attention"] for choice in report["choices"]] == ["dot", "retrieval", "nystrom"]
    bad = CliRunner().invoke(app, ["plan", str(tmp_path), "--length", "0", "--memory", "1GB"])
    assert "--length must be an integer >= 1, got 0" in str(bad.exception)


def test_memory_is_read():
    found = [read_bytes(text) for text in ("16GB", "1.5 gib", "500MB", "123")]
    assert found == [16 * 10**9, 3 * 2**29, 5 * 10**8, 123]
    for text in ("16 G", "-1GB", "GB", "0GB", "1e9", "0.5"):
        with pytest.raises(ValueError, match="--memory must be a number and a unit such as 16GB"):
            read_bytes(text)
