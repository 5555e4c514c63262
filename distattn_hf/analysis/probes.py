"""Probe what single heads look for: what followed a token before, what repeats, and pairs of tokens from a user."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.config import is_integer
from .importance import HeadImportance
from .samples import padding_of
from .watch import attention_modules, no_weights, run_watched


def induction_scores(model, *, length: int = 50, texts: int = 4, seed: int = 0) -> HeadImportance:
    """Score how far each head looks at what followed the same token before, from 0 to 1 (kind "induction").

    `length` random tokens are read twice in a row; the score is the mean weight of a query of the second half on the
    token after its first occurrence (Olsson et al., In-context learning and induction heads, 2022). Such heads copy
    from far away: `AttentionSpec(layers=..., heads=...)` can leave them exact.

    Raises `ValueError` for a model that is not causal, and for numbers below 2 (length) or 1 (texts).
    """
    if not is_integer(length, 2) or not is_integer(texts, 1):
        raise ValueError(f"length must be an integer >= 2 and texts >= 1, got {length!r} and {texts!r}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    # No token twice in a half, where the vocabulary allows it, so that there is one place to look at.
    draws = [torch.randperm(vocabulary, generator=generator).repeat(-(-length // vocabulary)) for _ in range(texts)]
    half = torch.stack([draw[:length] for draw in draws])
    scores: dict[str, list[float]] = {}

    def add(call):
        if call.kind != "self" or call.shape[2:] != (2 * length, 2 * length):
            return
        total = torch.zeros(call.shape[1], dtype=torch.float64)
        for rows in call.blocks():
            query = torch.arange(rows.start, rows.start + rows.weights.shape[2], device=rows.weights.device)
            if bool((rows.weights * (torch.arange(2 * length, device=query.device) > query[:, None])).any()):
                raise ValueError(f"induction heads are those of causal models; {call.name!r} sees what comes after")
            second = query >= length
            target = (query[second] - length + 1).expand(*rows.weights.shape[:2], -1)[..., None]
            total += rows.weights[:, :, second].gather(3, target).double().sum((0, 2, 3)).cpu()
        scores[call.name] = (total / (len(half) * length)).tolist()

    run_watched(model, {"input_ids": half.repeat(1, 2).to(model.device)}, add)
    if not scores:
        raise no_weights(model, "has no causal self-attention")
    return HeadImportance("induction", None, scores)


@dataclass(frozen=True)
class Period:
    """The period of a head, in tokens, and its strength from 0 to 1 (see `periodic_scores`)."""

    period: int
    strength: float


@torch.no_grad()
def periodic_scores(model, batches: Sequence[dict], *, longest: int = 32) -> dict[str, list[Period]]:
    """Find for each head of self-attention after how many tokens its attention comes back: {module: one per head}.

    a(o), the mean weight at offset o = 1 ... 3·longest before the query (as far as the texts reach), less its
    straight line, is folded by each period p: strength is the share of its variance that the mean at each phase
    explains, less what p means explain of noise (epoch folding). Smooth decay, a window and a sink have none.

    Raises `ValueError` for `longest` < 2, and for texts of fewer than 3·2 + 1 tokens.
    """
    if not is_integer(longest, 2):
        raise ValueError(f"longest must be an integer >= 2, got {longest!r}")
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:

        def add(call, batch=batch):
            if call.kind != "self":
                return
            queries, keys = padding_of(model, call, batch)
            reach = min(3 * longest, call.shape[3] - 1)
            total, count = torch.zeros(call.shape[1], reach, dtype=torch.float64), torch.zeros(reach)
            for rows in call.blocks():
                for offset in range(1, reach + 1):
                    stop = rows.start + rows.weights.shape[2]
                    query = torch.arange(min(max(rows.start, offset), stop), stop)
                    weights = rows.weights[:, :, query - rows.start, query - offset]
                    counted = queries[:, query] & keys[:, query - offset]
                    total[:, offset - 1] += (weights * counted[:, None]).double().sum((0, 2)).cpu()
                    count[offset - 1] += counted.sum().cpu()
            known = sums.get(call.name)
            if known is not None:
                reach = min(reach, len(known[1]))
                total, count = total[:, :reach] + known[0][:, :reach], count[:reach] + known[1][:reach]
            sums[call.name] = total, count

        run_watched(model, batch, add)
    found = {}
    for name, (total, count) in sums.items():
        if len(count) < 6:
            raise ValueError(f"periods need texts of 7 tokens or more, got {len(count) + 1}")
        found[name] = [fold_by_period(row, longest) for row in total / count.clamp_min(1)]
    return found


def fold_by_period(values: Tensor, longest: int) -> Period:
    """Return the period 2 ... longest, of a third of the values at most, that explains most of `values` (n,)."""
    values, n = values.double(), len(values)
    line = torch.stack([torch.ones(n), torch.arange(n)], dim=1).to(values)
    residual = values - line @ torch.linalg.lstsq(line, values).solution
    variance, best = float(residual.square().sum()), Period(0, 0.0)
    # What is left of a constant is rounding.
    if variance <= 1e-20 * float(values.square().sum()):
        return best
    for period in range(2, min(longest, n // 3) + 1):
        phases = [residual[phase::period] for phase in range(period)]
        share = sum(len(phase) * float(phase.mean()) ** 2 for phase in phases) / variance
        chance = (period - 1) / (n - 1)
        strength = (share - chance) / (1 - chance)
        if strength > best.strength:
            best = Period(period, strength)
    return best


@dataclass
class PairScore:
    """How far one head connects given pairs: `accuracy`, the share of pairs whose second token has the largest weight
    of all that the first one sees; `weight`, its mean weight; `chance`, the mean weight of a uniform head."""

    module: str
    layer: int | None
    head: int
    pairs: int = field(default=0)
    accuracy: float = 0.0
    weight: float = 0.0
    chance: float = 0.0


@torch.no_grad()
def pair_scores(
    model, batches: Sequence[dict], pairs: Sequence[Sequence[tuple[int, int]]], *, kind: str = "self"
) -> list[PairScore]:
    """Score every head by given pairs of tokens, the best first (Clark et al., What does BERT look at?, 2019).

    Args:
        batches: tokenised texts, as from `samples.make_batches`.
        pairs: for each text, in order, its pairs (from, to) of token positions: dependent and head of a parse, mention
            and antecedent, word and translation (with kind "cross" from target to source). A word's tokens:
            `tokenizer(...).word_to_tokens(...)`.
        kind: "self" or "cross".

    Raises:
        ValueError: for another number of texts, positions outside a text or of padding, no pair, and a model without
            attention of this kind.
    """
    size = sum(len(next(iter(batch.values()))) for batch in batches)
    if len(pairs) != size:
        raise ValueError(f"pairs must have one list for each text, got {len(pairs)} for {size} texts")
    if not any(pairs):
        raise ValueError("pairs holds no pair (from, to) of token positions")
    if kind not in ("self", "cross"):
        raise ValueError(f"kind must be self or cross, got {kind!r}")
    scores: dict[tuple[str, int], PairScore] = {}
    first = 0
    for batch in batches:
        rows = len(next(iter(batch.values())))

        def add(call, batch=batch, first=first):
            if call.kind != kind:
                return
            queries, keys = padding_of(model, call, batch)
            for text in range(call.shape[0]):
                for query, key in pairs[first + text]:
                    _check_pair(first + text, query, key, queries[text], keys[text])
                    _add_pair(scores, call, text, query, key)

        run_watched(model, batch, add)
        first += rows
    if not scores:
        raise no_weights(model, f"has no {kind}-attention" + (" modules" if attention_modules(model) else ""))
    for score in scores.values():
        for name in ("accuracy", "weight", "chance"):
            setattr(score, name, getattr(score, name) / score.pairs)
    return sorted(scores.values(), key=lambda score: (-score.accuracy, -score.weight))


def _check_pair(text: int, query, key, queries: Tensor, keys: Tensor) -> None:
    for role, position, kept in (("from", query, queries), ("to", key, keys)):
        if not is_integer(position, 0) or position >= len(kept) or not bool(kept[position]):
            raise ValueError(
                f"pairs: text {text} has no token {position!r} ({role}); it has {int(kept.sum())} without padding"
            )


def _add_pair(scores: dict, call, text: int, query: int, key: int) -> None:
    rows = call.rows(query, query + 1)
    weights = rows.weights[text, :, 0]
    seen = rows.keep.expand_as(rows.weights)[text, :, 0].sum(-1).clamp_min(1)
    for head, row in enumerate(weights):
        score = scores.setdefault((call.name, head), PairScore(call.name, call.layer, head))
        score.pairs += 1
        score.accuracy += float(int(row.argmax()) == key and row[key] > 0)
        score.weight += float(row[key])
        score.chance += 1.0 / float(seen[head])
