"""Positional encodings by name: added to the embeddings, rotating query and key, or a bias on the logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from .registry import Registry
from .relative_bias import RelativeBias

POSITIONAL_ENCODINGS = Registry("positional encoding")


def register_encoding(name: str, aliases: tuple[str, ...] = ()):
    """Register a `PositionalEncoding` class under `name` (decorator); raises `ValueError` for a taken name."""

    def register(kind: type["PositionalEncoding"]) -> type["PositionalEncoding"]:
        if not isinstance(kind, type) or not issubclass(kind, PositionalEncoding):
            raise ValueError(f"positional encoding {name!r} must be a subclass of PositionalEncoding, got {kind!r}")
        POSITIONAL_ENCODINGS.register(name, kind, aliases=tuple(aliases))
        kind.name = name
        return kind

    return register


class PositionalEncoding(nn.Module):
    """Base class of positional encodings; a subclass overrides one of `embed`, `rotation` and `bias`.

    is_bias: it adds to the logits, so the mechanism must be able to take a bias. extrapolates: what happens beyond the
    lengths seen in training, in words. Cross-attention has no positions: its keys belong to another sequence.
    """

    name: str
    is_bias: bool = False
    extrapolates: str
    # Of what `forward` gives; an encoding may have a module named dropout.
    dropout_p: float = 0.0

    @classmethod
    def from_config(cls, config) -> "PositionalEncoding":
        """Return the encoding that a native config asks for."""
        return cls()

    @classmethod
    def check(cls, config) -> None:
        """Raise `ValueError` for a native config in which this encoding is impossible."""

    def reset_parameters(self) -> None:
        """Set parameters of the encoding's own to their initial values; does nothing for encodings without any."""

    def forward(self, hidden_states: Tensor, length: int | None = None) -> Tensor:
        """Add positions 0 to N - 1 to embeddings (B, N, D), or turn them by these, with dropout in training.

        length: N, where a caller states it. Raises `ValueError` for another length, and for an encoding that adds to
        the logits.
        """
        if hidden_states.dim() != 3 or length not in (None, hidden_states.shape[1]):
            raise ValueError(
                f"an encoding takes (B, N, D) and, if any, length=N; got {tuple(hidden_states.shape)} and {length=}"
            )
        if self.is_bias:
            raise ValueError(
                f"encoding {self.name!r} adds to the logits, not to embeddings: give a layer position_bias="
                "encoding.bias(num_queries, num_keys)"
            )
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        return F.dropout(self._at(hidden_states, positions), self.dropout_p, self.training)

    def _at(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        return self.embed(hidden_states, position_ids)

    def embed(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """Add positions (B or 1, N) to embeddings (B, N, D)."""
        return hidden_states

    def rotation(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return (cos, sin), each (B or 1, N, d), that rotate query and key; None for no rotation."""
        return None

    def bias(self, num_queries: int, num_keys: int, past: int | Tensor = 0, device=None) -> Tensor | None:
        """Return a bias (1, H, N, M) for queries that have `past` keys before the first; None for none."""
        return None


def distances(num_queries: int, num_keys: int, past: int | Tensor, device) -> Tensor:
    """Return how many places lie between each query, with `past` keys before the first, and each key: (N, M)."""
    query, key = (torch.arange(n, device=device) for n in (num_queries, num_keys))
    return (key - query[:, None] - past).abs()


@register_encoding("none")
class NoEncoding(PositionalEncoding):
    """No encoding: a causal model can still tell positions apart by what each token sees; a bidirectional one cannot.

    Length extrapolation: nothing is unseen at longer lengths; Kazemnejad et al. 2023 find it good in causal models.
    """

    extrapolates = "yes, for causal models"


@register_encoding("sinusoidal")
class SinusoidalEncoding(PositionalEncoding):
    """Fixed waves added to the embeddings (Vaswani et al., "Attention Is All You Need", 2017).

    PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i + 1) = cos(t / 10000^(2i/D)); no parameters.
    Length extrapolation: defined for every position; quality falls soon beyond the training length.
    """

    extrapolates = "defined everywhere, quality falls soon"

    def __init__(self, num_positions: int = 512, size: int = 768):
        super().__init__()
        self.num_positions, self.size = num_positions, size

    @classmethod
    def from_config(cls, config):
        return cls(config.max_position_embeddings, config.hidden_size)

    @property
    def encoding_matrix(self) -> Tensor:
        """What is added at positions 0 to max_position_embeddings - 1: (positions, D)."""
        return self.embed(torch.zeros(1, self.num_positions, self.size), torch.arange(self.num_positions)[None])[0]

    def embed(self, hidden_states, position_ids):
        size, device = hidden_states.shape[-1], hidden_states.device
        # An odd size has one sine more than cosines.
        exponent = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
        angle = position_ids[..., None].float() * 10000.0**-exponent
        position_embeddings = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :size]
        return hidden_states + position_embeddings.to(hidden_states.dtype)


@register_encoding("learned")
class LearnedEncoding(PositionalEncoding):
    """One learned vector per position, added to the embeddings (Gehring et al. 2017; BERT, GPT-2).

    Length extrapolation: none. Raises `ValueError` for a position >= num_positions.
    """

    extrapolates = "no: a longer sequence is refused"

    def __init__(self, num_positions: int, size: int):
        super().__init__()
        self.position_embeddings = nn.Embedding(num_positions, size)

    @property
    def encoding_matrix(self) -> Tensor:
        """What is added at each position: (positions, D), the parameter itself."""
        return self.position_embeddings.weight

    @classmethod
    def from_config(cls, config):
        return cls(config.max_position_embeddings, config.hidden_size)

    def embed(self, hidden_states, position_ids):
        limit = self.position_embeddings.num_embeddings
        if not torch.compiler.is_compiling() and position_ids.numel():
            first, last = (int(end) for end in position_ids.aminmax())
            if first < 0 or last >= limit:
                raise ValueError(
                    f"learned positions go from 0 to max_position_embeddings - 1 = {limit - 1}, got position "
                    f"{last if last >= limit else first}; shorten the sequence or choose another positional_encoding"
                )
        return hidden_states + self.position_embeddings(position_ids)


@register_encoding("rotary")
class RotaryEncoding(PositionalEncoding):
    """Query and key turned by angles proportional to their positions (Su et al., "RoFormer", 2021), as Llama does.

    (x_i, x_{i+d/2}) is turned by t·θ^(-2i/d), so q·k, ‖q - k‖ and the cosine depend on the distance of positions alone;
    other metrics (l1, lp, chebyshev) also on the positions themselves. Needs an even head size.
    Length extrapolation: poor beyond the training length as it is; `rope_parameters` can rescale the angles.
    """

    extrapolates = "poor; rope_parameters can rescale it"

    def __init__(self, config):
        super().__init__()
        self.rotary = LlamaRotaryEmbedding(config)

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @classmethod
    def check(cls, config):
        if config.head_dim % 2:
            raise ValueError(
                "positional_encoding='rotary' turns pairs of coordinates and needs an even head size, got hidden_size="
                f"{config.hidden_size} with num_attention_heads={config.num_attention_heads}: {config.head_dim}"
            )

    def rotation(self, hidden_states, position_ids):
        return self.rotary(hidden_states, position_ids)

    def _at(self, hidden_states, position_ids):
        cos, sin = self.rotation(hidden_states, position_ids)
        heads = hidden_states.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
        return apply_rotary_pos_emb(heads, heads, cos, sin)[0].transpose(1, 2).flatten(2)


@register_encoding("relative")
class RelativeEncoding(PositionalEncoding):
    """A learned bias per head and bucket of distances (Raffel et al., T5, 2020); all layers share it.

    Half of the buckets are single distances, the others grow logarithmically up to max_distance, from which on the bias
    is constant. Bidirectional: half of the buckets for each side.
    Length extrapolation: defined everywhere and flat beyond max_distance; quality falls slowly.
    """

    is_bias = True
    extrapolates = "flat beyond max_distance, quality falls slowly"
    _relative_position_bucket = staticmethod(T5Attention._relative_position_bucket)

    def __init__(self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, is_causal: bool = False):
        super().__init__()
        # The names under which `RelativeBias` knows them.
        self.relative_attention_num_buckets, self.relative_attention_max_distance = num_buckets, max_distance
        self.is_decoder = is_causal
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    @classmethod
    def from_config(cls, config):
        sizes = config.relative_attention_num_buckets, config.relative_attention_max_distance
        return cls(config.num_attention_heads, *sizes, is_causal=config.is_decoder)

    @classmethod
    def check(cls, config):
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        if buckets < 4 or buckets % 2:
            raise ValueError(f"relative_attention_num_buckets must be an even number >= 4, got {buckets}")
        if distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance must exceed half of relative_attention_num_buckets={buckets}, got "
                f"{distance}"
            )

    def bias(self, num_queries, num_keys, past=0, device=None):
        return self.lazy_bias(past, device).written_out(num_queries, num_keys)

    def lazy_bias(self, past: int, device=None) -> RelativeBias:
        """Return the bias as a function of the distance, for attention that never writes (N, M) entries."""
        # The weight's own device is the meta device where it is offloaded.
        device = self.relative_attention_bias.weight.device if device is None else device
        return RelativeBias(self, past, self.relative_attention_bias, device)


@register_encoding("alibi")
class AlibiEncoding(PositionalEncoding):
    """A penalty linear in the distance: bias = -slope_h·|i - j| (Press et al., "Train Short, Test Long", 2022).

    slope_h = 2^(-8h/H), h = 1..H, for H a power of two; otherwise those of the power of two below, then every other one
    of that above. No parameters. Bidirectional: the same on both sides.
    Length extrapolation: designed for it; causal models keep their quality well beyond the training length.
    """

    is_bias = True
    extrapolates = "yes"

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    @classmethod
    def from_config(cls, config):
        return cls(config.num_attention_heads)

    def slopes(self) -> list[float]:
        """Return one slope > 0 per head."""
        below = 2 ** (self.num_heads.bit_length() - 1)
        first = [2.0 ** (-8 * (head + 1) / below) for head in range(below)]
        between = [2.0 ** (-4 * (head + 1) / below) for head in range(0, 2 * below, 2)]
        return (first + between)[: self.num_heads]

    def bias(self, num_queries, num_keys, past=0, device=None):
        slopes = torch.tensor(self.slopes(), device=device)
        return -slopes[None, :, None, None] * distances(num_queries, num_keys, past, device)


@register_encoding("decay", aliases=("exponential_decay", "learned_alibi"))
class DecayEncoding(AlibiEncoding):
    """Weights that fall with the distance by a learned rate: w_ij ∝ e^(logit_ij - rate_h·|i - j|).

    rate_h = slope_h·e^(θ_h), one θ a head in all layers, 0 at the start: ALiBi's slope, to which weight decay pulls.
    Bidirectional: the same on both sides. As a decay of sums (RetNet's) it would need no bias; `linear` has none.
    Length extrapolation: as ALiBi where the rates stay near its own; a rate near 0 sees places as new ones.
    """

    extrapolates = "yes, at rates like ALiBi's"

    def __init__(self, num_heads: int):
        super().__init__(num_heads)
        # A module that is called, by which offloading knows it.
        self.log_ratio = nn.Embedding(1, num_heads)
        nn.init.zeros_(self.log_ratio.weight)

    def reset_parameters(self):
        initialization.zeros_(self.log_ratio.weight)

    def rates(self, device=None) -> Tensor:
        """Return how fast weights fall, (H,): by e^-rate a token."""
        device = self.log_ratio.weight.device if device is None else device
        ratio = self.log_ratio(torch.zeros(1, dtype=torch.long, device=device))[0].float().exp()
        return torch.tensor(self.slopes(), device=device) * ratio

    def bias(self, num_queries, num_keys, past=0, device=None):
        return -self.rates(device)[None, :, None, None] * distances(num_queries, num_keys, past, device)
