"""Timings of the GPU check: attention beside PyTorch's flash kernel, and whole models beside the unconverted one."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core import nystrom_hybrid as hybrid
from ..core.attention_spec import AttentionSpec
from ..functional import nystrom
from ..storage.models import load_checkpoint
from . import nystrom_inputs
from .exact_check import backend_of, check_rows, make_tensors, one_call, our_attention
from .exact_options import Case
from .gpu_check_retrieval import retrieval_timing
from .measure import peak_megabytes, time_pair
from .nystrom_options import NystromCase
from .run import summary
from .run_nystrom import our_attention as our_nystrom

DTYPE = "bfloat16"
CHECKPOINT = "smollm2-135m"
# Query rows of Nyström attention that are checked at the timed length, and their largest error relative to the largest
# entry: half precision rounds what goes in and what comes out.
_CHECKED_ROWS, _NYSTROM_BOUND = 16, 2e-2
_PAIRS, _MIN_SECONDS, _MAX_SECONDS = 10, 0.2, 3.0
PREFILL_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 2048, 512, 32

DEFINITIONS = {
    "peer": "seconds a call of scaled_dot_product_attention with the flash kernel alone allowed (on the CPU: any); for "
    "models: the untouched one",
    "ours": "seconds a call of this package on the same tensors, run back to back with the peer in random order, by "
    "events on the stream; median, 10th and 90th percentile over the pairs",
    "ratio": "ours / peer within a pair: below 1 is faster",
    "megabytes": "10^6 bytes at the peak of one call above what was there before: torch.cuda.max_memory_allocated",
    "check": "before timing, some query rows at the timed shape against float64 (exact: as in `distattn benchmark`)",
    "part_entries": "numbers that Nyström and retrieval attention work on at a time; null: as it comes, for a CPU",
    "coordinates_per_second": "of exact metrics forward: coordinates of all pairs of query and key, a second; l1 and "
    "chebyshev take two operations for each that no product of matrices does",
    "target": "what the ratio is to be at most, where something was aimed at",
}
# The times that exact metrics are to have, beside flash attention's.
_OF_EXACT = {"sqeuclidean": 1 / 0.9, "cosine": 1 / 0.9, "l2": 1 / 0.6}
# And others at 64k.
_OF_LONG = {("nystrom", "forward"): 1 / 5, ("retrieval", "forward"): 1 / 3, ("retrieval", "decode"): 1 / 10}


@dataclass(frozen=True)
class Timing:
    """One pair to time. `kind`: "exact", "retrieval", "nystrom" or "model"; `pass_name`: "forward", "forward_backward",
    "decode", and for models "prefill" or "generate"; `metric` is a model's spec there.
    """

    kind: str
    metric: str
    pass_name: str
    length: int
    p: float | None = None
    backend: str = "auto"
    causal: bool = True
    batch: int = 1
    heads: int = 16
    key_heads: int = 16
    head_size: int = 64
    part_entries: int | None = None

    @property
    def name(self) -> str:
        """A unique name in one line."""
        words = [
            self.kind,
            self.metric if self.p is None else f"{self.metric}{self.p:g}",
            self.pass_name,
            str(self.length),
            None if self.causal or self.pass_name == "decode" else "full",
            None if self.backend == "auto" else self.backend,
            None if self.part_entries is None else f"parts of {self.part_entries}",
        ]
        return " ".join(word for word in words if word)

    @property
    def target(self) -> float | None:
        """The ratio to flash attention's time that was aimed at, at most; None: nothing was."""
        if self.kind == "exact" and self.pass_name != "decode":
            return _OF_EXACT.get(self.metric)
        if self.length >= 65536:
            return _OF_LONG.get((self.kind, self.pass_name))
        return None

    def work(self) -> float:
        """Return the work that a call's time is proportional to, for one kind, metric, pass and backend."""
        linear = self.pass_name == "decode" or self.kind != "exact"
        return self.batch * self.heads * float(self.length) ** (1 if linear else 2)


