"""A long document read in linear time: perplexity, seconds and cache bytes by position, beside the controls.

python -m distattn_hf.experiments.long_text FOLDER [--teacher smollm2-135m] [--tokens 16384] [--steps 0] [--out ...]

FOLDER is a causal model converted by mechanism="nystrom". The document: news articles from the 3,001st on, end to end.
"""

import argparse
import copy
import os
import statistics
import time
from pathlib import Path

import torch

from ..analysis.figure_style import new_figure, save_figure, styled
from ..benchmark.measure import only_errors
from ..core.compatibility import CACHE_NAME, cache_of
from ..core.constant_cache import ConstantLayer, RingLayer
from ..data.packing import start_tokens, token_stream
from ..data.sources import read_texts
from ..evaluation.score import TokenScores
from ..evaluation.scorecard import without_far_field
from ..storage.folders import write_json
from ..storage.models import load_checkpoint

CHUNK = 1024


def document(tokenizer, tokens: int) -> torch.Tensor:
    """Return ids (1, tokens) of articles that no calibration used, with the tokenizer's start tokens."""
    texts = read_texts("news", split="test")
    ids = start_tokens(tokenizer, texts)
    ids += token_stream(tokenizer, texts, tokens)
    if len(ids) < tokens:
        raise ValueError(f"tokens: the articles hold {len(ids)} tokens, asked for {tokens}")
    return torch.tensor([ids[:tokens]])


def cache_bytes(cache) -> int:
    """Return the bytes of keys, values and states in a cache."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, ConstantLayer | RingLayer):
            total += layer.nbytes()
        else:
            total += sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))
    return total


@torch.no_grad()
def seconds_per_token(model, cache, token: torch.Tensor, steps: int) -> float:
    """Return the median over greedy steps from a copy of the cache, without the first step."""
    cache, seconds = copy.deepcopy(cache), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        token = model(token, use_cache=True, **{CACHE_NAME: cache}).logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@torch.no_grad()
def read_in_chunks(model, ids: torch.Tensor, chunk: int = CHUNK, steps: int = 0) -> list[dict]:
    """Read the ids chunk by chunk; returns per chunk {"end", "perplexity" of its tokens, "seconds", "cache_bytes"}.

    With `steps`, also "seconds_per_token" of so many generated ones, where `end` is a power of two times the chunk.
    """
    entries, cache, last = [], None, None
    for start in range(0, ids.shape[1], chunk):
        started = time.perf_counter()
        chunk_ids = ids[:, start : start + chunk]
        output = model(chunk_ids, use_cache=True, **{CACHE_NAME: cache})
        seconds, cache = time.perf_counter() - started, cache_of(output)
        # The first token of a chunk is predicted by the last logits of the one before.
        sums = TokenScores("causal-lm")
        logits = output.logits if last is None else torch.cat([last, output.logits], dim=1)
        sums.add(logits, ids[:, max(start - 1, 0) : start + chunk])
        last = output.logits[:, -1:]
        end = start + chunk_ids.shape[1]
        entry = {
            "end": end,
            "perplexity": sums.scores()["perplexity"],
            "seconds": seconds,
            "cache_bytes": cache_bytes(cache),
        }
        if steps and (count := end // chunk) & (count - 1) == 0:
            entry["seconds_per_token"] = seconds_per_token(model, cache, last.argmax(-1), steps)
        entries.append(entry)
    return entries


@styled
def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Plot perplexity and seconds of each chunk against the position, as SVG and PNG."""
    figure = new_figure(9, 3.5)
    axes = figure.subplots(1, 2)
    for name, entries in results.items():
        ends = [entry["end"] for entry in entries]
        for axis, key in zip(axes, ("perplexity", "seconds"), strict=True):
            axis.plot(ends, [entry[key] for entry in entries], label=name, marker=".")
    axes[0].set(yscale="log", xlabel="position (tokens)", ylabel=f"perplexity of the last {CHUNK} tokens")
    axes[1].set(xlabel="position (tokens)", ylabel=f"seconds for {CHUNK} tokens", ylim=(0, None))
    axes[0].legend()
    for file in save_figure(figure, path.with_name(f".{path.name}")):
        os.replace(file, file.with_name(file.name[1:]))


@only_errors("transformers")
def main() -> None:
    """Read the document with each model and write long_text.json and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--teacher", default=None, help="also the untouched model: quadratic, minutes")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=0, help="time so many generated tokens at 1, 2, 4, ... chunks")
    parser.add_argument("--out", type=Path, default=Path("out/long-text"))
    options = parser.parse_args()
    student, tokenizer = load_checkpoint(options.folder)
    teacher = load_checkpoint(options.teacher) if options.teacher else (None, None)
    ids = document(tokenizer or teacher[1], options.tokens)
    models = {"Nyström": student.eval(), "sinks and window only": without_far_field(student).eval()}
    if teacher[0] is not None:
        models["teacher"] = teacher[0].eval()
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, model in models.items():
        results[name] = read_in_chunks(model, ids, steps=options.steps)
        for entry in results[name]:
            step = f" {entry['seconds_per_token'] * 1e3:7.1f} ms/token" if "seconds_per_token" in entry else ""
            print(f"{name:<22} {entry['end']:>7} {entry['perplexity']:9.2f} {entry['seconds']:7.2f} s "
                  f"{entry['cache_bytes']:>12,} bytes{step}", flush=True)  # fmt: skip
        write_json(options.out / "long_text.json", {"chunk": CHUNK, "results": results})
    plot(results, options.out / "long_text")


if __name__ == "__main__":
    main()
