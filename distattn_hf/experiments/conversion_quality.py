"""What a conversion without training costs, on real checkpoints: the quality tables of the README.

python -m distattn_hf.experiments.conversion_quality {iglm|minilm|smollm2} [METRIC ...] [softening=0]

softening=0: the plain distances.
"""

import sys
import time

import torch

from ..benchmark.measure import only_errors
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
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


@only_errors("transformers")
def main(names: list[str]) -> None:
    """Print one line per metric and initialisation, as each is ready."""
    if not names or names[0] not in ("iglm", "minilm", "smollm2"):
        raise SystemExit(__doc__)
    model, tokenizer, calibration, score = globals()[names[0]]()
    teacher = score(model)
    print("teacher", teacher, flush=True)
    plain = "softening=0" in names
    for metric in [name for name in names[1:] if name != "softening=0"] or METRICS:
        spec = AttentionSpec(metric, p=3.0 if metric == "lp" else None, softening=0 if plain else None)
        for init in ("plain", "calibrated"):
            start = time.perf_counter()
            texts = calibration if init == "calibrated" else None
            student = convert(model, spec, init=init, calibration=texts, tokenizer=tokenizer)
            seconds = time.perf_counter() - start
            scores = score(student)
            ratios = {name: round(value / teacher[name], 4) for name, value in scores.items()}
            summary = student.conversion_report.summary()
            print(f"{metric:<12} {init:<11} {scores} ratio {ratios} {seconds:.0f} s  {summary}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
