"""What the GPU check asks of retrieval attention, and of texts batched over a paged cache."""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ContinuousBatchingConfig, GenerationConfig

from ..core import retrieval_blocks
from ..core.metrics import get_metric
from ..core.retrieval import Search
from ..core.retrieval_cache import KeyClusters
from ..core.retrieval_gather import run_retrieval, visible_keys
from ..functional.retrieval_attention import problem_of
from .measure import timed_call

# Small blocks: short texts have clusters of several levels. Read by number: weights of random keys are much alike.
_SIZES = {"block_size": 4, "num_blocks": 4, "min_weight": 0.0}
# Where scores nearly tie, others may be read: the share of all keys that may be read otherwise than in float64.
CHOICE_BOUND = 0.02
# Prompts of the paged batches, and tokens of each answer.
_PROMPTS, _ANSWER = (5, 37, 9, 17), 8
# Query rows of the timed shape that are checked, and their largest error relative to the largest entry.
_CHECKED_ROWS, _BOUND = 16, 2e-2


def problem_of_case(case, query: Tensor, key: Tensor, value: Tensor, lam, mask: Tensor | None):
    """Return the problem of a case of path "retrieval"; without the far field, whose keys are of its own making."""
    return problem_of(
        query, key, value, metric=case.metric, p=case.p, lam=lam, scaling=None, softening=0.0, mask=mask,
        window_size=case.window, num_sinks=case.sinks, far_field=False, cluster_keys=case.clustered, **_SIZES,
    )  # fmt: skip


def retrieval_pair(case, mask: Tensor | None, tensors: dict[str, Tensor]) -> tuple[Callable, Callable, dict]:
    """Return (the attention, the formula over the keys that it reads on this device, a check of its choice)."""
    given = [tensors[name] for name in ("query", "key", "value", "lam")]
    seen = visible_keys(problem_of_case(case, *given, mask))(0, case.queries)
    exact = [tensor.cpu().double() for tensor in given]
    expected = visible_keys(problem_of_case(case, *exact, None if mask is None else mask.cpu()))(0, case.queries)
    share = float((seen.cpu() != expected).double().mean())

    def attention(query, key, value, lam):
        return run_retrieval(problem_of_case(case, query, key, value, lam, mask))[0]

    def formula(query, key, value, lam):
        key, value = (t.repeat_interleave(case.heads // case.key_heads, dim=1) for t in (key, value))
        distance = get_metric(case.metric).distance(query, key, case.p)
        logits = -lam[:, None, None] * case.head_size**-0.5 * distance
        # A row of padding sees nothing, and is zero.
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.where(seen.any(-1, keepdim=True), weights, 0.0) @ value

    return attention, formula, {"what": "keys read otherwise than in float64", "error": share, "bound": CHOICE_BOUND}


def check_paged(model, device: str) -> list[dict]:
    """Compare the tokens of a batch over a paged cache with those that `generate` gives each prompt alone."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in _PROMPTS]
    config = GenerationConfig(max_new_tokens=_ANSWER, do_sample=False, eos_token_id=63, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=24)
    model.to(device)
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pages)
    if errors := [result.error for result in results.values() if result.error is not None]:
        raise RuntimeError(f"a request failed: {errors[0]}")
    checks = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=device)
        alone = model.generate(ids, generation_config=config)
        expected, found = alone[0, len(prompt) :].tolist(), results[f"req_{number}"].generated_tokens
        wrong = sum(a != b for a, b in zip(expected, found)) + abs(len(expected) - len(found))
        checks.append({"what": f"tokens after prompt {number}, others", "error": float(wrong), "bound": 0.5})
    return checks


def retrieval_timing(timing, device: str, dtype: torch.dtype, flash: Callable) -> tuple[Callable, Callable, dict]:
    """Return (ours, flash attention, the check) of reading a text, or of one token after it; defaults but 16 blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (timing.heads, timing.key_heads, timing.key_heads)
    query, key, value = (
        torch.randn(timing.batch, heads, timing.length, timing.head_size, generator=generator).to(device, dtype)
        for heads in shapes
    )
    arguments = {
        "metric": "dot", "lam": None, "p": None, "scaling": None, "softening": 0.0, "mask": None, "block_size": 16,
        # Of random keys none has a weight by which it would be read: by number.
        "num_blocks": 16, "min_weight": 0.0, "window_size": Search.window_size, "num_sinks": Search.num_sinks,
        "cluster_keys": True,
    }  # fmt: skip
    entries = timing.part_entries or retrieval_blocks.ENTRIES

    def problem(query, far_field=True):
        return problem_of(query, key, value, far_field=far_field, **arguments)

    def in_parts(call):
        def run():
            with torch.no_grad(), mock.patch.object(retrieval_blocks, "ENTRIES", entries):
                return call()

        return run

    last = query[:, :, -_CHECKED_ROWS:]
    ends = problem(last, far_field=False)

    def checked():
        return run_retrieval(ends)[0], visible_keys(ends)(0, _CHECKED_ROWS)

    output, seen = in_parts(checked)()
    tensors = [t.double().repeat_interleave(timing.heads // t.shape[1], dim=1) for t in (last, key, value)]
    truth = F.scaled_dot_product_attention(*tensors, attn_mask=seen)
    error = float((output - truth).abs().max() / truth.abs().max())
    check = {"passed": error <= _BOUND, "error": error if error == error else "nan", "bound": _BOUND}
    if timing.pass_name == "forward":
        read, ours = query, in_parts(lambda: run_retrieval(problem(query)))
    else:
        read, clusters = query[:, :, -1:], KeyClusters()
        ours = in_parts(lambda: run_retrieval(clusters.update(problem(read), [], True)))
        ours()  # what a cache keeps of the text is made once
    return ours, timed_call(flash, (read, key, value), None), {"check": check}
