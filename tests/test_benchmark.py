"""`distattn benchmark`: its options, its check, what it writes. No test asserts a speed."""

import inspect
import json
import math
import sys
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch
import typer
import yaml
from torch.nn import functional as F

from distattn_hf import distance_attention
from distattn_hf.benchmark import exact_check as check
from distattn_hf.benchmark import measure
from distattn_hf.benchmark import run as module
from distattn_hf.benchmark.command import load_config, option_names, read_config, run_benchmark
from distattn_hf.benchmark.exact_options import PASSES, BenchmarkConfig, parse_metric
from distattn_hf.benchmark.plot import plot_results
from distattn_hf.benchmark.results import provenance
from distattn_hf.benchmark.run_exact import LEAST_MEGABYTES, ExactBenchmark
from distattn_hf.commands import command_benchmark
from distattn_hf.core.backends import BACKENDS, Backend
from distattn_hf.storage.folders import write_json
from tests.benchmark_cases import CONFIGS, WrongSlope, command_line, recorded
from tests.tolerances import HALF_ERROR_RATIO, assert_close

TINY = {
    "metrics": "l2", "lengths": 64, "decode_lengths": 48, "head_sizes": 8, "heads": 2, "repeats": 2, "warmup": 1,
    "min_seconds": 0, "memory": False, "plot": False, "naive": False, "device": "cpu",
}  # fmt: skip


def config(folder, **options) -> BenchmarkConfig:
    return BenchmarkConfig(**{**TINY, "out": str(folder / "out"), **options})


def run(folder, **options) -> tuple[dict, str]:
    """(the report, what was printed) of one run."""
    return recorded(run_benchmark, config(folder, **options))


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": "l7"}, "unknown metric 'l7'"),
        ({"metrics": []}, "metrics must name at least one"),
        ({"metrics": [3]}, "metrics must be names"),
        ({"metrics": "l2,lp"}, "metric 'lp' needs its order: write lp3 or lp1.5"),
        ({"metrics": "lp0.5"}, "p must be a finite number >= 1"),
        ({"metrics": "cosine3"}, "unknown metric 'cosine3'"),
        ({"backends": "flash"}, "unknown backend 'flash'"),
        ({"passes": "backward"}, "passes must be one of forward, forward_backward, decode, got 'backward'"),
        ({"lengths": 8}, "lengths must be a whole number >= 16, got 8"),
        ({"lengths": "64,x"}, "lengths must be a whole number >= 16, got 'x'"),
        ({"lengths": 64.5}, "lengths must be a whole number >= 16, got 64.5"),
        ({"decode_lengths": True}, "decode_lengths must be a whole number >= 16, got True"),
        ({"head_sizes": 0}, "head_sizes must be a whole number >= 1, got 0"),
        ({"heads": 12, "kv_heads": 5}, r"heads \(12\) must be a multiple of kv_heads \(5\)"),
        ({"batch": 0}, "batch must be a whole number >= 1, got 0"),
        ({"dtypes": "float8"}, "dtypes must be one of float32, float16, bfloat16, float64, got 'float8'"),
        ({"causal": "maybe"}, "causal must be one of false, true, both, got 'maybe'"),
        ({"softening": -1}, "softening must be a number >= 0, got -1"),
        ({"softcap": "high"}, "softcap must be a number >= 0, got 'high'"),
        ({"metrics": "l2,sqeuclidean", "softening": 2}, "softening must be 0 with metric 'sqeuclidean', got 2.0"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"repeats": 0}, "repeats must be a whole number >= 1, got 0"),
        ({"min_seconds": -1}, "min_seconds must be a number >= 0, got -1"),
        ({"max_seconds": math.nan}, "max_seconds must be a number >= 0, got nan"),
        ({"naive": "yes"}, "naive must be true or false, got 'yes'"),
        ({"threads": 0}, "threads must be a whole number >= 1, got 0"),
        ({"out": ""}, "out must be a folder, got ''"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_option_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(ValueError, match="PyTorch sees no GPU"):
        BenchmarkConfig(device="cuda")


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        ("metric: l2\nlengths: 64", None, "unknown benchmark option metric; expected one of metrics, backends, passes"),
        (
            "metrics: [l2]\nnum_landmarks: 8\npeers: []",
            None,
            "mechanism distance has no option num_landmarks, peers, which only mechanism nystrom has; its own",
        ),
        ("- l2", None, "must hold a mapping of options, got list"),
        ("a: [", None, "is not YAML"),
        (None, None, "does not exist"),
    ],
    ids=["unknown", "of nystrom", "list", "broken", "absent"],
)
def test_config_file_that_cannot_be_used(text, content, message, tmp_path):
    path = tmp_path / "benchmark.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "benchmark.yaml"
    path.write_text("metrics: [l1]\nheads: 4\nnaive: true")
    found = load_config(path, {"metrics": "l2,cosine", "naive": False, "heads": None})
    assert (found.metrics, found.heads, found.naive) == (("l2", "cosine"), 4, False)


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if "mechanism" not in read_config(path)],
    ids=lambda path: path.stem,
)
def test_shipped_configs_are_valid(path):
    assert load_config(path).cases()
    assert set(yaml.safe_load(path.read_text())) <= {field.name for field in fields(BenchmarkConfig)}


