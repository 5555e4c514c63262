"""What a conversion without training costs, on real checkpoints: by metric, from the plain distance to the teacher.

A distance put in as it is, the plain distance with fitted scales, and softened distances: each budget of KL is what a
fit may lose for a smaller ε, so that the larger it is, the nearer to the plain distance the fit stays.
"""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from ..benchmark.measure import only_errors
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import TRANSFORMS, AttentionSpec
from ..core.metrics import get_metric
from ..core.softening import has_softened_form
from ..data.sources import news_articles
from ..evaluation.score import EvaluationOptions, TokenScores, embedding_agreement, evaluate_model
from ..storage.models import load_checkpoint

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


def seq2seq(folder: str):
    """Score the perplexity of the targets in FOLDER/heldout.tsv, a pair of texts a line below a header, beside an
    encoder-decoder's checkpoint: of every second pair, calibrated on the others.
    """
    model, tokenizer = load_checkpoint(folder)
    lines = (Path(folder) / HELD_OUT).read_text(encoding="utf-8").splitlines()[1:]
    pairs = [tuple(line.split("\t")) for line in lines]
    sources, targets = (tokenizer(side, padding=True, return_tensors="pt") for side in map(list, zip(*pairs[::2])))
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    options = EvaluationOptions(progress=False, batch_size=50)
    return (
        model,
        tokenizer,
        [{**sources, "labels": labels}],
        lambda candidate: evaluate_model(candidate, tokenizer, [], pairs=pairs[1::2], options=options),
    )


CHECKPOINTS = {"iglm": iglm, "minilm": minilm, "smollm2": smollm2}
HELD_OUT = "heldout.tsv"
SWAPPED, PLAIN = "swapped", "plain"
AXES = ("metrics", "fits")
# Scores of which a row has the ratio to the teacher's.
_COMPARED = ("perplexity", "mrr", "cosine")


@dataclass(frozen=True)
class Options:
    """checkpoint: iglm (perplexity of antibody sequences), minilm (articles found by their titles), smollm2 (perplexity
    of news at 512 tokens), or the folder of an encoder-decoder with pairs of texts in heldout.tsv (perplexity of the
    second ones). metrics: of its conversions, lp with p = 3.

    fits: "swapped", the metric as it is, without a fit; "plain", fitted without an ε; or a budget of KL in nats a
    query, under which ε is fitted, for metrics that take one. transform: of the fits, as in `AttentionSpec`; null: its
    default, which has maps for plain distances and none for softened ones. steps: of a fit; null: as in `convert`.
    """

    checkpoint: str = "smollm2"
    metrics: tuple[str, ...] = METRICS
    fits: tuple[str | float, ...] = (SWAPPED, PLAIN, CalibrationOptions.divergence_budget)
    transform: str | None = None
    steps: int | None = None

    def __post_init__(self):
        if self.checkpoint not in CHECKPOINTS and not (Path(self.checkpoint) / HELD_OUT).is_file():
            raise ValueError(
                f"checkpoint must be one of {', '.join(CHECKPOINTS)} or a folder with {HELD_OUT}, got "
                f"{self.checkpoint!r}"
            )
        if self.transform not in (None, *TRANSFORMS):
            raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)} or null, got {self.transform!r}")
        for fit in self.fits:
            for metric in self.metrics:
                self.asked(metric, fit)

    def asked(self, metric: str, fit: str | float) -> tuple[AttentionSpec, CalibrationOptions]:
        """Return what replaces dot-product attention, and the options of the fit.

        Raises `ValueError` for a fit that is neither "swapped", "plain" nor a number of nats.
        """
        if isinstance(fit, str) and fit not in (SWAPPED, PLAIN):
            raise ValueError(f"fits must be among {SWAPPED}, {PLAIN} and numbers of nats, got {fit!r}")
        p = 3.0 if metric == "lp" else None
        if fit == SWAPPED:
            return AttentionSpec(metric, p=p), CalibrationOptions()
        spec = AttentionSpec(metric, p=p, transform=self.transform, softening=0 if fit == PLAIN else None)
        budget = {} if fit == PLAIN else {"divergence_budget": fit}
        return spec, CalibrationOptions(steps=self.steps, progress=False, **budget)


QUICK = {"metrics": ("l2",), "fits": (SWAPPED,)}


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Score the teacher, then each conversion: a row each, with its ratios to the teacher's scores."""

    @cache
    def task():
        return (CHECKPOINTS.get(options.checkpoint) or partial(seq2seq, options.checkpoint))()

    def measure(metric: str, fit: str) -> dict:
        model, tokenizer, calibration, score = task()
        spec, of_fit = options.asked(metric, fit)
        fitted = {"calibration": calibration, "tokenizer": tokenizer, "options": of_fit}
        student = convert(model, spec, **({"init": "plain"} if fit == SWAPPED else fitted))
        scores, report = score(student), student.conversion_report
        ratios = {f"{name}_ratio": scores[name] / teacher[name] for name in _COMPARED if name in scores}
        return {
            **scores, **ratios, "divergence": report.mean_divergence_after, "alpha": report.mean_alpha,
            "softening_ratio": report.median_softening_ratio, "convert_seconds": report.seconds,
        }  # fmt: skip

    teacher = results.row({"attention": "teacher", "fit": None}, lambda: task()[3](task()[0]))
    for metric in options.metrics:
        for fit in options.fits:
            if not isinstance(fit, str) and not has_softened_form(get_metric(metric)):
                results.echo(f"left out: {metric}, {fit}: it takes no ε, so its fit is the plain one")
                continue
            results.row({"attention": metric, "fit": fit}, partial(measure, metric, fit))
