"""The table of choices that the native family's tests share, and tiny models for each."""

import torch

from distattn_hf import (
    DistAttnConfig,
    DistAttnForCausalLM,
    DistAttnForConditionalGeneration,
    DistAttnForMaskedLM,
    DistAttnSeq2SeqConfig,
)

VOCAB = 29
ENCODINGS = ("sinusoidal", "learned", "rotary", "relative", "alibi", "decay", "none")
BIASES = ("relative", "alibi", "decay")
FORMS = ("causal", "bidirectional", "cross")
# Options small enough for a few tokens to leave windows, blocks and bases.
OPTIONS = {
    "lp": {"p": 1.5},
    "nystrom": {"num_landmarks": 4, "window_size": 8, "num_sinks": 2},
    "retrieval": {"window_size": 3, "num_sinks": 1, "block_size": 2, "num_blocks": 2},
    "local": {"window_size": 3},
    "strided": {"window_size": 2, "stride": 3, "num_strides": 4},
    "bigbird": {"block_size": 2, "window_blocks": 1, "num_random_blocks": 1, "num_global_blocks": 1},
    "landmark": {"block_size": 2, "num_blocks": 2, "num_candidates": 8},
    "linformer": {"rank": 4},
    "performer": {"num_features": 8},
    "relative": {"max_distance": 4},
}
# Which forms a mechanism has, and whether a bias can be added to its logits: a new one needs a row.
HAS = {
    "dot": (FORMS, True),
    "sqeuclidean": (FORMS, True),
    "l2": (FORMS, True),
    "l1": (FORMS, True),
    "lp": (FORMS, True),
    "cosine": (FORMS, True),
    "chebyshev": (FORMS, True),
    "nystrom": (FORMS, True),
    "retrieval": (FORMS, True),
    "local": (("causal", "bidirectional"), True),
    "strided": (("causal", "bidirectional"), True),
    "bigbird": (("causal", "bidirectional"), True),
    "landmark": (("causal", "bidirectional"), True),
    "linear": (FORMS, False),
    "linformer": (("bidirectional", "cross"), False),
    "performer": (FORMS, False),
    "relative": (("causal", "bidirectional"), True),
}
CAUSAL = [name for name, (forms, _) in HAS.items() if "causal" in forms]


def possible(mechanism: str, encoding: str, form: str) -> bool:
    """Whether the combination exists. Cross-attention gets no bias; Nyström takes only one that becomes constant."""
    forms, takes_bias = HAS[mechanism]
    if form not in forms:
        return False
    if encoding not in BIASES or form == "cross":
        return True
    return takes_bias and not (mechanism == "nystrom" and encoding in ("alibi", "decay"))


def make_config(mechanism: str, encoding: str, form: str, /, **settings) -> DistAttnConfig:
    """Two layers, d = 8; in the form "cross" the mechanism is that of cross-attention, and "dot" of the rest."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 8,
        "initializer_range": 0.3,
        "positional_encoding": encoding,
        **settings,
    }
    options = OPTIONS.get(mechanism, {})
    if form == "cross":
        return DistAttnSeq2SeqConfig(**{"cross_mechanism": mechanism, "cross_options": options, **settings})
    settings = {"mechanism_options": options, **settings}
    return DistAttnConfig(mechanism=mechanism, is_decoder=form == "causal", **settings)


def make_model(mechanism: str, encoding: str, form: str, /, seed: int = 0, **settings):
    """The language model of a form, in eval mode."""
    config = make_config(mechanism, encoding, form, **settings)
    classes = {
        "causal": DistAttnForCausalLM,
        "bidirectional": DistAttnForMaskedLM,
        "cross": DistAttnForConditionalGeneration,
    }
    torch.manual_seed(seed)
    model = classes[form](config).eval()
    for name, parameter in model.named_parameters():
        if "log_ratio" in name:  # all rates are ALiBi's before training
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(batch: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random ids (B, N), none of them padding or special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
