"""What retrieval attention keeps of SmolLM2: a hidden number and perplexity, against the keys that are read.

python -m distattn_hf.experiments.retrieval_quality OUT.json [--lengths 1024,2048,4096] [--blocks 8,16,26]
    [--alone 0,16] [--samples 10] [--rows 2]

No fit, no training. --blocks: with the far field; --alone: without it, where 0 blocks are sinks and window. A number
stands at five depths in news that no fit saw; a hit is all of its digits as the likeliest next tokens. Perplexity is of
--rows rows of the same news. The file is written after every length and setting, and a run that was cut off goes on
from it.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
from transformers.utils import logging

from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..data.packing import token_stream
from ..data.sources import read_texts
from ..storage.folders import write_json
from ..storage.models import load_checkpoint

DEPTHS = 5


def hidden_number(tokenizer, ids: list[int], length: int, sample: int) -> tuple[torch.Tensor, int]:
    """Return ids (1, length) of news with a number hidden in them that the end asks for, and how many tokens it has."""
    draw = random.Random(sample)
    secret = str(draw.randint(10_000, 99_999))

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    needle = encode(f" The pass key is {secret}. Keep it in mind: {secret} is the pass key. ")
    question, answer = encode("\n\nQuestion: what is the pass key?\nAnswer: the pass key is"), encode(f" {secret}")
    room = length - len(needle) - len(question) - len(answer)
    start, depth = draw.randint(0, len(ids) - room - 1), int(room * (sample % DEPTHS + 0.25) / DEPTHS)
    body = ids[start : start + room]
    return torch.tensor([body[:depth] + needle + body[depth:] + question + answer]), len(answer)


@torch.no_grad()
def measure(model, tokenizer, ids: list[int], length: int, samples: int, rows: int) -> dict:
    """Return hits, the mean log-loss of the number's tokens, and perplexity."""
    hits, losses = 0, []
    for sample in range(samples):
        text, count = hidden_number(tokenizer, ids, length, sample)
        logits = model(text, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].float()
        answer = text[0, -count:]
        # The first token is a space, or what the tokenizer makes of it.
        hits += bool((logits.argmax(-1) == answer)[1:].all())
        losses.append(torch.nn.functional.cross_entropy(logits, answer).item())
    texts = torch.tensor(ids[: rows * length]).view(rows, 1, length)
    nats = [model(text, labels=text, use_cache=False).loss.item() for text in texts]
    return {
        "hits": hits,
        "samples": samples,
        "log_loss": sum(losses) / len(losses),
        "perplexity": math.exp(sum(nats) / len(nats)),
        "rows": rows,
    }


def share_read(spec: AttentionSpec, length: int) -> float:
    """Return the share of the keys before it that the last query of a text reads, at most."""
    blocks = -(-spec.num_sinks // spec.block_size) + -(-(spec.window_size - 1) // spec.block_size) + 1 + spec.num_blocks
    return min(1.0, blocks * spec.block_size / length)


def main(out: Path, lengths: list[int], budgets: list[int], alone: list[int], samples: int, rows: int) -> None:
    """Measure what the file does not hold yet, print a line for each setting and write the file."""
    logging.set_verbosity_error()
    results = (
        json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"checkpoint": "smollm2-135m", "rows": []}
    )
    model, tokenizer = load_checkpoint("smollm2-135m")
    model.eval()
    ids = token_stream(tokenizer, read_texts("news", split="test"), max(60_000, max(lengths) * rows))
    done = {(row["length"], row["num_blocks"], row["far_field"]) for row in results["rows"]}
    settings = [(None, None), *((n, True) for n in budgets), *((n, False) for n in alone)]
    for length in lengths:
        for budget, far_field in settings:
            if (length, budget, far_field) in done:
                continue
            student, share = model, 1.0
            if budget is not None:
                spec = AttentionSpec(mechanism="retrieval", num_blocks=budget, far_field=far_field)
                student, share = convert(model, spec), share_read(spec, length)
            row = {"length": length, "num_blocks": budget, "far_field": far_field, "share_read": share}
            results["rows"].append(row | measure(student, tokenizer, ids, length, samples, rows))
            write_json(out, results)
            print(results["rows"][-1], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for option, default in (("--lengths", "1024,2048,4096"), ("--blocks", "8,16,26"), ("--alone", "0,16")):
        parser.add_argument(option, default=default, type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--rows", type=int, default=2)
    given = parser.parse_args()
    main(given.out, given.lengths, given.blocks, given.alone, given.samples, given.rows)
