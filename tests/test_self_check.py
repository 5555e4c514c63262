"""`distattn check`: green here, and red, naming it, where something is broken on purpose."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from distattn_hf import DistanceAttentionTester, TestConfig, distance_attention
from distattn_hf.benchmark import self_check
from distattn_hf.cli import app
from distattn_hf.core.backends import BACKENDS
from distattn_hf.core.compatibility import CACHE_NAME

SMALL = TestConfig(batch_size=1, seq_len=12, hidden_size=16, num_heads=2, device="cpu")


def found(group: str, config=SMALL) -> dict[str, bool]:
    """Return {name of a check: whether it passed} of one group."""
    return {check.name: check.passed for check in getattr(DistanceAttentionTester(config), group)()}


def test_all_is_well(tmp_path):
    """Every group through the command, at its own sizes; the JSON holds what is printed."""
    run = CliRunner().invoke(app, ["check", "--device", "cpu", "--out", str(tmp_path / "check.json")])
    assert run.exit_code == 0, run.output
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["summary"]["success_rate"] == 1
    assert report["summary"]["total"] == sum(check["passed"] is not None for check in report["checks"]) > 80
    assert {"kernels", "masks", "mechanisms", "conversions", "speed"} <= {check["group"] for check in report["checks"]}
    assert "runs by" in run.output


@pytest.mark.parametrize("group", ["test_formula", "test_masks", "test_numerical_stability", "test_save_and_reload"])
def test_a_group_alone(group):
    passed = found(group)
    assert passed
    assert all(passed.values())


def test_a_broken_kernel_is_named(monkeypatch):
    run = BACKENDS.get("chunked").run

    def broken(inputs):
        return run(inputs) * (1.01 if inputs.metric.name == "cosine" else 1)

    entries = dict(BACKENDS._entries) | {"chunked": replace(BACKENDS.get("chunked"), run=broken)}
    monkeypatch.setattr(BACKENDS, "_entries", {name: entries[name] for name in ("chunked", "reference")})
    passed = found("test_gradient_flow")
    wrong = {name for name, ok in passed.items() if not ok}
    assert wrong
    assert all(name.startswith("chunked cosine") for name in wrong)
    assert sum(name.startswith("chunked cosine") for name in passed) == len(wrong)


def test_a_broken_formula_is_named(monkeypatch):
    """With l2 in the place of every metric."""

    def always_l2(query, key, value, metric, p, **options):
        return distance_attention(query, key, value, metric="l2", **options)

    monkeypatch.setattr(self_check, "distance_attention", always_l2)
    assert {name for name, ok in found("test_formula").items() if ok} == {"l2"}


def test_a_leak_is_found(monkeypatch):
    def leaking(query, key, value, **options):
        return torch.zeros_like(query) + value.mean()

    monkeypatch.setattr(self_check, "distance_attention", leaking)
    assert not any(found("test_masks").values())
    assert not any(found("test_formula").values())


def test_what_raises_has_failed_and_says_why(monkeypatch):
    def failing(*args, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(self_check, "distance_attention", failing)
    checks = DistanceAttentionTester(SMALL).test_formula()
    assert not any(check.passed for check in checks)
    assert all("RuntimeError: no such instruction" in check.note for check in checks)


def test_nan_in_the_steps_alone_is_found(monkeypatch):
    """Python's max(0.0, nan) is 0.0."""
    forward = self_check.DistAttnForCausalLM.forward

    def broken(self, input_ids, **options):
        output = forward(self, input_ids, **options)
        if options.get(CACHE_NAME) is not None:
            output.logits = output.logits * math.nan
        return output

    monkeypatch.setattr(self_check.DistAttnForCausalLM, "forward", broken)
    assert not DistanceAttentionTester(SMALL)._mechanism("dot")["passed"]


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(DistanceAttentionTester, "run_all_tests", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    for out, message in ((tmp_path, "--out must be a file"), (tmp_path / "file" / "x.json", "cannot be written")):
        run = CliRunner().invoke(app, ["check", "--out", str(out)])
        assert message in str(run.exception)


def test_a_number_that_is_none_is_null_in_json(monkeypatch, tmp_path):
    for name in [name for name in dir(DistanceAttentionTester) if name.startswith("test_")]:
        monkeypatch.setattr(DistanceAttentionTester, name, lambda self: [])
    broken = [self_check.Check("masks", "l2", False, error=math.nan, bound=0.0)]
    monkeypatch.setattr(DistanceAttentionTester, "test_masks", lambda self: broken)
    run = CliRunner().invoke(app, ["check", "--json", "--out", str(tmp_path / "check.json")])
    assert run.exit_code == 1
    assert json.loads((tmp_path / "check.json").read_text())["checks"][0]["error"] is None


def test_a_failure_is_told_and_is_the_exit_code(monkeypatch):
    broken = [self_check.Check("masks", "l2", False, error=0.5, bound=0.0)]
    for name in [name for name in dir(DistanceAttentionTester) if name.startswith("test_")]:
        monkeypatch.setattr(DistanceAttentionTester, name, lambda self: [])
    monkeypatch.setattr(DistanceAttentionTester, "test_masks", lambda self: broken)
    run = CliRunner().invoke(app, ["check"])
    assert run.exit_code == 1
    assert "FAILED: l2: error 5.00e-01 > 0.00e+00" in run.output
    assert "0 of 1 passed (0%)" in run.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 3}, "seq_len must be an integer >= 8, got 3"),
        ({"hidden_size": 10, "num_heads": 4}, "hidden_size=10 must be a multiple of num_heads=4"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TestConfig(**options)
