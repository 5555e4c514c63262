"""Positional encodings against the formulas in plain loops, and against transformers' own."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from distattn_hf import DistAttnConfig, DistAttnModel, PositionalEncodingFactory
from distattn_hf.core.encodings import POSITIONAL_ENCODINGS, PositionalEncoding, register_encoding
from tests.tolerances import assert_close


def encoding(name: str, **settings) -> PositionalEncoding:
    settings = {"hidden_size": 24, "num_attention_heads": 6, **settings}
    config = DistAttnConfig(positional_encoding=name, max_position_embeddings=16, **settings)
    return POSITIONAL_ENCODINGS.get(name).from_config(config)


@pytest.mark.parametrize("size", [8, 7, 1])
def test_sinusoidal_is_the_formula(size):
    positions = torch.tensor([[0, 1, 5, 300], [2, 2, 7, 100_000]])
    expected = np.zeros((2, 4, size))
    for b, row in enumerate(positions.tolist()):
        for n, t in enumerate(row):
            for i in range(size):
                angle = t / 10000 ** (2 * (i // 2) / size)
                expected[b, n, i] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
    hidden_states = torch.randn(2, 4, size)
    found = encoding("sinusoidal").embed(hidden_states, positions) - hidden_states
    # float32 holds an angle of 100,000 to 0.004; the three smaller ones to 2e-5.
    torch.testing.assert_close(found[0].double(), torch.tensor(expected[0]), rtol=0, atol=5e-5)
    torch.testing.assert_close(found[1].double(), torch.tensor(expected[1]), rtol=0, atol=2e-2)


def test_sinusoidal_embeddings_are_scaled():
    """Entries of size 1 on embeddings of size 0.02 would leave nothing of the tokens."""
    ids = torch.tensor([[3, 4]])
    for name, factor in (("sinusoidal", math.sqrt(24)), ("learned", 1.0)):
        config = DistAttnConfig(vocab_size=9, hidden_size=24, num_attention_heads=6, positional_encoding=name)
        embedding = DistAttnModel(config).embed_tokens
        torch.testing.assert_close(embedding(ids), embedding.weight[ids] * factor)


def test_learned_adds_one_vector_per_position():
    learned = encoding("learned")
    hidden_states, positions = torch.randn(2, 3, 24), torch.tensor([[0, 1, 2], [5, 5, 15]])
    found = learned.embed(hidden_states, positions)
    for b, row in enumerate(positions.tolist()):
        for n, t in enumerate(row):
            expected = hidden_states[b, n] + learned.position_embeddings.weight[t]
            assert_close(found[b, n], expected, "equal")


@pytest.mark.parametrize("position", [16, -1])
def test_learned_refuses_positions_it_has_not_learned(position):
    with pytest.raises(ValueError, match=rf"max_position_embeddings - 1 = 15, got position {position}"):
        encoding("learned").embed(torch.zeros(1, 1, 24), torch.tensor([[position]]))


def test_a_model_refuses_a_sequence_longer_than_its_learned_positions():
    config = DistAttnConfig(
        vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, positional_encoding="learned",
        max_position_embeddings=5,
    )  # fmt: skip
    model = DistAttnModel(config)
    assert model(torch.ones(1, 5, dtype=torch.long)).last_hidden_state.shape == (1, 5, 8)
    with pytest.raises(ValueError, match="learned positions go from 0 to"):
        model(torch.ones(1, 6, dtype=torch.long))
    # Padding takes no position.
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    assert model(torch.ones(1, 6, dtype=torch.long), attention_mask=mask).last_hidden_state.shape == (1, 6, 8)


def test_rotary_turns_pairs_by_angles_that_grow_with_the_position():
    rotary, size = encoding("rotary", num_attention_heads=3, rope_theta=500.0), 8
    positions = torch.tensor([[0, 3, 11]])
    query = torch.randn(1, 2, 3, size, dtype=torch.float64)
    cos, sin = rotary.rotation(torch.zeros(1, 3, 24, dtype=torch.float64), positions)
    turned, _ = apply_rotary_pos_emb(query, query, cos, sin)
    expected = query.clone()
    for n, t in enumerate(positions[0].tolist()):
        for i in range(size // 2):
            angle = t * 500.0 ** (-2 * i / size)
            first, second = query[0, :, n, i], query[0, :, n, i + size // 2]
            expected[0, :, n, i] = first * math.cos(angle) - second * math.sin(angle)
            expected[0, :, n, i + size // 2] = second * math.cos(angle) + first * math.sin(angle)
    # transformers computes the angles in float32.
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)


def test_rotary_is_llamas():
    ours = encoding("rotary", num_attention_heads=3, rope_theta=500.0)
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=24, num_attention_heads=3, rope_theta=500.0))
    positions = torch.arange(40)[None]
    for found, expected in zip(ours.rotation(torch.zeros(1), positions), theirs(torch.zeros(1), positions)):
        assert_close(found, expected, "equal")


@pytest.mark.parametrize("is_decoder", [True, False])
@pytest.mark.parametrize(("num_queries", "past"), [(9, 0), (3, 6), (1, 400)])
def test_relative_is_t5s(is_decoder, num_queries, past):
    ours = encoding(
        "relative", relative_attention_num_buckets=8, relative_attention_max_distance=20, is_decoder=is_decoder
    )
    config = T5Config(
        num_heads=6, d_model=24, relative_attention_num_buckets=8, relative_attention_max_distance=20,
        is_decoder=is_decoder,
    )  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    theirs.relative_attention_bias = ours.relative_attention_bias
    expected = theirs.compute_bias(num_queries, num_queries + past, past_seen_tokens=past)
    assert_close(ours.bias(num_queries, num_queries + past, past), expected, "equal")


def bucket(relative: int, bidirectional: bool, buckets: int, furthest: int) -> int:
    """Raffel et al. 2020, as their text says it."""
    start = 0
    if bidirectional:
        buckets //= 2
        start, relative = (buckets if relative > 0 else 0), abs(relative)
    else:
        relative = max(0, -relative)
    exact = buckets // 2
    if relative < exact:
        return start + relative
    grown = exact + int(math.log(relative / exact) / math.log(furthest / exact) * (buckets - exact))
    return start + min(grown, buckets - 1)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_relative_is_a_table_of_buckets(is_decoder):
    # No power lands on a border between buckets, where float32 may fall to either side.
    ours = encoding(
        "relative", relative_attention_num_buckets=12, relative_attention_max_distance=23, is_decoder=is_decoder
    )
    table, found = ours.relative_attention_bias.weight, ours.bias(30, 40, past=10)
    for i in range(30):
        for j in range(40):
            expected = table[bucket(j - i - 10, not is_decoder, 12, 23)]
            assert_close(found[0, :, i, j], expected, "equal")


@pytest.mark.parametrize("heads", [1, 6, 8])
def test_alibi_is_blooms(heads):
    """Bloom adds slope·j, which differs from -slope·(i - j) by a constant of the row."""
    ours = encoding("alibi", num_attention_heads=heads, is_decoder=True)
    theirs = build_alibi_tensor(torch.ones(1, 10), heads, torch.float32)[None]
    found = ours.bias(10, 10)
    seen = torch.ones(10, 10).tril().bool()
    logits = torch.randn(1, heads, 10, 10)
    masked = [(logits + bias).masked_fill(~seen, -math.inf).softmax(-1) for bias in (found, theirs)]
    assert_close(masked[0], masked[1], "float32_forward")


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_alibi_is_the_formula(heads):
    def slopes(count: int) -> list[float]:
        if math.log2(count).is_integer():
            return [2 ** (-8 * (h + 1) / count) for h in range(count)]
        below = 2 ** math.floor(math.log2(count))
        return slopes(below) + slopes(2 * below)[0::2][: count - below]

    found = encoding("alibi", num_attention_heads=heads).bias(4, 7, past=2)
    for h, slope in enumerate(slopes(heads)):
        for i in range(4):
            for j in range(7):
                assert found[0, h, i, j].item() == pytest.approx(-slope * abs(i + 2 - j), rel=1e-6)


def test_decay_is_a_power_of_a_learned_rate():
    """Weights times e^(-rate·distance) beside the logits', and at the start ALiBi's; the rate gets a gradient."""
    ours, alibi = encoding("decay"), encoding("alibi")
    assert_close(ours.bias(4, 7, past=3), alibi.bias(4, 7, past=3), "equal")
    torch.nn.init.normal_(ours.log_ratio.weight)
    rates = torch.tensor(alibi.slopes()) * ours.log_ratio.weight[0].exp()
    distance = (torch.arange(4)[:, None] + 3 - torch.arange(7)).abs()
    logits = torch.randn(1, 6, 4, 7)
    weights = logits.exp() * (-rates[:, None, None] * distance).exp()
    assert_close(
        (logits + ours.bias(4, 7, past=3)).softmax(-1), weights / weights.sum(-1, keepdim=True), "float32_forward"
    )
    ours.bias(4, 7, past=3).sum().backward()
    assert_close(ours.log_ratio.weight.grad[0], -rates.detach() * distance.sum(), "float32_forward")


def test_a_models_rates_start_as_alibis_and_train():
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "metric": "l1"}
    config = DistAttnConfig(**sizes, positional_encoding="exponential_decay", is_decoder=True, initializer_range=1.0)
    assert config.positional_encoding == "decay"
    model = DistAttnModel(config)
    assert model.positions.rates().tolist() == model.positions.slopes()
    model(torch.arange(8)[None]).last_hidden_state.square().sum().backward()
    assert model.positions.log_ratio.weight.grad.ne(0).all()


def test_none_does_nothing():
    nothing, hidden_states = encoding("none"), torch.randn(2, 3, 24)
    assert nothing.embed(hidden_states, torch.arange(3)[None]) is hidden_states
    assert nothing.rotation(hidden_states, torch.arange(3)[None]) is None
    assert nothing.bias(3, 3) is None


@pytest.mark.parametrize("name", list(POSITIONAL_ENCODINGS))
def test_every_encoding_says_how_it_extrapolates(name):
    kind = POSITIONAL_ENCODINGS.get(name)
    assert "Length extrapolation:" in kind.__doc__
    assert kind.extrapolates


@pytest.mark.parametrize("name", [n for n in POSITIONAL_ENCODINGS if n != "none"])
@pytest.mark.parametrize("is_decoder", [True, False])
def test_every_encoding_tells_the_order(name, is_decoder):
    """Without one, a bidirectional model gives the same to a token wherever it stands."""
    config = DistAttnConfig(
        vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, positional_encoding=name,
        initializer_range=0.5, is_decoder=is_decoder,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DistAttnModel(config).eval()
    with torch.no_grad():
        one, other = (model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ([1, 2, 3, 4], [3, 1, 2, 4]))
    assert (one - other).abs().max() > 1e-4


def test_without_an_encoding_an_encoder_cannot_tell_the_order():
    config = DistAttnConfig(
        vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, positional_encoding="none",
        initializer_range=0.5,
    )  # fmt: skip
    model = DistAttnModel(config).eval()
    with torch.no_grad():
        one, other = (model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ([1, 2, 3, 4], [3, 1, 2, 4]))
    assert_close(one, other, "float32_forward")


def test_a_registered_encoding_is_a_choice():
    @register_encoding("reversed_for_test")
    class Reversed(PositionalEncoding):
        """Length extrapolation: any."""

        extrapolates = "yes"

        def embed(self, hidden_states, position_ids):
            return hidden_states - position_ids[..., None]

        @classmethod
        def from_config(cls, config):
            made = cls()
            made.dropout = torch.nn.Dropout(0.1)  # as PyTorch's tutorial has it
            return made

    made = PositionalEncodingFactory.create("reversed_for_test", 8, 2, dropout=0.2)
    assert (made.dropout_p, made.dropout.p) == (0.2, 0.1)
    config = DistAttnConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, positional_encoding="reversed_for_test")
    assert isinstance(DistAttnModel(config).positions, Reversed)
