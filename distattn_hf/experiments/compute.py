"""What attention costs from 512 to 32,768 tokens (phase 3 of the research plan): exact distances, retrieval, Nyström.

Each is timed in pairs with PyTorch's scaled_dot_product_attention of the same shape, the halves of a pair one after the
other, so that other work on the machine meets both. Before that it is compared with a formula, and a wrong result ends
the run. Exact distances and retrieval also take one query against so many cached keys ("decode"). Other packages'
linear attention (`peers` of `distattn benchmark --mechanism nystrom`) has no causal form and sees both sides, as does
SDPA beside it. Linear attention has the error of its outputs beside its time: it is another function.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..analysis.figure_style import COLOURS, INK, new_figure, save_figure, styled
from ..benchmark.exact_options import BenchmarkConfig, parse_metric
from ..benchmark.nystrom_inputs import KINDS, error_rows, exact_rows, make_inputs, relative_error
from ..benchmark.nystrom_options import PEERS, NystromConfig
from ..benchmark.run import Unavailable
from ..benchmark.run_exact import ExactBenchmark
from ..benchmark.run_nystrom import NystromBenchmark, competitor, gate
from ..core.retrieval import Search
from . import retrieval_speed

OTHERS = ("retrieval", "nystrom", *PEERS)
PASSES = ("forward", "decode")
# Landmarks of which nothing is fitted: time does not depend on which they are.
STRATEGY = "segment_means"
# Why linear attention has no row for one token after a text: of other packages', of Nyström's.
_NO_STEP = (
    "it has no causal form",
    "a step goes on from a state inside a model's cache; distattn experiment native_decoding and model_speed time that",
)
AXES = ("attentions", "passes", "lengths")


@dataclass(frozen=True)
class Options:
    """attentions: metrics, as "l2" or "lp3", retrieval, nystrom, and other packages' transformers, nystrom-attention,
    performer, which are left out where they are not installed. passes: forward (a text is read), decode (one token
    after it; of metrics and retrieval). lengths: tokens.

    heads: of 64 numbers each; batch 1, float32. landmarks: of nystrom, and as many features of others. pairs: timed at
    least. seconds: of a row, after which no pair is begun. seed: of the inputs.
    """

    attentions: tuple[str, ...] = ("sqeuclidean", "cosine", "l2", "l1", *OTHERS)
    passes: tuple[str, ...] = PASSES
    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    heads: int = 8
    landmarks: int = 64
    pairs: int = 5
    seconds: float = 120.0
    seed: int = 0

    def __post_init__(self):
        for name in self.attentions:
            if name not in OTHERS:
                parse_metric(name)
        if not self.passes or not set(self.passes) <= set(PASSES):
            raise ValueError(f"passes must be some of {', '.join(PASSES)}, got {', '.join(self.passes) or 'none'}")
        for name in ("lengths", "heads", "landmarks", "pairs"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{name} must be >= 1, got {value!r}")

    @property
    def limits(self) -> dict:
        """What `time_pair` is given, as the benchmarks' options call it."""
        return {"repeats": self.pairs, "max_seconds": self.seconds, "min_seconds": 0.0, "warmup": 1, "seed": self.seed}


QUICK = {
    "attentions": ("l2", "retrieval", "nystrom"), "lengths": (64, 128), "heads": 2, "landmarks": 8, "pairs": 1,
    "seconds": 1.0,
}  # fmt: skip


def run(options: Options, results) -> None:
    """Measure a row for each length, attention and pass."""
    if "retrieval" in options.attentions:
        retrieval_speed.check()
    absent = {}
    for length in options.lengths:
        for attention in options.attentions:
            for pass_name in options.passes:
                is_linear = attention in OTHERS and attention != "retrieval"
                if attention in absent:
                    continue
                if is_linear and pass_name == "decode":
                    if length == options.lengths[0]:
                        results.echo(f"left out: {attention}, decode: {_NO_STEP[attention == 'nystrom']}")
                    continue
                key = {"attention": attention, "pass": pass_name, "length": length}
                try:
                    results.row(key, lambda k=key: _measure(options, *k.values()))
                except Unavailable as reason:
                    # No row: once it is installed, the same command measures it.
                    absent[attention] = reason
                    results.echo(f"left out: {attention}: {reason}")


