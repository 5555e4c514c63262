"""What conversions cost small models with learned sinks (gpt-oss) or capped logits (Gemma 2), trained on a text here.

Bytes are the tokens, nine tenths of the text train the model and calibrate, the rest is scored. No checkpoint of these
architectures is small enough to be at hand.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, PreTrainedModel

from ..benchmark.measure import only_errors
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..data.sources import read_texts

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "sliding_window": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
KINDS = ("sinks", "caps")
ROWS, LENGTH = 16, 128
LEARNING_RATE = 5e-3
SPECS = {
    "sqeuclidean": AttentionSpec("sqeuclidean"),
    **{metric: AttentionSpec(metric) for metric in ("l2", "cosine", "l1")},
    **{f"{metric} ε 0": AttentionSpec(metric, softening=0) for metric in ("l2", "cosine", "l1")},
}


def build(kind: str) -> PreTrainedModel:
    """Build a small gpt-oss ("sinks") or Gemma 2 ("caps") with random weights."""
    torch.manual_seed(0)
    if kind == "sinks":
        return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=3.0, query_pre_attn_scalar=16))


def rows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw rows of a text, (count, length)."""
    starts = torch.randint(0, len(text) - length, (count,), generator=generator).tolist()
    return torch.stack([text[start : start + length] for start in starts])


def train(model: PreTrainedModel, text: Tensor, steps: int) -> PreTrainedModel:
    """Train on rows of a text, in place; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(steps):
        ids = rows(text, ROWS, LENGTH, generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel, text: Tensor) -> float:
    """Return the perplexity of a byte, over 32 rows of a text."""
    ids = rows(text, 32, 2 * LENGTH, torch.Generator().manual_seed(1))
    return math.exp(sum(float(model(input_ids=part, labels=part).loss) for part in ids.split(8)) / 4)


def calibration(text: Tensor) -> list[dict[str, Tensor]]:
    """Return 16 rows of a text as batches for `convert`."""
    ids = rows(text, 16, 2 * LENGTH, torch.Generator().manual_seed(2))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]


@dataclass(frozen=True)
class Options:
    """data: a text file, news or a data set: its bytes are the tokens. kinds: of models, sinks (gpt-oss) and caps
    (Gemma 2). attentions: of conversions: sqeuclidean, l2, cosine, l1, and "l2 ε 0", the plain distance, of the last
    three. steps: of the training of each model.
    """

    data: str = "news"
    kinds: tuple[str, ...] = KINDS
    attentions: tuple[str, ...] = tuple(SPECS)
    steps: int = 400

    def __post_init__(self):
        for name, allowed in (("kinds", KINDS), ("attentions", tuple(SPECS))):
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name} must be among {'; '.join(allowed)}, got {value!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps!r}")


QUICK = {"kinds": ("caps",), "attentions": ("l2",), "steps": 2}
AXES = ("kinds", "attentions")


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Train a model of each kind, and measure a row for it, its exact conversion and each other one."""
    text = torch.tensor(list("\n\n".join(read_texts(options.data)).encode("utf-8")))
    cut = len(text) * 9 // 10
    for kind in options.kinds:

        @cache
        def teacher(kind=kind):
            return train(build(kind), text[:cut], options.steps)

        def scored(student) -> dict:
            return {"perplexity": perplexity(student, text[cut:])}

        reference = results.row({"kind": kind, "attention": "teacher"}, lambda: scored(teacher()))["perplexity"]
        results.row(
            {"kind": kind, "attention": "exact"}, lambda: scored(convert(teacher(), AttentionSpec(), init="exact"))
        )
        for name in options.attentions:

            def measure(spec=SPECS[name], reference=reference):
                fit = CalibrationOptions(progress=False)
                student = convert(teacher(), spec, calibration=calibration(text[:cut]), options=fit)
                values = scored(student)
                return {
                    **values, "ratio": values["perplexity"] / reference,
                    "divergence": student.conversion_report.mean_divergence_after,
                    "plain": perplexity(convert(teacher(), spec, init="plain"), text[cut:]),
                }  # fmt: skip

            results.row({"kind": kind, "attention": name}, measure)
