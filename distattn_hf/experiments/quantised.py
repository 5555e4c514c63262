"""What int8 costs converted models: weights as they are loaded (torchao), keys and values in the cache (HQQ), or both.

Tokens after a text are read one at a time, as in generation, and scored; bytes are of all weights, and of the cache.
"""

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from transformers import DynamicCache, QuantizedCache

from ..benchmark.measure import only_errors
from ..conversion.cache_bytes import held_bytes, tensor_bytes
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..core.compatibility import CACHE_NAME
from ..data.packing import pack
from ..data.sources import read_texts
from ..storage.models import load_checkpoint

# Conversions that need no fit.
ATTENTIONS = {
    "exact": (AttentionSpec("sqeuclidean"), "exact"),
    "retrieval": (AttentionSpec(mechanism="retrieval"), "exact"),
}
# What is of 8 bits -> packages that this needs.
PARTS = {"nothing": (), "weights": ("torchao",), "cache": ("hqq",), "weights and cache": ("torchao", "hqq")}


@dataclass(frozen=True)
class Options:
    """checkpoint: a causal model. attentions: "untouched", "exact" (squared Euclidean), "retrieval". parts: what has 8
    bits: nothing; weights; cache; "weights and cache". data: held-out text. prompt_tokens: read before scored_tokens.
    group_size: numbers of the cache that share a scale; residual_tokens: the last ones, kept as they are.
    """

    checkpoint: str = "smollm2-135m"
    attentions: tuple[str, ...] = ("untouched", *ATTENTIONS)
    parts: tuple[str, ...] = tuple(PARTS)
    data: str = "news"
    prompt_tokens: int = 1024
    scored_tokens: int = 128
    group_size: int = 64
    residual_tokens: int = 128

    def __post_init__(self):
        for name, allowed in (("attentions", ("untouched", *ATTENTIONS)), ("parts", tuple(PARTS))):
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name} must be among {'; '.join(allowed)}, got {value!r}")
        for name in ("prompt_tokens", "scored_tokens", "group_size", "residual_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")


QUICK = {"attentions": ("untouched", "exact"), "parts": ("nothing",), "prompt_tokens": 32, "scored_tokens": 4}
AXES = ("attentions", "parts")


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Measure a row for each attention and what of it has 8 bits; ratios are to the same attention without."""
    for part in options.parts:
        if missing := [package for package in PARTS[part] if find_spec(package) is None]:
            raise ValueError(f"parts: {part!r} needs {missing[0]}; run: pip install 'distattn_hf[beyond]'")

    @cache
    def loaded():
        model, tokenizer = load_checkpoint(options.checkpoint)
        count = options.prompt_tokens + options.scored_tokens
        ids = pack(tokenizer, read_texts(options.data, split="test"), count, count)[0][:1]
        if ids.shape[1] < count:
            raise ValueError(f"data holds {ids.shape[1]} tokens, fewer than prompt_tokens + scored_tokens={count}")
        return model, ids

    for name in options.attentions:
        whole = None
        for part in options.parts:

            def measure(name=name, part=part) -> dict:
                model, ids = loaded()
                if name in ATTENTIONS:
                    spec, init = ATTENTIONS[name]
                    model = convert(model, spec, init=init)
                if "weights" in part:
                    model = _int8(model, name == "untouched")
                return _scored(model, ids, options, "cache" in part)

            row = results.row({"attention": name, "int8": part}, measure)
            whole = row["perplexity"] if part == "nothing" else whole
            if whole is not None:
                results.echo(f"  perplexity x {row['perplexity'] / whole:.4f}")


def _int8(model, is_copied: bool):
    """Return the model with linear layers of 8-bit weights, one scale a row (torchao); λ, α and maps are no layers."""
    from copy import deepcopy

    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = deepcopy(model) if is_copied else model
    head = model.get_output_embeddings()
    if not any(isinstance(module, torch.nn.Linear) and module is not head for module in model.modules()):
        raise ValueError(
            f"parts: {type(model).__name__} has no linear layers of PyTorch whose weights could have 8 bits"
        )
    # The head may be the embedding, which stays.
    quantize_(model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, torch.nn.Linear) and m is not head)
    return model


@torch.no_grad()
def _scored(model, ids: torch.Tensor, options: Options, is_int8: bool) -> dict:
    """Return the perplexity of the scored tokens, one step each, and bytes of cache and weights."""
    if is_int8:
        kept = QuantizedCache(
            "hqq", model.config, nbits=8, axis_key=1, axis_value=1, q_group_size=options.group_size,
            residual_length=options.residual_tokens,
        )  # fmt: skip
    else:
        kept = DynamicCache(config=model.config)
    given, start = {CACHE_NAME: kept, "use_cache": True}, options.prompt_tokens
    logits = [model(ids[:, :start], logits_to_keep=1, **given).logits[:, -1]]
    logits += [model(ids[:, i : i + 1], **given).logits[:, -1] for i in range(start, ids.shape[1] - 1)]
    loss = torch.nn.functional.cross_entropy(torch.cat(logits).float(), ids[0, start:])
    return {
        "perplexity": math.exp(float(loss)),
        "cache_bytes": held_bytes(kept),
        "weight_bytes": sum(map(tensor_bytes, model.parameters())),
    }
