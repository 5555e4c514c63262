"""Does it work on this machine: formulas, gradients, extreme inputs, masks, mechanisms, saving and speed, in a minute.

`distattn check`, or `DistanceAttentionTester(TestConfig(...)).run_all_tests()`.
"""

import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ..core.attention import distance_attention
from ..core.backends import BACKENDS, explain_backend
from ..core.compatibility import CACHE_NAME, cache_of
from ..core.configuration_native import DistAttnConfig
from ..core.mechanisms import MECHANISMS
from ..core.metrics import get_metric
from ..core.modeling_distattn import DistAttnForCausalLM, DistAttnForMaskedLM
from ..data.config import is_integer
from .exact_options import DTYPES
from .gpu_check_cases import Case, small_model
from .gpu_check_cases import check as check_case
from .measure import one_line, only_errors, peak_megabytes, ratio_with_spread, time_pair
from .results import provenance
from .self_check_results import Check

METRICS = (("sqeuclidean", None), ("l2", None), ("l1", None), ("lp", 3.0), ("cosine", None), ("chebyshev", None))
CONVERTED = ("sqeuclidean exact", "l2", "l1", "cosine", "nystrom", "retrieval", "retrieval l2")
# Tokens of the timed calls, how many pairs, and seconds at most.
SPEED_TOKENS, SPEED_PAIRS, SPEED_SECONDS = 1024, 5, 4.0


@dataclass(frozen=True)
class TestConfig:
    """Sizes of the checks.

    Args:
        batch_size, seq_len, hidden_size, num_heads: of the inputs; each head has hidden_size / num_heads.
        device: "cpu" or "cuda"; None: the GPU where there is one.

    Raises:
        ValueError: for sizes below 1 (seq_len: 8), heads that do not divide hidden_size, or a device that is not there.
    """

    __test__ = False  # pytest: no test class

    batch_size: int = 2
    seq_len: int = 67
    hidden_size: int = 64
    num_heads: int = 4
    device: str | None = None

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("seq_len", 8), ("hidden_size", 2), ("num_heads", 1)):
            if not is_integer(value := getattr(self, name), least):
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")
        available = torch.cuda.is_available()
        if self.device is None:
            object.__setattr__(self, "device", "cuda" if available else "cpu")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.device == "cuda" and not available:
            raise ValueError("device 'cuda' is not there: torch.cuda.is_available() is False")