def test_every_option_is_on_the_command_line():
    names = {field.name for field in fields(BenchmarkConfig)}
    assert set(inspect.signature(command_benchmark.benchmark).parameters) == names | {
        "config",
        "overwrite",
        "mechanism",
    }


def test_the_help_says_which_mechanism_has_an_option():
    """And names, for the others, those that only their YAML files have."""
    names = {mechanism: set(option_names(mechanism)) for mechanism in ("distance", "nystrom", "native")}
    command = typer.main.get_command(command_benchmark.command)
    text = {option.name: option.help for option in command.params}
    for name in names["distance"]:
        assert text[name].startswith("all: " if name in names["nystrom"] else "distance: "), name
        assert (name in names["nystrom"]) == (name in names["native"]), name
    for mechanism in ("nystrom", "native"):
        alone = command.help.partition("keys of their YAML files:")[2].partition(f"{mechanism} ")[2]
        alone = alone.partition(";")[0].partition(".")[0]
        assert {name.strip() for name in alone.split(",")} == names[mechanism] - names["distance"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lp3", ("lp", 3.0)), ("LP1.5", ("lp", 1.5)), ("minkowski2", ("lp", 2.0)), ("l1", ("l1", None)),
        ("euclidean", ("l2", None)), ("squared_l2", ("sqeuclidean", None)),
    ],
)  # fmt: skip
def test_metric_names(text, expected):
    assert parse_metric(text) == expected


def test_cases_are_the_product_without_repetition():
    found = BenchmarkConfig(
        metrics="l2,euclidean,lp3", lengths="64,128,64", causal="both", backends="auto,reference", device="cpu"
    ).cases()
    assert len(set(found)) == len(found) == 2 * 2 * (2 * 2 * 2 + 1)
    assert {case.causal for case in found if case.pass_name == "decode"} == {False}
    assert {case.label for case in found} == {"l2", "lp3"}


# The check ----------------------------------------------------------------------------------------------------------


def wrong_backend(monkeypatch, distort):
    """A backend "wrong" that gives distort(right output, inputs), and "auto" prefers it."""

    def compute(inputs):
        return distort(BACKENDS.get("chunked").run(inputs), inputs)

    wrong = Backend("wrong", compute, lambda inputs: None)
    monkeypatch.setattr(BACKENDS, "_entries", {"wrong": wrong, **BACKENDS._entries})


