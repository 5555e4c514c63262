"""Blocks of distance attention: with residual and normalisation, encoder and decoder layers, and stacks of them."""

from dataclasses import replace

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from ..core.families import Monitored
from .attention_layers import DistanceBasedAttention
from .layer_settings import DistanceAttentionConfig, config_of, initialize
from .names import with_words_at_call


class _Residual(nn.Module):
    """x + f(norm(x)) (norm_first) or norm(x + f(x)), each of residual and normalisation where the config has it."""

    def __init__(self, config: DistanceAttentionConfig):
        super().__init__()
        self.config = config
        size, epsilon = config.hidden_size, config.layer_norm_eps
        self.norm = nn.LayerNorm(size, eps=epsilon) if config.use_layer_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout if config.output_dropout is None else config.output_dropout)

    def before(self, hidden_states: Tensor) -> Tensor:
        """Return the input of f."""
        return self.norm(hidden_states) if self.config.norm_first else hidden_states

    def after(self, hidden_states: Tensor, added: Tensor) -> Tensor:
        """Return the sum of x and f's result."""
        total = self.dropout(added)
        if self.config.use_residual:
            total = hidden_states + total
        return total if self.config.norm_first else self.norm(total)


class MultiHeadDistanceAttention(Monitored, nn.Module):
    """`DistanceBasedAttention` with its `use_residual` and `use_layer_norm` around it, made and called like it.

    attention: the layer inside; None: a `DistanceBasedAttention` of the config.
    """

    def __init__(
        self,
        config: DistanceAttentionConfig | None = None,
        layer_idx: int = 0,
        attention: DistanceBasedAttention | None = None,
        **fields,
    ):
        super().__init__()
        config = config_of(config, fields)
        self.config = config
        # The residual drops its output.
        inner = replace(config, output_dropout=None)
        self.attention = DistanceBasedAttention(inner, layer_idx) if attention is None else attention
        self.residual = _Residual(config)

    @with_words_at_call
    def forward(self, hidden_states: Tensor, *args, output_attentions: bool = False, **kwargs):
        """Map (B, N, E) -> (B, N, E), or with weights (B, H, N, M); arguments as for `DistanceBasedAttention`."""
        result = self.attention(
            self.residual.before(hidden_states), *args, output_attentions=output_attentions, **kwargs
        )
        if output_attentions:
            return self.residual.after(hidden_states, result[0]), result[1]
        return self.residual.after(hidden_states, result)

    def set_learnable_lambda(self, learnable: bool) -> None:
        """Let λ train or not, as `DistanceBasedAttention` does."""
        self.attention.set_learnable_lambda(learnable)


class FeedForward(nn.Module):
    """down(act(up(x))) with residual and normalisation as the config has them."""

    def __init__(self, config: DistanceAttentionConfig):
        super().__init__()
        size = config.intermediate_size or 4 * config.hidden_size
        self.up_proj, self.down_proj = nn.Linear(config.hidden_size, size), nn.Linear(size, config.hidden_size)
        if config.activation not in ACT2FN:
            raise ValueError(f"unknown activation {config.activation!r}; expected one of {', '.join(ACT2FN)}")
        self.activation = ACT2FN[config.activation]
        initialize(self, config.initializer)
        self.residual = _Residual(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.activation(self.up_proj(self.residual.before(hidden_states)))
        return self.residual.after(hidden_states, self.down_proj(inner))


class DistanceEncoderLayer(Monitored, nn.Module):
    """Self-attention and feed-forward; causal where the config says so."""

    def __init__(self, config: DistanceAttentionConfig, layer_idx: int = 0):
        super().__init__()
        self.self_attention = MultiHeadDistanceAttention(_own_sequence(config), layer_idx)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """Map (B, N, E) -> (B, N, E), with `output_attentions` also the weights; arguments as for its attention."""
        result = self.self_attention(hidden_states, None, attention_mask, **kwargs)
        if isinstance(result, tuple):
            return self.feed_forward(result[0]), result[1]
        return self.feed_forward(result)


class DistanceDecoderLayer(Monitored, nn.Module):
    """Causal self-attention, cross-attention to an encoder's output, and feed-forward."""

    def __init__(self, config: DistanceAttentionConfig, layer_idx: int = 0):
        super().__init__()
        self.self_attention = MultiHeadDistanceAttention(_own_sequence(config, is_causal=True), layer_idx)
        self.cross_attention = MultiHeadDistanceAttention(replace(config, is_causal=False), layer_idx)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        position_bias: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ):
        """Map (B, N, E) and (B, M, key_value_size) -> (B, N, E), or with (self-, cross-attention weights).

        past_key_values: a transformers `EncoderDecoderCache`, or a `DynamicCache` for self-attention alone.
        """
        options = {"past_key_values": past_key_values, "output_attentions": output_attentions}
        self_result = self.self_attention(hidden_states, None, attention_mask, position_bias=position_bias, **options)
        hidden_states, own_weights = self_result if output_attentions else (self_result, None)
        cross = self.cross_attention(hidden_states, encoder_hidden_states, encoder_attention_mask, **options)
        hidden_states, cross_weights = cross if output_attentions else (cross, None)
        hidden_states = self.feed_forward(hidden_states)
        return (hidden_states, (own_weights, cross_weights)) if output_attentions else hidden_states


class _Stack(Monitored, nn.Module):
    """Layers one after another, and a last normalisation where each layer normalises first."""

    layer_class: type[nn.Module]

    def __init__(self, config: DistanceAttentionConfig, num_layers: int):
        super().__init__()
        if type(num_layers) is not int or num_layers < 1:
            raise ValueError(f"num_layers must be an integer >= 1, got {num_layers!r}")
        self.layers = nn.ModuleList(self.layer_class(config, index) for index in range(num_layers))
        last = config.norm_first and config.use_layer_norm
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if last else nn.Identity()

    def forward(self, hidden_states: Tensor, *args, output_attentions: bool = False, **kwargs):
        """Run each layer in turn; with `output_attentions` also return a tuple of each one's weights."""
        weights = []
        for layer in self.layers:
            hidden_states = layer(hidden_states, *args, output_attentions=output_attentions, **kwargs)
            if output_attentions:
                hidden_states, layer_weights = hidden_states
                weights.append(layer_weights)
        hidden_states = self.norm(hidden_states)
        return (hidden_states, tuple(weights)) if output_attentions else hidden_states


class DistanceEncoder(_Stack):
    """`num_layers` encoder layers: call as `DistanceEncoderLayer`."""

    layer_class = DistanceEncoderLayer


class DistanceDecoder(_Stack):
    """`num_layers` decoder layers: call as `DistanceDecoderLayer`."""

    layer_class = DistanceDecoderLayer


def _own_sequence(config: DistanceAttentionConfig, **changes) -> DistanceAttentionConfig:
    """Return the config for self-attention: key_value_size belongs to cross-attention."""
    return replace(config, key_value_size=None, **changes)
