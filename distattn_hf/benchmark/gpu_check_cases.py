"""Correctness cases of the GPU check: each path of attention, and whole models, against float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention import distance_attention
from ..core.attention_spec import AttentionSpec
from ..core.metrics import get_metric
from ..functional.landmarks import select_landmarks
from ..functional.nystrom import nystrom_attention
from .exact_check import HALF_ERROR_RATIO, TOLERANCE, relative_errors
from .exact_options import DTYPES
from .gpu_check_retrieval import CHOICE_BOUND, check_paged, retrieval_pair
from .nystrom_inputs import GAMMA
from .run import summary

HALF_NAMES = ("bfloat16", "float16")
_DRAWS = 4
# Largest error relative to the largest entry in float32. Nyström: the inverse of κ(L, L) + γI magnifies rounding, by up
# to m/γ. Models: rounding through two layers.
BOUNDS = {"exact": TOLERANCE["float32"], "retrieval": TOLERANCE["float32"], "nystrom": 5e-4, "model": 5e-4}
RULE = (
    "float32: largest error relative to the largest entry, at most "
    + ", ".join(f"{bound:g} ({kind})" for kind, bound in BOUNDS.items())
    + f"; bfloat16, float16: root mean square and largest error at most {HALF_ERROR_RATIO:g} times those of PyTorch's "
    f"own attention in that dtype on the same inputs, the worst of {_DRAWS} upstream gradients (largest error, and "
    "both of λ's gradient: or of half a unit in the last place); truth: the formula written out in float64, same "
    "inputs (retrieval: over the keys that are read on this device, of which at most a share of "
    f"{CHOICE_BOUND:g} may be others than in float64); paged: tokens of a batch equal those of generate"
)


@dataclass(frozen=True)
class Case:
    """One problem. `path` names a backend of exact attention, "nystrom", "retrieval" (of blocks of alike keys where it
    is `clustered`), "model" (a whole one, `metric` its spec) or "paged" (the same in continuous batching).

    `mask` is None, "padding", "empty rows" (some queries see nothing), or "bias" (per query, with a float bias that
    takes a gradient, too). `backward` asks for the gradients of query, key, value, λ of each head, bias, landmarks.
    """

    path: str
    metric: str
    dtype: str
    queries: int
    keys: int
    head_size: int
    p: float | None = None
    causal: bool = False
    mask: str | None = None
    backward: bool = True
    window: int = 0
    sinks: int = 0
    lift: bool = False
    chosen: bool = False
    batch: int = 2
    heads: int = 8
    key_heads: int = 2
    num_landmarks: int = 16
    softening: float = 0.0
    learned_sink: bool = False
    softcap: float | None = None
    clustered: bool = False

    @property
    def name(self) -> str:
        """A unique name in one line."""
        near = f"window {self.window} sinks {self.sinks}" if self.window or self.sinks else "landmarks only"
        words = [
            self.path,
            self.metric if self.p is None else f"{self.metric}{self.p:g}",
            self.dtype,
            "causal" if self.causal else "full",
            f"{self.queries}x{self.keys} d{self.head_size}",
            self.mask,
            *([near, "lifted" if self.lift else None] if self.path == "nystrom" else []),
            "landmarks from the keys" if self.chosen else None,
            "alike keys" if self.clustered else None,
            f"ε {self.softening:g}" if self.softening else None,
            "learned sink" if self.learned_sink else None,
            f"cap {self.softcap:g}" if self.softcap else None,
            None if self.backward else "forward only",
        ]
        return " ".join(word for word in words if word)


KERNELS = (("l2", None), ("l1", None), ("chebyshev", None), ("lp", 3.0), ("lp", 1.5), ("lp", 2.2))
DOT_FORMS = (("sqeuclidean", None), ("cosine", None))
MODELS = ("sqeuclidean exact", "l2", "l1", "cosine", "nystrom", "retrieval", "retrieval l2")


def correctness_cases(interpreted: bool) -> list[Case]:
    """Return all cases, most important first; `interpreted`: in sizes that Triton's interpreter runs in seconds."""
    # No length is a multiple of a tile, and most span more than one.
    square, cross, cache, common = (35, (19, 37), 40, 8) if interpreted else (131, (97, 203), 517, 64)
    sizes = (16, 8, 17, 12, 5, 9) if interpreted else (32, 128, 80, 256, 96, 40)
    heads = {"heads": 2, "key_heads": 1, "batch": 1} if interpreted else {"heads": 8, "key_heads": 2}
    cases = []

    def add(path, metric, dtype, queries, keys, head_size, **options):
        cases.append(Case(path, metric, dtype, queries, keys, head_size, **{**heads, **options}))

    exact = [("triton", *kernel) for kernel in KERNELS] + [("sdpa", *form) for form in DOT_FORMS]
    for shift, dtype in enumerate(("bfloat16", "float32", "float16")):
        for path, metric, p in exact:
            add(path, metric, dtype, square, square, common, p=p, causal=True)
        for path, metric, p in exact:
            add(path, metric, dtype, 1, cache, common, p=p, backward=False)
        for path, metric, p in exact:
            if get_metric(metric).softens:
                # What conversions are by default.
                add(path, metric, dtype, square, square, common, p=p, causal=True, softening=3.0)
            if p is None:
                add(path, metric, dtype, square, square, common, causal=True, learned_sink=True)
            if p is None and path == "triton":
                add(path, metric, dtype, square, square, common, causal=True, learned_sink=True, softcap=1.5)
        for index, (path, metric, p) in enumerate(exact):
            size = sizes[(index + shift) % len(sizes)]
            add(path, metric, dtype, *cross, size, p=p, mask="padding")
        for exact_span in ({}, {"window": 9, "sinks": 3}):
            for causal in (True, False):
                add("nystrom", "sqeuclidean", dtype, square, square, common, causal=causal, **exact_span)
        add("nystrom", "sqeuclidean", dtype, square, square, common, causal=True, mask="padding", window=9, sinks=3,
            lift=True)  # fmt: skip
        add("nystrom", "sqeuclidean", dtype, *cross, common, mask="padding", lift=True)
        add("nystrom", "sqeuclidean", dtype, square, square, common, chosen=True, lift=True)
        for metric, clustered in (("dot", True), ("dot", False), ("l2", True)):
            near = {"window": 9, "sinks": 3, "causal": True, "clustered": clustered}
            # Clusters of two levels.
            add("retrieval", metric, dtype, 331, 331, common, **near)
            add("retrieval", metric, dtype, 331, 331, common, mask="padding", **near)
    for kind in ("sqeuclidean exact", "l2", "cosine"):
        add("paged", kind, "float32", square, square, 16, causal=True, backward=False, heads=4, key_heads=2)
    for kind in MODELS:
        add("model", kind, "float32", square, square, 16, causal=True, backward=False, heads=4, key_heads=2, batch=2)
    for metric, p in (*KERNELS[:3], *DOT_FORMS):
        for dtype in ("bfloat16", "float32"):
            path = "triton" if (metric, p) in KERNELS else "sdpa"
            for size in (33,) if interpreted else (32, 128, 256):
                add(path, metric, dtype, square, square, size, p=p, causal=True)
        if metric in ("l2", "l1", "chebyshev"):
            for mask in ("bias", "empty rows"):
                add("triton", metric, "float32", square, square, common, p=p, causal=True, mask=mask)
            add("chunked", metric, "bfloat16", square, square, common, causal=True)
    return list(dict.fromkeys(cases))