def last_row_of_long_sequences(output, inputs):
    """Right for the lengths of the small check."""
    output = output.clone()
    if output.shape[-2] > max(check.CHECKED_LENGTHS):
        output[..., -1, :] *= 1.01
    return output


WRONG = {
    "output": (lambda output, inputs: output * 1.001, "forward", ""),
    "nan": (lambda output, inputs: output * math.nan, "decode", "output"),
    "gradient": (lambda output, inputs: WrongSlope.apply(output), "forward_backward", "gradient"),
    "gradient of a pass without": (lambda output, inputs: WrongSlope.apply(output), "forward", "gradient"),
    "only at the timed length": (last_row_of_long_sequences, "forward", "forward at 100, 16 rows: output"),
    "gradient at the timed length": (
        lambda output, inputs: WrongSlope.apply(output) if output.shape[-2] == 100 else output,
        "forward_backward",
        "forward_backward at 100, 16 rows: ",
    ),
}


@pytest.mark.parametrize("distort", WRONG)
def test_a_wrong_result_has_no_time(distort, monkeypatch, tmp_path):
    distort, name, where = WRONG[distort]
    wrong_backend(monkeypatch, distort)
    monkeypatch.setattr(module, "time_pair", None)
    report, printed = run(tmp_path, lengths=100, passes=name)
    (result,) = report["results"]
    assert (result["status"], result["ran"]) == ("wrong", "wrong")
    assert not {"ours", "sdpa", "ratio", "naive", "memory"} & set(result)
    assert where in result["gate"]["worst"]
    (line,) = [line for line in printed.splitlines() if line.startswith("l2")]
    assert "WRONG (error " in line
    assert module.exit_code(report) == 1
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == report


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_held_against_pytorchs(dtype, monkeypatch, tmp_path):
    """Passes as it is, and not with twice PyTorch's rounding on top."""
    assert check.HALF_ERROR_RATIO == HALF_ERROR_RATIO
    options = {"dtypes": dtype, "passes": "forward_backward,decode", "metrics": "l2,l1"}
    report, _ = run(tmp_path / "right", **options)
    assert [result["status"] for result in report["results"]] == ["ok"] * 4
    wrong_backend(monkeypatch, lambda output, inputs: output * (1.01 if dtype == "float16" else 1.05))
    report, _ = run(tmp_path / "wrong", **options)
    assert [result["status"] for result in report["results"]] == ["wrong"] * 4


def test_an_empty_check_does_not_pass():
    assert not module.summary([])["passed"]


def test_the_command_exits_with_1_after_a_wrong_result(monkeypatch, tmp_path):
    wrong_backend(monkeypatch, lambda output, inputs: output * 1.001)
    found = command_line(
        "--metrics", "l2", "--lengths", 64, "--passes", "forward", "--head-sizes", 8, "--heads", 2, "--repeats", 1,
        "--min-seconds", 0, "--backends", "auto,chunked", "--no-memory", "--no-naive", "--no-plot", "--device", "cpu",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert found.exit_code == 1
    assert found.stdout.count("WRONG") == 1
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [result["status"] for result in report["results"]] == ["wrong", "ok"]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "l2", "l1", "cosine", "chebyshev", "lp3"])
def test_the_naive_form_answers_the_same_question(metric, causal, tmp_path):
    case = config(tmp_path, metrics=metric, causal=causal, heads=4, kv_heads=2, dtypes="float64").cases()[0]
    query, key, value, _ = check.make_tensors(case)
    reference = check.our_attention(replace(case, backend="reference"))
    assert_close(check.naive_attention(case)(query, key, value), reference(query, key, value), "float64")


def test_pytorchs_attention_gets_grouped_heads_and_causality(tmp_path):
    case = config(tmp_path, causal=True, heads=4, kv_heads=2).cases()[0]
    query, key, value, _ = check.make_tensors(case)
    repeated = (t.repeat_interleave(2, dim=1) for t in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, is_causal=True)
    assert_close(check.pytorch_attention(case)(query, key, value), expected, "float32_forward")


