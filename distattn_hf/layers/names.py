"""Other names of a layer's settings, as papers, PyTorch and transformers have them; one word of each is ours."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps

ALIASES = {
    "distance_type": "metric",
    "lambda_param": "lam",
    "p_norm": "p",
    "use_learnable_lambda": "learnable_lambda",
    **dict.fromkeys(("d_model", "embed_dim"), "hidden_size"),
    **dict.fromkeys(("num_attention_heads", "n_heads", "nhead"), "num_heads"),
    **dict.fromkeys(("attention_type", "encoding_type"), "name"),
    "max_len": "max_length",
    "d_v": "value_head_dim",
}

# What is no setting of a layer, and where it is.
_ELSEWHERE = {
    "enable_performance_monitoring": "call layer.enable_performance_monitoring()",
    **dict.fromkeys(
        ("log_attention_weights", "return_attention_weights"),
        "call the layer with output_attentions=True; in training, Trainer logs with AttentionLoggingCallback",
    ),
    **dict.fromkeys(
        ("mechanism", "mechanism_options"),
        "AttentionFactory.create('local', ...) is a layer with a mechanism, DistAttnConfig(mechanism=...) a model",
    ),
    **dict.fromkeys(
        ("sparsity_ratio", "keep_ratio"),
        "'retrieval' reads the num_blocks best blocks of block_size keys, or those with min_weight",
    ),
}
_WORDS_AT_CALL = {"need_weights": "output_attentions", "mask": "attention_mask"}


def canonical(given: dict, known: Iterable[str], what: str) -> dict:
    """Return settings under the names that `known` lists, aliases translated.

    Raises `ValueError` for a name that means nothing, with the nearest ones, and for a setting given twice.
    """
    known, found = list(known), {}
    for name, value in given.items():
        own = name if name in known else ALIASES.get(name, name)
        if own not in known:
            if name in _ELSEWHERE:
                raise ValueError(f"{what} has no option {name!r}: {_ELSEWHERE[name]}")
            nearest = [ALIASES.get(match, match) for match in get_close_matches(name, [*known, *ALIASES])]
            nearest = [match for match in dict.fromkeys(nearest) if match in known]
            hint = f"did you mean {', '.join(nearest)}?" if nearest else f"its options are: {', '.join(known)}"
            raise ValueError(f"{what} has no option {name!r}; {hint}")
        if own in found:
            raise ValueError(f"{what}: {name!r} is another name of {own!r}, which is given, too")
        found[own] = value
    return found


def with_aliases(kind: type) -> type:
    """Let a dataclass be made by the other names of its fields, too, and refuse unknown ones by name."""
    made = kind.__init__

    @wraps(made)
    def __init__(self, *args, **given):
        made(self, *args, **canonical(given, names, kind.__name__))

    names = [field.name for field in fields(kind)]
    kind.__init__ = __init__
    return kind


def with_words_at_call(forward: Callable) -> Callable:
    """Let a layer's `forward(hidden_states, key_value_states, ...)` be called by PyTorch's and papers' words, too."""

    @wraps(forward)
    def called(self, *args, **given):
        for word, own in _WORDS_AT_CALL.items():
            if word in given:
                if own in given:
                    raise ValueError(f"{word!r} is another name of {own!r}, which is given, too")
                given[own] = given.pop(word)
        if {"query", "key", "value"} & given.keys():
            args = (*_sequences(args, given), *args)
        return forward(self, *args, **given)

    return called


def _sequences(args: tuple, given: dict) -> tuple:
    """Take query, key and value out of a call; return (hidden_states, key_value_states or None for self-attention)."""
    query = given.pop("query", None)
    key, value = given.pop("key", query), given.pop("value", None)
    if args or query is None or {"hidden_states", "key_value_states"} & given.keys():
        raise ValueError("give query= (and key=, value= of another sequence), or hidden_states and key_value_states")
    if value is not None and value is not key:
        raise ValueError(
            "key and value must be one tensor here; distattn_hf.DistanceMultiheadAttention takes three sequences"
        )
    return query, None if key is query else key