def check(case: Case, device: str) -> dict:
    """Check one case; returns {"passed", "worst", "error", "bound", "checks", "failures"}, with the failed checks."""
    # The user may have enabled TF32; the check needs full float32.
    torch.set_float32_matmul_precision("highest")
    if case.path == "paged":
        checks = check_paged(small_model(case.metric), device)
    else:
        checks = _check_model(case, device) if case.path == "model" else _check_attention(case, device)
    failures = [c for c in checks if not c["error"] <= c["bound"]]
    failures = [{**c, "error": c["error"] if math.isfinite(c["error"]) else str(c["error"])} for c in failures]
    return {**summary(checks), "failures": failures}


def _draw(*shape: int, seed: int) -> Tensor:
    """Draw from N(0, 1) in multiples of 2⁻¹⁶: q - k is exact in float32, so slopes jump alike in all precisions."""
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return tensor.mul_(2**16).round_().div_(2**16)


def make_tensors(case: Case, device: str) -> dict[str, Tensor]:
    """Return the differentiated tensors by name: query, key and value in the case's dtype, the others in float32."""
    batch, size, metric = case.batch, case.head_size, get_metric(case.metric)
    shapes = {"query": (case.heads, case.queries), "key": (case.key_heads, case.keys)}
    shapes["value"] = shapes["key"]
    tensors = {
        name: _draw(batch, *shape, size, seed=i).to(device, DTYPES[case.dtype])
        for i, (name, shape) in enumerate(shapes.items())
    }
    lam = 0.5 if case.path == "nystrom" else metric.default_lambda(size, size**-0.5, case.p)
    tensors["lam"] = (lam * torch.linspace(0.5, 1.5, case.heads)).to(device)
    if case.path == "nystrom" and not case.chosen:
        tensors["landmarks"] = _draw(case.heads, case.num_landmarks, size, seed=7).to(device)
    if case.mask == "bias":
        tensors["bias"] = _draw(1, case.heads, case.queries, case.keys, seed=8).to(device)
    return tensors


