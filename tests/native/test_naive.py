"""The whole model against the same model in plain float64 loops, one query and one key at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tolerances import assert_close

from .choices import BIASES, ENCODINGS, FORMS, HAS, OPTIONS, make_model, possible, tokens

DISTANCES = {
    "sqeuclidean": lambda q, k: sum((a - b) ** 2 for a, b in zip(q, k)),
    "l2": lambda q, k: math.sqrt(sum((a - b) ** 2 for a, b in zip(q, k))),
    "l1": lambda q, k: sum(abs(a - b) for a, b in zip(q, k)),
    "lp": lambda q, k: sum(abs(a - b) ** 1.5 for a, b in zip(q, k)) ** (1 / 1.5),
    "chebyshev": lambda q, k: max(abs(a - b) for a, b in zip(q, k)),
    "cosine": lambda q, k: 1 - dot(q, k) / math.sqrt(dot(q, q) * dot(k, k)),
}


def dot(q, k) -> float:
    return sum(a * b for a, b in zip(q, k))


class Naive:
    """logits of a native model, from its parameters and config alone."""

    def __init__(self, model):
        self.config = model.config
        self.state = {name: value.double() for name, value in model.state_dict().items()}

    def linear(self, x, name):
        bias = self.state.get(f"{name}.bias")
        y = x @ self.state[f"{name}.weight"].T
        return y if bias is None else y + bias

    def norm(self, x, name):
        if self.config.norm_type == "rms_norm":
            return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.state[f"{name}.weight"]
        mean = x.mean(-1, keepdim=True)
        x = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def embed(self, ids, prefix):
        config = self.config
        x = self.state[f"{prefix}embed_tokens.weight"][ids]
        if config.positional_encoding == "sinusoidal":
            x = x * math.sqrt(config.hidden_size)
            for t in range(ids.shape[1]):
                for i in range(config.hidden_size):
                    angle = t / 10000 ** (2 * (i // 2) / config.hidden_size)
                    x[:, t, i] += math.sin(angle) if i % 2 == 0 else math.cos(angle)
        elif config.positional_encoding == "learned":
            x = x + self.state[f"{prefix}positions.position_embeddings.weight"][: ids.shape[1]]
        return x

    def turned(self, vector, t):
        """The pairs (i, i + d/2) of a vector, turned by t·10000^(-2i/d)."""
        half = len(vector) // 2
        result = list(vector)
        for i in range(half):
            angle = t * 10000 ** (-i / half)
            result[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
            result[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
        return result

    def bias(self, head, i, j, is_causal, prefix):
        config = self.config
        if config.positional_encoding in ("alibi", "decay"):
            rate = 2 ** (-8 * (head + 1) / config.num_attention_heads)
            if config.positional_encoding == "decay":
                rate *= math.exp(self.state[f"{prefix}positions.log_ratio.weight"][0, head].item())
            return -rate * abs(i - j)
        # Raffel et al. 2020: below half of the buckets (of a side) one bucket each, then logarithmic.
        buckets, furthest, start, distance = 8, 8, 0, i - j
        if not is_causal:
            buckets, start, distance = 4, (4 if j > i else 0), abs(i - j)
        exact = buckets // 2
        if distance >= exact:
            grown = int(math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact))
            distance = min(exact + grown, buckets - 1)
        return self.state[f"{prefix}positions.relative_attention_bias.weight"][start + distance, head].item()

    def attention(self, x, name, mechanism, *, other=None, is_causal=False, prefix=""):
        config, other, is_cross = self.config, x if other is None else other, other is not None
        heads, size = config.num_attention_heads, config.head_dim
        groups = heads // config.num_key_value_heads
        q, k, v = (self.linear(t, f"{name}.{p}_proj") for t, p in ((x, "q"), (other, "k"), (other, "v")))
        output = torch.zeros_like(x)
        for b in range(len(x)):
            for h in range(heads):
                part, key_part = (slice(n * size, (n + 1) * size) for n in (h, h // groups))
                for i in range(x.shape[1]):
                    logits = []
                    for j in range(other.shape[1] if not is_causal else i + 1):
                        query, key = q[b, i, part].tolist(), k[b, j, key_part].tolist()
                        if config.positional_encoding == "rotary" and not is_cross:
                            query, key = self.turned(query, i), self.turned(key, j)
                        if mechanism == "dot":
                            logit = dot(query, key) / math.sqrt(size)
                        else:
                            lam = self.state[f"{name}.distattn.groups.0.log_lambda"][h].exp().item()
                            logit = -lam / math.sqrt(size) * DISTANCES[mechanism](query, key)
                        if config.positional_encoding in BIASES and not is_cross:
                            logit += self.bias(h, i, j, is_causal, prefix)
                        logits.append(logit)
                    weights = torch.tensor(logits, dtype=torch.float64).softmax(-1)
                    output[b, i, part] = weights @ v[b, : len(logits), key_part]
        return self.linear(output, f"{name}.o_proj")

    def mlp(self, x, name):
        up = self.linear(x, f"{name}.up_proj")
        if self.config.gated_mlp:
            return self.linear(F.silu(self.linear(x, f"{name}.gate_proj")) * up, f"{name}.down_proj")
        return self.linear(F.gelu(up), f"{name}.down_proj")

    def stack(self, ids, prefix, mechanism, is_causal, encoded=None, cross_mechanism=None):
        x = self.embed(ids, prefix)
        for layer in range(self.config.num_hidden_layers):
            name = f"{prefix}layers.{layer}"
            parts = [("self_attn", lambda y, n: self.attention(y, n, mechanism, is_causal=is_causal, prefix=prefix))]
            if encoded is not None:
                parts.append(("cross_attn", lambda y, n: self.attention(y, n, cross_mechanism, other=encoded)))
            parts.append(("mlp", self.mlp))
            for part, function in parts:
                if self.config.norm_position == "pre":
                    x = x + function(self.norm(x, f"{name}.{part}_norm"), f"{name}.{part}")
                else:
                    x = self.norm(x + function(x, f"{name}.{part}"), f"{name}.{part}_norm")
        return self.norm(x, f"{prefix}norm") if self.config.norm_position == "pre" else x

    def logits(self, ids, mechanism, form, decoder_ids=None):
        if form == "cross":
            encoded = self.stack(ids, "model.encoder.", "dot", False)
            x = self.stack(decoder_ids, "model.decoder.", "dot", True, encoded, mechanism)
        else:
            x = self.stack(ids, "model.", mechanism, form == "causal")
        return self.linear(x, "lm_head")


def check(mechanism, encoding, form, **settings):
    model = make_model(mechanism, encoding, form, **settings)
    ids, more = tokens(batch=2, length=6), {}
    if form == "cross":
        more = {"decoder_input_ids": tokens(batch=2, length=4, seed=1)}
    with torch.no_grad():
        found = model(input_ids=ids, **more).logits
        expected = Naive(model).logits(ids, mechanism, form, *more.values())
    assert expected.std() > 0.1
    # float32 through two layers, on logits of size 1.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("mechanism", ["dot", *DISTANCES])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_the_naive_one(mechanism, encoding, form):
    check(mechanism, encoding, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mechanism", ["dot", "l2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"norm_position": "post"},
        {"norm_type": "rms_norm", "gated_mlp": True, "hidden_act": "silu"},
        {"norm_position": "post", "norm_type": "rms_norm"},
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": False},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_every_other_choice_is_the_naive_one(mechanism, settings, form):
    check(mechanism, "rotary", form, **settings)


# Shaw's "relative" adds embeddings to the values, too, so that weights alone do not give its output.
@pytest.mark.parametrize("mechanism", [name for name in HAS if name != "relative"])
@pytest.mark.parametrize("encoding", ["rotary", "relative"])
@pytest.mark.parametrize("form", FORMS)
def test_the_weights_that_are_returned_are_those_that_are_used(mechanism, encoding, form):
    """With the weights of each layer in place of its mechanism, the naive model gives the same logits."""
    if not possible(mechanism, encoding, form):
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    model = make_model(mechanism, encoding, form)
    ids, more = tokens(), {}
    if form == "cross":
        more = {"decoder_input_ids": tokens(length=5, seed=1)}
    with torch.no_grad():
        output = model(input_ids=ids, **more, output_attentions=True)
        plain = model(input_ids=ids, **more).logits
    given = {}
    for stack, kind, weights in (
        ("model.", "self", output.get("attentions")),
        ("model.encoder.", "self", output.get("encoder_attentions")),
        ("model.decoder.", "self", output.get("decoder_attentions")),
        ("model.decoder.", "cross", output.get("cross_attentions")),
    ):
        given |= {f"{stack}layers.{i}.{kind}_attn": each for i, each in enumerate(weights or ())}

    class ByWeights(Naive):
        def attention(self, x, name, mechanism, *, other=None, is_causal=False, prefix=""):
            value = self.linear(x if other is None else other, f"{name}.v_proj").unflatten(-1, (-1, 8)).transpose(1, 2)
            return self.linear((given[name].double() @ value).transpose(1, 2).flatten(2), f"{name}.o_proj")

    with torch.no_grad():
        expected = ByWeights(model).logits(ids, mechanism, form, *more.values())
    torch.testing.assert_close(plain.double(), expected, rtol=0, atol=2e-5)


def test_lambda_of_a_fresh_model_is_the_metrics_default_and_trains():
    from distattn_hf.core.metrics import get_metric

    for metric in DISTANCES:
        p = OPTIONS.get(metric, {}).get("p")
        state = make_model(metric, "rotary", "causal").model.layers[0].self_attn.distattn
        (group,) = state.groups
        expected = get_metric(metric).default_lambda(8, 8**-0.5, p)
        assert_close(group.lam(), torch.full((2,), expected), "float32_forward")
        assert group.transform == "none"
        assert isinstance(group.log_lambda, torch.nn.Parameter)