def _measure(options: Options, attention: str, pass_name: str, length: int) -> dict:
    """Return seconds of ours and of SDPA, and their ratio within pairs: above 1 ours is faster."""
    if attention == "retrieval":
        return _retrieval(options, length)[pass_name]
    if attention in OTHERS:
        return _linear(options, attention, length)
    return _exact(options, attention, pass_name, length)


def _exact(options: Options, metric: str, pass_name: str, length: int) -> dict:
    config = BenchmarkConfig(
        metrics=(metric,), passes=(pass_name,), lengths=(length,), decode_lengths=(length,), heads=options.heads,
        causal=True, memory=False, naive=False, **options.limits,
    )  # fmt: skip
    (case,) = config.cases()
    row = ExactBenchmark(config).row(case, "ours")
    if row["status"] != "ok":
        why = row.get("reason", row.get("gate"))
        raise RuntimeError(f"{metric}, {pass_name} of {length} tokens: {row['status']}: {why}")
    return {
        "causal": True,
        "seconds": row["ours"]["median"],
        "sdpa_seconds": row["sdpa"]["median"],
        "ratio": 1 / row["ratio"]["median"],
        "backend": row["ran"],
    }


@lru_cache(maxsize=1)
def _retrieval(options: Options, length: int) -> dict:
    # Of random keys none has a weight by which it would be read: by number.
    search = Search(num_blocks=16, min_weight=0.0)
    measure = retrieval_speed.measured(length, options.heads, options.heads, search, options.pairs)
    rows = {}
    for pass_name, job in (("forward", "prefill"), ("decode", "step")):
        found = measure(job)
        rows[pass_name] = {"causal": True, "backend": "cpp"}
        rows[pass_name] |= {name: found[name] for name in ("seconds", "sdpa_seconds", "ratio")}
    return rows


def _linear(options: Options, name: str, length: int) -> dict:
    is_ours = name == "nystrom"
    config = NystromConfig(
        lengths=(length,), causal=is_ours, strategies=(STRATEGY,), num_landmarks=options.landmarks,
        heads=options.heads, memory=False, **options.limits,
    )  # fmt: skip
    (case,), name = config.cases(), f"ours:{STRATEGY}" if is_ours else name
    if is_ours and not (verdict := gate(case, STRATEGY))["passed"]:
        raise RuntimeError(f"nystrom of {length} tokens is not its formula: {verdict}")
    pair = NystromBenchmark(config).time(NystromBenchmark.call(case, name), NystromBenchmark.call(case, "sdpa"))
    values = {
        "causal": is_ours,
        "seconds": pair["first"]["median"],
        "sdpa_seconds": pair["second"]["median"],
        "ratio": pair["ratio"]["median"],
    }
    for kind in KINDS:
        tensors, rows = make_inputs(case, kind), error_rows(case)
        prepare, attention = competitor(case, name, kind)
        with torch.no_grad():
            output = attention(*prepare(*tensors))[:, :, rows]
        values[f"error_{kind}"] = relative_error(output, exact_rows(case, *tensors, rows))
    return values


@styled
def figures(results, folder) -> list:
    """Draw seconds against length for each pass, a line for each attention, and SDPA's in black."""
    paths = []
    for pass_name in dict.fromkeys(row["pass"] for row in results.rows):
        rows = [row for row in results.rows if row["pass"] == pass_name]
        figure = new_figure(6, 4)
        axes = figure.subplots()
        sdpa = {row["length"]: row["sdpa_seconds"] for row in rows if row["causal"]}
        axes.plot(*zip(*sorted(sdpa.items())), color=INK, marker=".", label="SDPA, causal")
        for number, attention in enumerate(dict.fromkeys(row["attention"] for row in rows)):
            own = sorted((row["length"], row["seconds"]) for row in rows if row["attention"] == attention)
            style = ("-", "--")[number // len(COLOURS) % 2]
            axes.plot(*zip(*own), style, color=COLOURS[number % len(COLOURS)], marker=".", label=attention)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"seconds, {pass_name}")
        lengths = sorted({row["length"] for row in rows})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=7)
        paths += save_figure(figure, folder / f"compute_{pass_name}")
    return paths