def make_mask(case: Case, device: str) -> Tensor | None:
    """Return the mask, True = keep: (B, M) padding at the end, or (B, 1, N, M)."""
    if case.mask is None:
        return None
    if case.mask == "padding":
        lengths = torch.arange(1, case.batch + 1)[:, None] * case.keys // (case.batch + 1)
        return (torch.arange(case.keys) <= lengths).to(device)
    keep = _draw(case.batch, 1, case.queries, case.keys, seed=9) < 0.5
    keep[..., 0] = True
    if case.mask == "empty rows":
        keep[:, :, [3, case.queries - 1]] = False
    return keep.to(device)


def _check_attention(case: Case, device: str) -> list[dict]:
    tensors, mask = make_tensors(case, device), make_mask(case, device)
    if case.path == "nystrom":
        attention, formula, others = _nystrom(case, mask), _formula(case, mask), []
    elif case.path == "retrieval":
        attention, formula, choice = retrieval_pair(case, mask, tensors)
        others = [choice]
    else:
        attention, formula, others = _exact(case, mask, case.path), _exact(case, mask, "reference"), []
    truth = evaluate(case, formula, tensors, torch.float64)
    errors = relative_errors(evaluate(case, attention, tensors), truth)
    bound = BOUNDS.get(case.path, BOUNDS["exact"])
    bounds = dict.fromkeys(truth, (bound, bound))
    if case.dtype in HALF_NAMES:
        peer_tensors = {name: tensors[name] for name in ("query", "key", "value", "lam")}
        # The gradient of λ is one number per head, whose error varies by chance: the largest of several draws counts.
        draws = [
            relative_errors(
                evaluate(case, _pytorch(case, mask), peer_tensors, draw=draw),
                evaluate(case, _pytorch(case, mask), peer_tensors, torch.float64, draw),
            )
            for draw in range(_DRAWS if case.backward else 1)
        ]
        rounding = torch.finfo(DTYPES[case.dtype]).eps / 2
        for name in draws[0]:
            mean, largest = map(max, zip(*(draw[name] for draw in draws)))
            floor = rounding if name == "lam gradient" else 0.0
            bounds[name] = (HALF_ERROR_RATIO * max(mean, floor), HALF_ERROR_RATIO * max(largest, rounding))
    return others + [
        {"what": f"{name}, {kind} error", "error": error, "bound": bound}
        for name in truth
        for kind, error, bound in zip(("root mean square", "largest"), errors[name], bounds[name])
    ]


def evaluate(case: Case, attention: Callable, tensors: dict[str, Tensor], dtype=None, draw=0) -> dict[str, Tensor]:
    """Return {"output": ..., "query gradient": ...} of one attention; `dtype`: with all tensors cast to it before.

    `draw` numbers the upstream gradients.
    """
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_(case.backward) for n, t in tensors.items()}
    output = attention(**leaves)
    if not case.backward:
        return {"output": output.detach()}
    # Numbers that every dtype represents exactly, so that all get the same input.
    upstream = _draw(*output.shape, seed=10 + draw).bfloat16().to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    return {"output": output.detach(), **{f"{n} gradient": g for n, g in zip(leaves, gradients)}}


def _exact(case: Case, mask: Tensor | None, backend: str) -> Callable:
    def attention(query, key, value, lam, bias=None):
        return distance_attention(
            query, key, value, metric=case.metric, p=case.p, lam=lam, mask=mask, position_bias=bias,
            is_causal=case.causal, backend=backend, softening=case.softening, sink_logit=sink(lam),
            softcap=case.softcap,
        )  # fmt: skip

    def sink(lam):
        # Near the logits of a key at the default λ, whose deviation along a row is 1.
        return -torch.linspace(0.5, 2.0, case.heads).to(lam) if case.learned_sink else None

    return attention


def _pytorch(case: Case, mask: Tensor | None) -> Callable:
    """Return PyTorch's attention on the same tensors, with λ as a temperature of each head."""
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    if mask is not None and case.causal:
        mask = mask & torch.ones(case.queries, case.keys, dtype=torch.bool, device=mask.device).tril()

    def attention(query, key, value, lam):
        temperature = (lam / lam.detach().mean()).to(query.dtype)[:, None, None]
        return F.scaled_dot_product_attention(
            query * temperature, key, value, attn_mask=mask, is_causal=case.causal and mask is None, enable_gqa=True
        )

    return attention


def _nystrom(case: Case, mask: Tensor | None) -> Callable:
    def attention(query, key, value, lam, landmarks=None):
        return nystrom_attention(
            query, key, value, landmarks=landmarks, num_landmarks=case.num_landmarks, window_size=case.window,
            num_sinks=case.sinks, lam=lam, mask=mask, is_causal=case.causal, lift=case.lift, regularisation=GAMMA,
        )  # fmt: skip

    return attention