class DistanceAttentionTester:
    """Checks of this machine, each group a method that returns its `Check`s; `run_all_tests` runs all.

    A check that raises has failed, with the error as its note.
    """

    __test__ = False

    def __init__(self, config: TestConfig | None = None):
        self.config = config or TestConfig()

    def run_all_tests(self, echo: Callable[[Check], None] | None = None) -> dict:
        """Run every group; return {"summary", "checks", "provenance"}, which is JSON.

        summary: total, passed, failed, success_rate (0 to 1) and seconds. echo: called with each `Check` as it is done.
        """
        started, checks = time.monotonic(), []
        for group in (
            self.test_backends, self.test_formula, self.test_gradient_flow, self.test_numerical_stability,
            self.test_masks, self.test_mechanisms, self.test_conversions, self.test_save_and_reload, self.test_speed,
        ):  # fmt: skip
            for check in group():
                checks.append(check)
                if echo is not None:
                    echo(check)
        asked = [check for check in checks if check.passed is not None]
        passed = sum(check.passed for check in asked)
        return {
            "summary": {
                "total": len(asked),
                "passed": passed,
                "failed": len(asked) - passed,
                "success_rate": passed / len(asked),
                "seconds": round(time.monotonic() - started, 1),
            },
            "checks": [vars(check) for check in checks],
            "provenance": provenance(self.config.device),
        }

    # ------------------------------------------------------------------------------------------------ groups

    def test_backends(self) -> list[Check]:
        """Say for each metric which backend runs it here, forward with gradient, and why none before it does."""
        checks = []
        for metric, p in METRICS:

            def explained(metric=metric, p=p):
                choice = explain_backend(
                    metric=metric, p=p, num_queries=self.config.seq_len, requires_grad=True, device=self.config.device
                )
                earlier = list(itertools.takewhile(lambda name: name != choice.backend, BACKENDS))
                said = "; ".join(f"{name}: {choice.reasons[name]}" for name in earlier)
                return {"passed": None, "note": choice.backend + (f" ({said})" if said else "")}

            checks.append(self._try("runs by", _label(metric, p), explained))
        return checks

    def test_formula(self) -> list[Check]:
        """Compare each metric, and softmax(-λ·dist)·v, with loops over single numbers in float64."""
        return [self._try("formula", _label(*m), lambda m=m: self._against_loops(*m)) for m in METRICS]

    def test_gradient_flow(self) -> list[Check]:
        """Compare output and gradients of each backend that runs here with the formula in float64, by dtype."""
        return [
            self._try("kernels", case.name, lambda c=case: check_case(c, self.config.device)) for case in self._cases()
        ]

    def test_numerical_stability(self) -> list[Check]:
        """Feed huge, tiny, equal and zero inputs: outputs stay between the values, gradients finite."""
        return [
            self._try("stability", f"{_label(*metric)} {dtype}", lambda m=metric, d=dtype: self._extreme(*m, d))
            for metric in METRICS
            for dtype in ("float32", "bfloat16")
        ]

    def test_masks(self) -> list[Check]:
        """Change what is hidden: nothing else may change, bit for bit; a row that sees nothing is zero."""
        return [self._try("masks", _label(*m), lambda m=m: self._hidden(*m)) for m in METRICS]

    def test_mechanisms(self) -> list[Check]:
        """Run each mechanism of the native family: no look ahead, steps with a cache as one forward, all trains."""
        names = ["dot", "distance", "nystrom", "retrieval", *MECHANISMS]
        return [self._try("mechanisms", name, lambda n=name: self._mechanism(n)) for name in names]

    def test_conversions(self) -> list[Check]:
        """Compare small converted models with eager attention in float64, also in generation."""
        size = {"heads": 4, "key_heads": 2, "batch": 2}
        cases = [Case("model", kind, "float32", 40, 40, 16, causal=True, backward=False, **size) for kind in CONVERTED]
        return [self._try("conversions", c.metric, lambda c=c: check_case(c, self.config.device)) for c in cases]

    def test_save_and_reload(self) -> list[Check]:
        """Save converted and native models and load them again: the same numbers, bit for bit."""
        made = {"native l1": lambda: self._native("l1"), **{k: lambda k=k: small_model(k) for k in ("l2", "retrieval")}}
        return [self._try("save and reload", name, lambda m=make: self._reloaded(m())) for name, make in made.items()]

    def test_speed(self) -> list[Check]:
        """Time each metric beside PyTorch's attention, forward and backward; nothing is asked of it."""
        return [self._try("speed", _label(*m), lambda m=m: self._speed(*m)) for m in METRICS]

    # ------------------------------------------------------------------------------------------------ how

    def _try(self, group: str, name: str, check: Callable[[], dict]) -> Check:
        try:
            with only_errors("transformers", "distattn_hf"), warnings.catch_warnings(action="ignore"):
                found = check()
        except Exception as error:  # whatever it is: it is what this check found
            return Check(group, name, False, note=f"{type(error).__name__}: {one_line(error)}")
        known = {key: found[key] for key in ("passed", "error", "bound", "note", "failures") if key in found}
        return Check(group, name, **known)

    def _cases(self) -> Iterator[Case]:
        config = self.config
        sizes = {"heads": config.num_heads, "key_heads": config.num_heads, "batch": config.batch_size}
        length, size = config.seq_len, config.hidden_size // config.num_heads
        for (metric, p), dtype in itertools.product(METRICS, ("float32", "bfloat16")):
            for options in ({"causal": True}, {"mask": "padding"}):
                asked = {"metric": metric, "p": p, "num_queries": length, "dtype": DTYPES[dtype], "requires_grad": True}
                choice = explain_backend(**asked, device=config.device, is_causal=options.get("causal", False))
                yield Case(choice.backend, metric, dtype, length, length, size, p=p, **options, **sizes)
            asked = {"metric": metric, "p": p, "num_queries": 1, "num_keys": length, "dtype": DTYPES[dtype]}
            choice = explain_backend(**asked, device=config.device)
            yield Case(choice.backend, metric, dtype, 1, length, size, p=p, backward=False, **sizes)
            if get_metric(metric).softens and dtype == "float32":
                asked = {"metric": metric, "p": p, "num_queries": length, "requires_grad": True, "softening": 3.0}
                choice = explain_backend(**asked, device=config.device, is_causal=True)
                softened = {"causal": True, "softening": 3.0}
                yield Case(choice.backend, metric, dtype, length, length, size, p=p, **softened, **sizes)
        for causal in (True, False):
            near = {"causal": causal, "window": 9, "sinks": 3}
            yield Case("nystrom", "sqeuclidean", "float32", length, length, size, **near, **sizes)

    def _draw(self, *lengths: int, dtype=torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
        """Draw a tensor (B, H, length, d) for each length, the same in every run."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        shape = config.batch_size, config.num_heads
        size = config.hidden_size // config.num_heads
        drawn = [scale * torch.randn(*shape, length, size, generator=generator) for length in lengths]
        return [tensor.to(config.device, dtype) for tensor in drawn]

    def _against_loops(self, metric: str, p: float | None) -> dict:
        query, key, value = (t[:1, :1, :, :6].cpu().double() for t in self._draw(5, 7, 7))
        weights = torch.zeros(5, 7, dtype=torch.float64)
        for i, j in itertools.product(range(5), range(7)):
            weights[i, j] = -0.7 * _by_numbers(metric, p, query[0, 0, i].tolist(), key[0, 0, j].tolist())
        truth = weights.softmax(-1) @ value[0, 0]
        tensors = [t.float().to(self.config.device) for t in (query, key, value)]
        output = distance_attention(*tensors, metric=metric, p=p, lam=0.7, scaling=1.0)
        return _judged((output[0, 0].cpu() - truth).abs().max(), 1e-5)

    def _extreme(self, metric: str, p: float | None, dtype: str) -> dict:
        worst, length = 0.0, self.config.seq_len
        for scale in (0.0, 1e-6, 1.0, 1e3):
            query, key, value = self._draw(length, length, length, dtype=DTYPES[dtype], scale=scale)
            value = self._draw(length, dtype=DTYPES[dtype])[0]
            leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
            output = distance_attention(*leaves, metric=metric, p=p)
            output.float().square().sum().backward()
            for name, tensor in zip(("output", "query", "key", "value"), (output, *(leaf.grad for leaf in leaves))):
                if not bool(tensor.isfinite().all()):
                    return {"passed": False, "note": f"inputs x {scale:g}: {name} is not finite"}
            low, high = (bound(2, keepdim=True).detach().float() for bound in (value.amin, value.amax))
            output = output.detach().float()
            worst = max(worst, float((low - output).max()), float((output - high).max()))
        # Weights that sum to 1 give nothing outside the values, but for rounding.
        return _judged(worst, 32 * torch.finfo(DTYPES[dtype]).eps)

    def _hidden(self, metric: str, p: float | None) -> dict:
        length = self.config.seq_len
        query, key, value = self._draw(length, length, length)
        keep = torch.ones(self.config.batch_size, length, dtype=torch.bool, device=self.config.device)
        keep[0, length // 2 :] = False
        half = length // 2
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, half:], other_value[:, :, half:] = 1e3, -1e3
        options = {"metric": metric, "p": p}
        for name, same, how in (
            ("padding", (slice(0, 1),), {"mask": keep}),
            ("the future", (slice(None), slice(None), slice(0, half)), {"is_causal": True}),
        ):
            before = distance_attention(query, key, value, **options, **how)
            after = distance_attention(query, other_key, other_value, **options, **how)
            if not before[same].equal(after[same]):
                return {
                    "passed": False,
                    "note": f"{name} changes {float((before[same] - after[same]).abs().max()):.1e}",
                }
        none = torch.zeros_like(keep)
        return _judged(distance_attention(query, key, value, mask=none, **options).abs().max(), 0.0)

    def _native(self, mechanism: str, is_decoder: bool = True):
        options = {"nystrom": {"num_landmarks": 8, "window_size": 8}}.get(mechanism)
        if mechanism == "retrieval":
            options = {"window_size": 4, "num_sinks": 2, "block_size": 4, "num_blocks": 2}
        config = DistAttnConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            mechanism=mechanism, mechanism_options=options, is_decoder=is_decoder, initializer_range=0.2,
            positional_encoding="learned" if mechanism in MECHANISMS else "rotary",
        )  # fmt: skip
        torch.manual_seed(0)
        return (DistAttnForCausalLM if is_decoder else DistAttnForMaskedLM)(config).to(self.config.device)

    def _mechanism(self, name: str) -> dict:
        is_causal = name not in MECHANISMS or MECHANISMS.get(name).causal
        model = self._native(name, is_causal).eval()
        ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1)).to(self.config.device)
        logits = model(ids, labels=ids)
        logits.loss.backward()
        still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        if still:
            return {"passed": False, "note": f"no gradient reaches {still[0]} ({len(still)} in all)"}
        if not is_causal:
            return {"passed": bool(logits.logits.isfinite().all()), "note": "bidirectional"}
        with torch.no_grad():
            changed = ids.clone()
            changed[:, 30:] = (changed[:, 30:] + 1) % 64
            leak = (model(changed).logits - logits.logits)[:, :30].abs()
            first = model(ids[:, :30], use_cache=True)
            steps, cache = [first.logits], cache_of(first)
            for position in range(30, 40):
                steps.append(model(ids[:, position : position + 1], use_cache=True, **{CACHE_NAME: cache}).logits)
            apart = (torch.cat(steps, dim=1) - logits.logits).abs()
        # Of Python's max a NaN may be lost.
        return _judged(torch.cat([leak, apart], dim=1).max(), 1e-3)

    def _reloaded(self, model) -> dict:
        ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
        model = model.cpu().eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
            return _judged((model(ids).logits - again(ids).logits).abs().max(), 0.0)

    def _speed(self, metric: str, p: float | None) -> dict:
        device, size = self.config.device, self.config.hidden_size // self.config.num_heads
        shape = (1, self.config.num_heads, SPEED_TOKENS, size)
        tensors = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]

        def run(attention):
            for tensor in tensors:
                tensor.grad = None
            attention(*tensors).sum().backward()

        def ours():
            run(lambda *qkv: distance_attention(*qkv, metric=metric, p=p, is_causal=True))

        def pytorchs():
            run(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True))

        timed = time_pair(
            pytorchs, ours, device, repeats=SPEED_PAIRS, warmup=1, min_seconds=0, max_seconds=SPEED_SECONDS
        )
        where = f"at {SPEED_TOKENS:,} tokens, forward and backward"
        said = f"{ratio_with_spread(timed)} the time of PyTorch's attention {where}"
        if device == "cuda":
            # On a CPU a process that has run much knows no peak of one call; `distattn benchmark` forks for each.
            memory = [peak_megabytes(call, device) for call in (ours, pytorchs)]
            said += f", {memory[0] / memory[1]:.2f} x its memory"
        return {"passed": None, "note": said}


def _label(metric: str, p: float | None) -> str:
    return metric if p is None else f"{metric}, p={p:g}"


def _judged(error, bound: float) -> dict:
    error = float(error)
    return {"passed": error <= bound, "error": error, "bound": bound}


def _by_numbers(metric: str, p: float | None, x: list[float], y: list[float]) -> float:
    """Return the distance of two points by plain arithmetic."""
    gaps = [abs(a - b) for a, b in zip(x, y, strict=True)]
    if metric == "cosine":
        dot, lengths = sum(a * b for a, b in zip(x, y, strict=True)), [math.hypot(*x), math.hypot(*y)]
        return 1 - dot / (lengths[0] * lengths[1])
    return {
        "sqeuclidean": lambda: sum(gap**2 for gap in gaps),
        "l2": lambda: math.sqrt(sum(gap**2 for gap in gaps)),
        "l1": lambda: sum(gaps),
        "lp": lambda: sum(gap**p for gap in gaps) ** (1 / (p or 1)),
        "chebyshev": lambda: max(gaps),
    }[metric]()