@pytest.mark.parametrize("changes", [{"softening": 3.0}, {"softcap": 0.5}, {"softening": 3.0, "softcap": 0.5}])
def test_what_is_done_to_a_metric_is_timed_checked_and_named(changes, tmp_path):
    """It reaches the timed call, the float64 check and the choice of backend; the naive form knows nothing of it."""
    case = config(tmp_path, metrics="l1", **changes).cases()[0]
    query, key, value, _ = check.make_tensors(case)
    options = {"softening": changes.get("softening", 0), "softcap": changes.get("softcap")}
    expected = distance_attention(query, key, value, metric="l1", **options)
    assert torch.equal(check.our_attention(case)(query, key, value), expected)
    report, printed = run(tmp_path, metrics="l1", passes="forward", naive=True, **changes)
    assert report["results"][0]["gate"]["passed"]
    assert report["results"][0]["naive"] == {"absent": "none"}
    names = {"softening": "ε", "softcap": "cap"}
    assert " ".join(["l1", *(f"{names[name]} {value:g}" for name, value in changes.items())]) in printed


def test_metrics_without_a_naive_form_say_so(tmp_path):
    report, printed = run(tmp_path, metrics="dot", passes="forward", naive=True)
    assert report["results"][0]["naive"] == {"absent": "none"}


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_writes_and_prints_every_case(tmp_path):
    report, printed = run(
        tmp_path, metrics="sqeuclidean,l1", backends="auto,chunked,sdpa,reference", lengths="64,128", causal=True,
        naive=True, naive_max_length=64, heads=4, kv_heads=2, warmup=0,
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == report
    assert report["complete"]
    assert module.exit_code(report) == 0
    assert len(report["results"]) == 2 * 4 * (2 * 2 + 1)
    assert report["config"]["metrics"] == ["sqeuclidean", "l1"]
    for result in report["results"]:
        if (result["label"], result["backend"]) == ("l1", "sdpa"):
            assert result["status"] == "skipped"
            assert "has no dot-product form" in result["reason"]
            continue
        assert result["status"] == "ok"
        if result["backend"] == "auto":
            assert result["ran"] in BACKENDS
            assert f"auto:{result['ran']}" in printed
        else:
            assert result["ran"] == result["backend"]
        assert result["gate"]["passed"]
        assert result["gate"]["error"] <= result["gate"]["bound"]
        assert result["pairs"] == 2
        for name in ("ours", "sdpa", "ratio"):
            assert 0 < result[name]["p10"] <= result[name]["median"] <= result[name]["p90"]
        if result["pass"] != "decode" and result["length"] > 64:
            assert result["naive"] == {"absent": ">64"}
        else:
            assert 0 < result["naive"]["ratio"]["p10"] <= result["naive"]["ratio"]["p90"]
    table = printed.splitlines()
    assert sum(line.startswith(("sqeuclidean", "l1")) for line in table) == len(report["results"])
    assert "naive (cdist + softmax + matmul) is not run above length 64" in printed
    assert "SDPA ms" in printed


def test_provenance_names_versions_and_machine():
    found = provenance("cpu")
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    for name in ("transformers", "python", "system", "cpu", "device", "date"):
        assert found[name]
    assert (found["commit"] is None) == (found["dirty"] is None)
    json.dumps(found, allow_nan=False)


def test_a_run_where_nothing_can_run_fails(tmp_path):
    report, _ = run(tmp_path, metrics="l1", backends="sdpa", passes="decode")
    assert [result["status"] for result in report["results"]] == ["skipped"]
    assert module.exit_code(report) == 1


def test_a_case_that_fails_does_not_end_the_run(monkeypatch, tmp_path):
    def out_of_memory(output, inputs):
        if output.shape[-2] == 100:
            raise RuntimeError("not enough memory\nand details")
        return output

    wrong_backend(monkeypatch, out_of_memory)
    report, printed = run(tmp_path, lengths="100,64", passes="forward")
    assert [result["status"] for result in report["results"]] == ["failed", "ok"]
    assert "FAILED: RuntimeError: not enough memory\n" in printed
    assert "ours" not in report["results"][0]
    assert module.exit_code(report) == 1


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    cases = []

    def interrupted(self, case, name):
        cases.append(case)
        if len(cases) == 3:
            raise KeyboardInterrupt
        return row(self, case, name)

    row = ExactBenchmark.row
    monkeypatch.setattr(ExactBenchmark, "row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, passes="decode", decode_lengths="32,48,64")
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert not report["complete"]
    assert [result["length"] for result in report["results"]] == [32, 48]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["benchmark.json"]


def test_a_full_folder_is_not_written_into(tmp_path):
    options = {"passes": "decode", "metrics": "sqeuclidean"}
    run(tmp_path, **options)
    with pytest.raises(ValueError, match="exists and is not empty; pass --overwrite"):
        run(tmp_path, **options)
    run_benchmark(config(tmp_path, **options), overwrite=True, echo=lambda line: None)


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    path = tmp_path / "benchmark.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_are_set_for_the_run_alone(tmp_path):
    before = torch.get_num_threads()
    report, _ = run(tmp_path, passes="decode", threads=before + 1)
    assert report["provenance"]["threads"] == before + 1
    assert torch.get_num_threads() == before


# Plots --------------------------------------------------------------------------------------------------------------


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    options = {"passes": "forward,decode", "lengths": "64,128", "causal": "both", "naive": True, "plot": True}
    report, printed = run(tmp_path, metrics="sqeuclidean,cosine", **options)
    for result in report["results"]:
        result["memory"] = {"ours": 2.0, "sdpa": 1.0, "naive": "failed", "ratio": 2.0}
    names = [f"benchmark-float32-d8-{kind}-auto" for kind in ("full", "causal")]
    starts = {".png": b"\x89PNG\r\n", ".svg": b"<?xml"}
    for folder in (tmp_path / "out", tmp_path / "again"):
        if not folder.exists():
            folder.mkdir()
            plot_results(report, folder)
        for name in names:
            for ending, start in starts.items():
                content = (folder / (name + ending)).read_bytes()
                assert content.startswith(start)
                assert len(content) > 5000
    assert all(f"{name}.png" in printed for name in names)


def test_without_matplotlib_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'distattn_hf\[viz\]', or pass --no-plot"):
        run(tmp_path, plot=True)
    assert not (tmp_path / "out").exists()


# Time and memory ----------------------------------------------------------------------------------------------------


def test_pairs_are_interleaved_in_random_order_and_divided(monkeypatch):
    """With a clock that says 2 s and 3 s a call, while the machine gets slower and slower."""
    asked = []

    def sample(call, calls, device):
        asked.append(call())
        return {"first": 2.0, "second": 3.0}[asked[-1]] * (1 + len(asked) // 2)

    monkeypatch.setattr(measure, "_sample", sample)
    found = measure.time_pair(
        lambda: "first", lambda: "second", "cpu", repeats=40, warmup=1, min_seconds=0, max_seconds=math.inf
    )
    pairs = list(zip(asked[2::2], asked[3::2]))
    assert found["pairs"] == len(pairs) == 40
    assert set(pairs) == {("first", "second"), ("second", "first")}
    assert found["ratio"]["median"] == pytest.approx(1.5, rel=0.05)
    assert found["first"]["p10"] < found["first"]["median"] < found["first"]["p90"]


def test_limits_of_time_end_the_sampling():
    limits = {"repeats": 1000, "warmup": 3, "min_seconds": 0}
    found = measure.time_pair(lambda: None, lambda: None, "cpu", max_seconds=0, **limits)
    assert found["pairs"] == 1
    assert found["first"]["p10"] == found["first"]["p90"]


def test_short_calls_are_repeated_within_a_sample():
    assert measure._warm_up(lambda: None, "cpu", 1, math.inf) > 100


def test_spread():
    found = measure.spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == {"median": 3.0, "p10": pytest.approx(1.4), "p90": pytest.approx(4.6)}


def test_memory_sees_a_quadratic_tensor(tmp_path):
    """The reference holds the weights (2 heads · 2048² · 4 bytes = 33.6 MB), PyTorch's attention does not."""
    options = {"metrics": "cosine", "passes": "forward", "lengths": 2048, "head_sizes": 4, "backends": "reference"}
    (case,) = config(tmp_path, **options).cases()
    weights = case.heads * case.length**2 * 4 / 1e6
    with measure.MemoryProbe(ExactBenchmark, threads=1) as probe:
        reference, sdpa, naive = (probe.measure(case, who) for who in ("ours", "sdpa", "naive"))
        assert reference > weights
        assert naive > weights
        assert 0 <= sdpa < weights / 3
        # A doubled batch doubles it; and what was measured before leaves no trace.
        assert probe.measure(replace(case, batch=2), "ours") > 2 * weights
        unknown = probe.measure(replace(case, metric="of_my_own"), "ours")
        assert unknown.startswith("ValueError: unknown metric 'of_my_own'")
        assert probe.measure(replace(case, seed=1), "sdpa") < weights / 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_counts_the_output(dtype, tmp_path):
    """Also where making the inputs has left freed memory behind, in which it would find room."""
    (case,) = config(tmp_path, passes="forward", lengths=1024, heads=12, head_sizes=64, dtypes=dtype).cases()
    output = 12 * 1024 * 64 * {"float32": 4, "bfloat16": 2}[dtype] / 1e6
    with measure.MemoryProbe(ExactBenchmark, threads=1) as probe:
        for who in ("ours", "sdpa"):
            assert probe.measure(case, who) > 0.95 * output


def test_memory_is_in_the_report(tmp_path):
    report, printed = run(tmp_path, lengths=512, passes="forward", metrics="sqeuclidean", memory=True, head_sizes=64)
    memory = report["results"][0]["memory"]
    # The output alone has 2 heads · 512 · 64 · 4 bytes = 0.26 MB.
    assert memory["ours"] > 0.2
    assert memory["sdpa"] > 0.2
    assert memory["naive"] is None
    assert (memory["ratio"] is None) == (memory["sdpa"] < LEAST_MEGABYTES)
    assert f"{memory['ours']:.1f}" in printed.splitlines()[-2]


def test_a_measuring_process_that_ends_is_reported(tmp_path):
    """Also to later cases; and leaving raises nothing."""
    first, second = config(tmp_path, passes="decode", decode_lengths="32,48").cases()
    with measure.MemoryProbe(ExactBenchmark, threads=1) as probe:
        assert isinstance(probe.measure(first, "ours"), float)
        probe._process.kill()
        probe._process.wait()
        assert [probe.measure(second, who) for who in ("ours", "sdpa")] == 2 * ["the measuring process ended"]


def test_cases_travel_as_json(tmp_path):
    for case in config(tmp_path, metrics="lp3,l2", passes=list(PASSES)).cases():
        assert type(case)(**json.loads(json.dumps(asdict(case)))) == case


@pytest.mark.parametrize(("pass_name", "queries"), [("forward", 100), ("forward_backward", 100), ("decode", 1)])
def test_tokens_are_queries(pass_name, queries):
    """Of all sequences; a step of decoding has one query each, however many keys it sees."""
    case = SimpleNamespace(batch=3, length=100, pass_name=pass_name)
    for times in ("ours", "seconds"):
        assert module.with_tokens({times: {"median": 0.5}}, case)["tokens_per_second"] == 3 * queries / 0.5