def _formula(case: Case, keep: Tensor | None) -> Callable:
    """Return Nyström attention with every weight of a row formed, as in its docstring; shares no code with it."""

    def kernel(x, y, weight):
        return torch.exp(-weight * (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1))

    def attention(query, key, value, lam, landmarks=None):
        key, value = (t.repeat_interleave(case.heads // case.key_heads, dim=1) for t in (key, value))
        if landmarks is None:
            landmarks = select_landmarks(key, case.num_landmarks, "segment_means")
        landmarks = landmarks if landmarks.dim() == 4 else landmarks[None]
        valid = torch.ones_like(key[..., 0], dtype=torch.bool) if keep is None else keep[:, None].expand(key.shape[:-1])
        weight = lam[:, None, None] * case.head_size**-0.5
        exact = -weight * (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1)
        if case.lift:
            radius = landmarks.square().sum(-1).amax(-1)
            if not case.causal:
                radius = torch.maximum(radius, (key.square().sum(-1) * valid).amax(-1))
            # As if all keys lay on the sphere: terms that only depend on the row cancel.
            exact = exact + weight * key.square().sum(-1)[..., None, :] - weight * radius[..., None, None]

            def lifted(x):
                height = (radius[..., None] - x.square().sum(-1)).clamp_min(1e-30).sqrt()
                return torch.cat([x.expand(*height.shape, -1), height[..., None]], dim=-1)

            key, landmarks, query = lifted(key), lifted(landmarks), F.pad(query, (0, 1))
        gram = kernel(landmarks, landmarks, weight)
        gram = gram + GAMMA * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        coefficients = torch.linalg.solve(gram, kernel(landmarks, key, weight))
        if case.causal or case.window or case.sinks:
            coefficients = coefficients.clamp_min(0)
        position = torch.arange(case.keys, device=query.device)
        relative = position - torch.arange(case.queries, device=query.device)[:, None]
        seen_exactly = (relative.abs() < case.window) | (valid & (valid.cumsum(-1) <= case.sinks))[..., None, :]
        weights = torch.where(seen_exactly, exact.exp(), kernel(query, landmarks, weight) @ coefficients)
        weights = weights * (valid[..., None, :] & ((relative <= 0) if case.causal else True))
        return weights @ value / weights.sum(-1, keepdim=True)

    return attention


def small_model(kind: str) -> torch.nn.Module:
    """Build a random Llama of two layers with grouped keys, converted; the same on every machine."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).eval()
    if kind == "nystrom":
        spec = AttentionSpec(mechanism="nystrom", num_landmarks=8, window_size=8, num_sinks=2)
        ids = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(1))
        options = CalibrationOptions(steps=2, sequences=2, rows=8, progress=False)
        return convert(teacher, spec, calibration=[{"input_ids": ids}], options=options).eval()
    if kind.startswith("retrieval"):
        metric = kind.partition(" ")[2] or "sqeuclidean"
        sizes = {"window_size": 4, "num_sinks": 2, "block_size": 4, "num_blocks": 1}
        spec = AttentionSpec(metric, mechanism="retrieval", **sizes)
        return convert(teacher, spec, init="exact" if spec.lift else "plain").eval()
    metric, _, init = kind.partition(" ")
    return convert(teacher, AttentionSpec(metric), init=init or "plain").eval()


@torch.no_grad()
def _check_model(case: Case, device: str) -> list[dict]:
    """Compare logits with eager attention in float64 on the CPU, and generation token by token with all at once."""
    model = small_model(case.metric)
    ids = torch.randint(64, (case.batch, case.queries), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.to(device)
    ids, mask = ids.to(device), mask.to(device)
    actual = {"logits": model(ids, attention_mask=mask).logits}
    prompt = case.queries // 2
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(ids[:, :prompt], attention_mask=mask[:, :prompt], **options)
    mask = F.pad(mask[:, :prompt], (0, 7), value=1)
    actual["logits of generation"] = torch.stack(generated.logits, dim=1)
    truth = model.cpu().double()
    truth.set_attn_implementation("eager")
    ids, mask, sequences = ids.cpu(), mask.cpu(), generated.sequences[:, :-1].cpu()
    full = torch.ones_like(ids)
    full[0, :5] = 0
    expected = {
        "logits": truth(ids, attention_mask=full).logits,
        # In generation, padding on the left takes no positions.
        "logits of generation": truth(
            sequences, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)
        ).logits[:, prompt - 1 :],
    }
    not_padding = full.bool()
    actual["logits"], expected["logits"] = (tensors["logits"].cpu()[not_padding] for tensors in (actual, expected))
    actual["logits of generation"] = actual["logits of generation"].cpu()
    return [
        {"what": f"{name}, {kind} error", "error": error, "bound": BOUNDS["model"]}
        for name, pair in relative_errors(actual, expected).items()
        for kind, error in zip(("root mean square", "largest"), pair)
    ]