def timings(device: str) -> list[Timing]:
    """Return all timings, shortest first within each group, so that long ones can be predicted."""
    if device == "cpu":  # Only checks that the code runs; the times say nothing about a GPU.
        return [
            Timing("exact", "sqeuclidean", "forward", 64, heads=2, key_heads=2),
            Timing("retrieval", "", "forward", 512, heads=2, key_heads=2),
            Timing("retrieval", "", "decode", 512, heads=2, key_heads=2),
            Timing("nystrom", "", "forward", 256, heads=2, key_heads=2),
        ]
    exact = [("l2", None), ("l1", None), ("chebyshev", None), ("lp", 3.0), ("sqeuclidean", None), ("cosine", None)]
    result = []
    for pass_name in ("forward", "forward_backward"):
        # Fewer heads fill the GPU at long lengths.
        for length, heads in ((2048, 16), (8192, 16), (32768, 4)):
            for metric, p in exact:
                result.append(Timing("exact", metric, pass_name, length, p, heads=heads, key_heads=heads))
    for length in (4096, 32768):
        for metric, p in exact:
            result.append(Timing("exact", metric, "decode", length, p, batch=4, key_heads=4))
        for metric, p in exact[:3]:
            result.append(Timing("exact", metric, "decode", length, p, backend="chunked", batch=4, key_heads=4))
    shape = {"heads": 8, "key_heads": 8}
    # The CPU's size of parts takes a GPU one query at a time at 64k.
    for pass_name in ("decode", "forward"):
        for length, entries in ((16384, None), (16384, 2**28), (65536, 2**28)):
            result.append(Timing("retrieval", "", pass_name, length, part_entries=entries, **shape))
    for length in (16384, 32768, 65536):
        for entries in (None, 2**25):
            result.append(Timing("nystrom", "", "forward", length, part_entries=entries, **shape))
        result.append(Timing("nystrom", "", "forward", length, causal=False, **shape))
    for entries in (None, 2**25):
        result.append(Timing("nystrom", "", "forward_backward", 16384, part_entries=entries, **shape))
    for metric in ("sqeuclidean exact", "l2", "l1", "retrieval", "nystrom"):
        result.append(Timing("model", metric, "prefill", PREFILL_TOKENS))
        result.append(Timing("model", metric, "generate", PROMPT_TOKENS))
    return result


def measure(timing: Timing, device: str) -> dict:
    """Return {"status", "check", "peer", "ours", "ratio", "pairs", "megabytes", ...}; a wrong result is not timed."""
    torch.set_float32_matmul_precision("highest")
    makers = {"exact": _exact, "retrieval": _retrieval, "nystrom": _nystrom, "model": _model}
    ours, peer, about = makers[timing.kind](timing, device)
    if (target := timing.target) is not None:
        about["target"] = target
    if not about["check"].get("passed", True):
        return {"status": "wrong", **about}
    megabytes = {"ours": peak_megabytes(ours, device), "peer": peak_megabytes(peer, device)} if device == "cuda" else {}
    times = time_pair(peer, ours, device, repeats=_PAIRS, warmup=2, min_seconds=_MIN_SECONDS, max_seconds=_MAX_SECONDS)
    return {
        "status": "ok", **about, **_pace(timing, times["second"]["median"]),
        "peer": times["first"], "ours": times["second"], "ratio": times["ratio"],
        "pairs": times["pairs"], "megabytes": megabytes,
    }  # fmt: skip


def _pace(timing: Timing, seconds: float) -> dict:
    if timing.kind != "exact" or timing.pass_name != "forward":
        return {}
    pairs = timing.batch * timing.heads * timing.length**2 / (2 if timing.causal else 1)
    return {"coordinates_per_second": pairs * timing.head_size / seconds}


def _flash(device: str, causal: bool) -> Callable:
    def attention(query, key, value):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if device == "cuda" else nullcontext():
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
            )

    return attention


def _exact(timing: Timing, device: str) -> tuple[Callable, Callable, dict]:
    case = Case(
        timing.metric, timing.p, timing.backend, timing.pass_name, timing.length, timing.head_size, DTYPE,
        timing.causal and timing.pass_name != "decode", timing.batch, timing.heads, timing.key_heads, device, 0,
    )  # fmt: skip
    tensors = make_tensors(case)
    attention = our_attention(case)
    about = {"backend": backend_of(case, tensors), "check": summary(check_rows(case, attention, tensors))}
    return one_call(case, attention, tensors), one_call(case, _flash(device, case.causal), tensors), about


