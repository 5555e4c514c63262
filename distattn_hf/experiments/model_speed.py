"""Speed of converted models beside the untouched one: reading, steps after it, generation; interleaved in one run."""

import random
import statistics
import time
from dataclasses import dataclass
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..benchmark.measure import only_errors, spread
from ..conversion.cache_bytes import held_bytes
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..core.compatibility import CACHE_NAME, cache_of
from ..core.discovery import max_positions
from ..core.nystrom_heads import SHORT_TEXT
from ..data.sources import read_texts
from ..storage.models import load_checkpoint

ATTENTIONS = ("sqeuclidean", "l2", "cosine", "l1")
NYSTROM = ("nystrom", "nystrom+exact")
JOBS = ("prefill", "step", "generate")
RANDOM = "random"


def model_speed(models: dict, ids: torch.Tensor, options: "Options") -> dict[str, dict[str, list[float]]]:
    """Return {job: {model's name: seconds of each round}}; the order within a round is random.

    "prefill": the text `ids` (1, N) is read; "step": one token after it, the median of `new_tokens`; "generate":
    `prompt_tokens` of it are read and `new_tokens` made. And under "cache_bytes" what the cache held after the text.
    """
    order, seconds = list(models), {job: {name: [] for name in models} for job in (*JOBS, "cache_bytes")}
    with torch.no_grad():
        for round_number in range(options.rounds + 1):
            random.Random(round_number).shuffle(order)
            for name in order:
                for job, value in zip(seconds, _round(models[name], ids, options), strict=True):
                    if round_number:  # The first round warms up.
                        seconds[job][name].append(value)
    return seconds


def _round(model, ids: torch.Tensor, options: "Options") -> tuple[float, float, float, int]:
    prompt, new = ids[:, : options.prompt_tokens], options.new_tokens
    asked = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    read, read_seconds = _timed(lambda: model(ids, use_cache=True, logits_to_keep=1))
    cache, steps = cache_of(read), []
    size = held_bytes(cache)
    for _ in range(new):
        steps.append(_timed(lambda: model(ids[:, -1:], use_cache=True, **{CACHE_NAME: cache}))[1])
    generated = _timed(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked))[1]
    return read_seconds, statistics.median(steps), generated, size


def _timed(run) -> tuple:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


@dataclass(frozen=True)
class Options:
    """checkpoint: a causal model, "untouched"; "random": a small Llama with random weights, to see it run.
    attentions: "retrieval"; "nystrom", all heads and exact nowhere; "nystrom+exact", exact up to `exact_below` keys; or
    metrics of its conversions, lp with p = 3. Two steps fit them, as speed does not depend on how good a fit is. data:
    what is read, which decides what retrieval reads; None for random tokens. prefill_tokens: of a text that is read,
    which leaves room for the new ones. prompt_tokens, new_tokens: of one that is gone on with. rounds: in which each
    model runs once, in random order.
    """

    checkpoint: str = "smollm2-135m"
    attentions: tuple[str, ...] = ATTENTIONS
    exact_below: int = SHORT_TEXT
    data: str | None = None
    prefill_tokens: int = 1024
    prompt_tokens: int = 512
    new_tokens: int = 32
    rounds: int = 9

    def __post_init__(self):
        for name in ("prefill_tokens", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")
        if self.prompt_tokens > self.prefill_tokens:
            raise ValueError(f"prompt_tokens must be at most prefill_tokens, got {self.prompt_tokens}")
        for name in self.attentions:
            self.spec(name)
        if self.checkpoint == RANDOM and self.data is not None:
            raise ValueError(f"data must be None with checkpoint={RANDOM!r}, which reads no text, got {self.data!r}")
        if len(set(self.attentions)) < len(self.attentions):
            raise ValueError(f"attentions must be different ones, got {', '.join(self.attentions)}")

    def spec(self, name: str) -> AttentionSpec:
        """Return what replaces dot-product attention."""
        if name == "retrieval":
            return AttentionSpec(mechanism="retrieval")
        if name in NYSTROM:
            return AttentionSpec(mechanism="nystrom", exact_below=0 if name == "nystrom" else self.exact_below)
        return AttentionSpec(name, p=3.0 if name == "lp" else None)


QUICK = {
    "checkpoint": RANDOM, "attentions": ("l2", "retrieval"), "prefill_tokens": 64, "prompt_tokens": 32,
    "new_tokens": 2, "rounds": 1,
}  # fmt: skip


def _random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _ids(options: Options, tokenizer, vocabulary: int) -> torch.Tensor:
    """Return the tokens (1, prefill_tokens) that are read."""
    count = options.prefill_tokens
    if options.data is None:
        return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    texts, ids = iter(read_texts(options.data, split="test")), []
    while len(ids) < count and (text := next(texts, None)) is not None:
        ids += tokenizer(text + "\n\n")["input_ids"]
    if len(ids) < count:
        raise ValueError(f"prefill_tokens must be at most the {len(ids):,} tokens of {options.data!r}, got {count:,}")
    return torch.tensor([ids[:count]])


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Measure a row for each job and model: median seconds, and the ratio to the untouched model's within a round."""

    @cache
    def times():
        text = ["The quick brown fox jumps over the lazy dog. " * 20] * 4
        if options.checkpoint == RANDOM:
            teacher, tokenizer = _random_model(), None
            text = [{"input_ids": torch.randint(256, (4, 128), generator=torch.Generator().manual_seed(1))}]
        else:
            teacher, tokenizer = load_checkpoint(options.checkpoint)
        most, needed = max_positions(teacher.config), options.prefill_tokens + options.new_tokens
        if most is not None and needed > most:
            raise ValueError(
                f"prefill_tokens + new_tokens must be at most the {most:,} positions of {options.checkpoint}, "
                f"got {needed:,}"
            )
        models = {"untouched": teacher.eval()}
        fit = CalibrationOptions(steps=2, sequences=2, progress=False)
        for name in options.attentions:
            fitted = {} if name == "retrieval" else {"calibration": text, "tokenizer": tokenizer, "options": fit}
            models[name] = convert(teacher, options.spec(name), **fitted).eval()
        return model_speed(models, _ids(options, tokenizer, teacher.config.vocab_size), options)

    for job in JOBS:
        for name in ("untouched", *options.attentions):
            results.row({"job": job, "attention": name}, lambda j=job, n=name: _compared(times(), j, n))


def _compared(found: dict[str, dict[str, list[float]]], job: str, name: str) -> dict:
    times = found[job]
    # What retrieval derives from its keys is not among the bytes held: `conversion_report.cache_bytes` has it.
    held = {"cache_bytes": found["cache_bytes"][name][0]} if job == "prefill" and name != "retrieval" else {}
    ratios = spread([own / reference for own, reference in zip(times[name], times["untouched"], strict=True)])
    return {"seconds": statistics.median(times[name]), "ratio": ratios["median"], "p10": ratios["p10"],
            "p90": ratios["p90"], **held}  # fmt: skip
