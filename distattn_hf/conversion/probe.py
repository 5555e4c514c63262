"""Which key heads look things up far away: key-value texts, and what hiding the far keys from one head costs.

A text holds pairs of a few random tokens each, key and value, spread over running text, and at its end asks for all of
them: a key, then its value again. Queries of that end run once for each key head with its far keys hidden, so that it
sees sinks and window alone, beside the teacher's own attention in every other head; its rise of the log-loss of the
values says what it looks up. All before the end is read once and kept in a cache.

After: Retrieval-Aware Distillation (2026), which ranks heads by ablation on such texts.
"""

import copy
import random
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..core.compatibility import CACHE_NAME, cache_of
from ..core.parameters import NystromParameters
from ..data.batches import length_for
from .observe import observed, teacher_attention

# Pairs of a text, tokens of a key and of a value, and texts of each length.
PAIRS, KEY, VALUE, TEXTS = 8, 3, 3, 2
_QUESTION = PAIRS * (KEY + VALUE)


def key_value_text(
    stream: Tensor, ids: Tensor, length: int, span: tuple[int, int], draw: random.Random, depth: float | None = None
) -> tuple[Tensor, int]:
    """Return ids (1, length) of a text that ends with its question, and where the last pair that it asks for begins.

    The question is all pairs in some order, _QUESTION tokens, each key and its value again; with a depth, the last one
    is the pair that stands after that share of the running text.

    stream (n,): running text, which is repeated where it is short; ids: those that pairs are drawn from; span: how many
    first and last tokens of the running text hold no pair.
    """
    pairs = [torch.tensor(draw.choices(ids.tolist(), k=KEY + VALUE)) for _ in range(PAIRS)]
    room = length - 2 * _QUESTION
    start = draw.randrange(max(1, len(stream) - room))
    filler = stream.repeat(-(-(start + room) // len(stream)))[start : start + room]
    places = draw.choices(range(span[0], room - span[1] + 1), k=PAIRS)
    if depth is not None:
        places[0] = round(depth * room)
    target, places = places[0], sorted(places)
    parts = [part for pair in zip(filler.tensor_split(places), [*pairs, pairs[0][:0]], strict=True) for part in pair]
    order = draw.sample(range(PAIRS), PAIRS)
    if depth is not None:
        order.append(order.pop(order.index(places.index(target))))
    place = places[order[-1]] + order[-1] * (KEY + VALUE)
    return torch.cat([*parts, *(pairs[number] for number in order)])[None], place


def answer_loss(logits: Tensor, question: Tensor) -> float:
    """Return the mean log-loss of the values' tokens in a question (1, n) whose logits (1, n, V) are given."""
    place = torch.arange(question.shape[1])
    is_answer = place % (KEY + VALUE) >= KEY
    return F.cross_entropy(logits[0, :-1][is_answer[1:]].float(), question[0, is_answer]).item()


class _Observer:
    """The teacher's attention in every head, but for those of one key head, which see sinks and window alone."""

    def __init__(self, model):
        self.names = {state: name for name, state in model.attention_states.items()}
        self.groups: dict[str, int] = {}
        self.hidden: tuple[str, int] | None = None

    def __call__(self, state, query, key, value, call):
        name, num_queries, num_keys = self.names[state], query.shape[2], key.shape[2]
        if not call.is_causal:
            raise ValueError(f"select='probe' asks for what came before, and {name!r} is not causal; leave it out")
        self.groups[name] = call.groups
        if num_queries == num_keys:
            return teacher_attention(query, key, value, call)
        place = torch.arange(num_keys, device=query.device)
        behind = place[-num_queries:, None] - place
        seen = (behind >= 0).expand(state.num_heads, -1, -1)
        if self.hidden is not None and self.hidden[0] == name:
            spec = far_spec(state)
            is_hidden = torch.arange(state.num_heads, device=query.device) // call.groups == self.hidden[1]
            near = (behind < spec.window_size) | (place < spec.num_sinks)
            seen = seen & (near | ~is_hidden[:, None, None])
        return teacher_attention(query, key, value, replace(call, mask=seen[None], is_causal=False))


def far_spec(state):
    """Return the spec of a module's Nyström heads, or None."""
    return next((group.spec for group in state.groups if isinstance(group, NystromParameters)), None)


@torch.no_grad()
def probe(model, batch: dict[str, Tensor], options) -> tuple[dict[tuple[str, int], float], dict[str, int]]:
    """Return ({(module name, key head): rise of the log-loss of values, in nats}, {module name: heads of a key head}).

    Of the key heads of Nyström modules, with the running text of a calibration batch around the pairs.

    Raises `ValueError` for a model that does not read on from a cache, and for lengths that it or the pairs do not
    allow.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"select='probe' needs a causal language model, got {type(model).__name__}; use select='error'"
        )
    keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    stream = batch["input_ids"][keep].cpu()
    config = model.config.get_text_config()
    special = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    ids = torch.tensor([token for token in stream.unique().tolist() if token not in special])
    specs = {name: spec for name, state in model.attention_states.items() if (spec := far_spec(state))}
    span = max(spec.num_sinks for spec in specs.values()), max(spec.window_size for spec in specs.values())
    least, draw = 2 * _QUESTION + sum(span) + 1, random.Random(options.seed)
    for length in options.probe_lengths:
        if not least <= length == length_for(model, length):
            raise ValueError(
                f"probe_lengths must be from {least} (pairs, window and sinks) to {length_for(model, 2**30)} tokens, "
                f"got {length}"
            )
    rises: dict[tuple[str, int], float] = {}
    observer, cache = _Observer(model), None

    def loss(hidden=None):
        observer.hidden = hidden
        # A copy, as not every kind of cache can be cut.
        return answer_loss(model(question, **{CACHE_NAME: copy.deepcopy(cache)}).logits, question)

    texts = [length for length in options.probe_lengths for _ in range(TEXTS)]
    with observed(model, observer), tqdm(texts, desc="probe", unit="text", disable=not options.progress) as bar:
        for length in bar:
            text = key_value_text(stream, ids, length, span, draw)[0].to(batch["input_ids"].device)
            question = text[:, -_QUESTION:]
            cache = cache_of(model.base_model(text[:, :-_QUESTION], use_cache=True))
            whole = loss()
            for name in specs:
                state = model.attention_states[name]
                for key_head in range(state.num_heads // observer.groups[name]):
                    rise = loss((name, key_head)) - whole
                    rises[name, key_head] = rises.get((name, key_head), 0.0) + rise / len(texts)
    return rises, observer.groups