def _retrieval(timing: Timing, device: str) -> tuple[Callable, Callable, dict]:
    return retrieval_timing(timing, device, getattr(torch, DTYPE), _flash(device, timing.pass_name == "forward"))


def _nystrom(timing: Timing, device: str) -> tuple[Callable, Callable, dict]:
    """Prepare lifted attention with the defaults of `AttentionSpec`: causal with window and sinks, else landmarks."""
    spec = AttentionSpec(mechanism="nystrom")
    case = NystromCase(
        timing.causal, timing.pass_name, timing.length, timing.batch, timing.heads, timing.head_size,
        spec.num_landmarks, spec.window_size, spec.num_sinks, device, 0,
    )  # fmt: skip
    strategy = "segment_means"
    landmarks = nystrom_inputs.fixed_landmarks(case, "clustered", strategy).to(device) if case.causal else None
    tensors = [tensor.to(getattr(torch, DTYPE)) for tensor in nystrom_inputs.make_inputs(case, "clustered")]
    function = our_nystrom(case, strategy, landmarks)

    def attention(query, key, value):
        with _parts(timing.part_entries):
            return function(query, key, value)

    rows = torch.randperm(case.length, generator=torch.Generator().manual_seed(0))[:_CHECKED_ROWS].to(device)
    with torch.no_grad():
        actual = attention(*tensors)[:, :, rows].double()
        truth = nystrom_inputs.oracle(case, *tensors, strategy, landmarks, rows)
    error = float((actual - truth).abs().amax() / truth.abs().amax())
    check = {"passed": error <= _NYSTROM_BOUND, "error": error if error == error else "nan", "bound": _NYSTROM_BOUND}
    backward = timing.pass_name == "forward_backward"
    leaves = [tensor.requires_grad_(backward) for tensor in tensors]
    tensors = *leaves, torch.ones_like(leaves[0])
    return one_call(case, attention, tensors), one_call(case, _flash(device, case.causal), tensors), {"check": check}


@contextmanager
def _parts(entries: int | None):
    """Set the part size of Nyström attention within the context, to test whether another suits a GPU better."""
    if entries is None:
        yield
        return
    with mock.patch.object(nystrom, "_PART_ENTRIES", entries), mock.patch.object(hybrid, "_PART_ENTRIES", entries):
        yield


@cache
def _teacher(device: str) -> tuple[LlamaForCausalLM, str]:
    """Return SmolLM2, or a random model of its shape where its weights are not installed, and which of them it is."""
    try:
        model, about = load_checkpoint(CHECKPOINT)[0], CHECKPOINT
    except (ValueError, ImportError) as error:
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.041666,
        )  # fmt: skip
        torch.manual_seed(0)
        model, about = LlamaForCausalLM(config).eval(), f"random weights in its shape ({str(error).splitlines()[0]})"
    return model.to(device, torch.bfloat16), about


@cache
def _student(metric: str, device: str):
    teacher, _ = _teacher(device)
    if metric == "nystrom":
        ids = torch.randint(100, 40000, (2, 512), generator=torch.Generator().manual_seed(1))
        # Speed does not depend on the quality of the fit.
        options = CalibrationOptions(steps=2, sequences=1, progress=False)
        spec = AttentionSpec(mechanism="nystrom")
        return convert(teacher, spec, calibration=[{"input_ids": ids.to(device)}], options=options).eval()
    if metric == "retrieval":
        return convert(teacher, metric).eval()
    name, _, init = metric.partition(" ")
    return convert(teacher, AttentionSpec(name), init=init or "plain").eval()


def _model(timing: Timing, device: str) -> tuple[Callable, Callable, dict]:
    teacher, about = _teacher(device)
    student = _student(timing.metric, device)
    ids = torch.randint(100, 40000, (1, timing.length), generator=torch.Generator().manual_seed(0)).to(device)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def call(model):
        with torch.no_grad():
            if timing.pass_name == "prefill":
                return model(ids, use_cache=True, logits_to_keep=1).logits
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    result = {"model": about, "check": {}}
    if timing.pass_name == "prefill":
        ours, peer = call(student).float(), call(teacher).float()
        result["difference_to_untouched"] = float((ours - peer).norm() / peer.norm())
        result["check"] = {"passed": bool(ours.isfinite().all())}
    return lambda: call(student), lambda: call(teacher), result
