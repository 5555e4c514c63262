"""What a conversion without training costs, on real checkpoints.

`python -m distattn_hf.experiments.conversion_quality {iglm|minilm|smollm2} [METRIC ...] [softening=0]` is the same with
other words.
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..benchmark.measure import only_errors
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..data.sources import news_articles
from ..evaluation.score import EvaluationOptions, TokenScores, embedding_agreement, evaluate_model
from ..storage.models import load_checkpoint
from .run_experiment import run_experiment

METRICS = ("sqeuclidean", "l2", "cosine", "l1", "lp", "chebyshev")
# Tokens that IgLM's own generation forbids, and the end token.
_FORBIDDEN, _END = [0, 1, *range(25, 33)], 2


def sample_sequences(model, tokenizer, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Sample `count` antibody sequences from IgLM at temperature 1, padded on the right: its package has no data."""
    torch.manual_seed(seed)
    chains = tokenizer.convert_tokens_to_ids(["[HEAVY]", "[LIGHT]"])
    species = tokenizer.convert_tokens_to_ids(["[HUMAN]", "[MOUSE]", "[RABBIT]", "[CAMEL]"])
    start = torch.tensor([[chains[index % 2], species[index % 4]] for index in range(count)])
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), max_length=150, do_sample=True, top_k=0, eos_token_id=_END,
        pad_token_id=0, bad_words_ids=[[index] for index in _FORBIDDEN],
    )  # fmt: skip
    after_end = ((ids == _END).cumsum(-1) - (ids == _END).int()) > 0
    return {"input_ids": ids.masked_fill(after_end, 0), "attention_mask": (~after_end).long()}


@torch.no_grad()
def batch_perplexity(model, batch) -> float:
    """Return the perplexity per token of one padded batch, without padding."""
    sums = TokenScores("causal-lm")
    sums.add(model(**batch).logits, batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    return sums.scores()["perplexity"]


def iglm():
    """Return (model, tokenizer, calibration, score function): perplexity on 64 sequences, calibrated on 48 others."""
    model, tokenizer = load_checkpoint("iglm")
    calibration = [sample_sequences(model, tokenizer, 48, seed=0)]
    held_out = sample_sequences(model, tokenizer, 64, seed=1)
    return model, tokenizer, calibration, lambda candidate: {"perplexity": batch_perplexity(candidate, held_out)}


def minilm():
    """Score the mean reciprocal rank, title to article, on the last 300 articles; calibrated on the first 48."""
    model, tokenizer = load_checkpoint("minilm")
    articles = news_articles()
    pairs = [(article["title"], article["text"]) for article in articles[-300:]]
    calibration = [text for article in articles[:48] for text in (article["title"], article["text"])]
    options = EvaluationOptions(progress=False)

    def score(candidate):
        scores = evaluate_model(candidate, tokenizer, [], pairs=pairs, options=options)
        cosine = embedding_agreement(candidate, model, tokenizer, [pair[1] for pair in pairs[:64]], options)
        return {"mrr": scores["mrr"], "cosine": cosine}

    return model, tokenizer, calibration, score


def smollm2(max_tokens: int = 4096):
    """Score perplexity at 512 tokens on articles from the 3,001st on; calibrated on 8,192 tokens of the first 200."""
    model, tokenizer = load_checkpoint("smollm2-135m")
    texts = [article["text"] for article in news_articles()]
    options = EvaluationOptions(max_length=512, max_tokens=max_tokens, progress=False)
    return (model, tokenizer, texts[:200], lambda m: evaluate_model(m, tokenizer, texts[3000:], options=options))


CHECKPOINTS = {"iglm": iglm, "minilm": minilm, "smollm2": smollm2}
INITS = ("plain", "calibrated")
AXES = ("metrics", "inits")


@dataclass(frozen=True)
class Options:
    """checkpoint: iglm (perplexity of antibody sequences), minilm (articles found by their titles) or smollm2
    (perplexity of news at 512 tokens). metrics: of its conversions, lp with p = 3. inits: plain, calibrated. softening:
    ε of all of them, 0 the plain distances; null: fitted by calibrated, none of plain.
    """

    checkpoint: str = "smollm2"
    metrics: tuple[str, ...] = METRICS
    inits: tuple[str, ...] = INITS
    softening: float | None = None

    def __post_init__(self):
        if self.checkpoint not in CHECKPOINTS:
            raise ValueError(f"checkpoint must be one of {', '.join(CHECKPOINTS)}, got {self.checkpoint!r}")
        for init in self.inits:
            if init not in INITS:
                raise ValueError(f"inits must be among {', '.join(INITS)}, got {init!r}")
        for metric in self.metrics:
            self.spec(metric)

    def spec(self, metric: str) -> AttentionSpec:
        """Return what replaces dot-product attention."""
        return AttentionSpec(metric, p=3.0 if metric == "lp" else None, softening=self.softening)


QUICK = {"metrics": ("l2",), "inits": ("plain",)}


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Score the teacher, then each conversion: a row each, with its ratios to the teacher's scores."""

    @cache
    def task():
        return CHECKPOINTS[options.checkpoint]()

    teacher = results.row({"attention": "teacher", "init": None}, lambda: task()[3](task()[0]))
    for metric in options.metrics:
        for init in options.inits:

            def measure(metric=metric, init=init):
                model, tokenizer, calibration, score = task()
                texts = calibration if init == "calibrated" else None
                student = convert(model, options.spec(metric), init=init, calibration=texts, tokenizer=tokenizer)
                scores, report = score(student), student.conversion_report
                ratios = {f"{name}_ratio": value / teacher[name] for name, value in scores.items()}
                return {
                    **scores, **ratios, "divergence": report.mean_divergence_after, "alpha": report.mean_alpha,
                    "softening_ratio": report.median_softening_ratio, "convert_seconds": report.seconds,
                }  # fmt: skip

            results.row({"attention": metric, "init": init}, measure)


def main(names: list[str]) -> None:
    """Run the experiment on a checkpoint, by metrics and softening=0 as they are named."""
    if not names or names[0] not in CHECKPOINTS:
        raise SystemExit(__doc__)
    metrics = [name for name in names[1:] if "=" not in name]
    given = [f"checkpoint={names[0]}", *(name for name in names[1:] if "=" in name)]
    given += [f"metrics={','.join(metrics)}"] if metrics else []
    run_experiment("conversion_quality", Path("out", "experiments", f"conversion_quality-{names[0]}"), given)


if __name__ == "__main__":
    main(sys.argv[1:])
