"""`torch.nn.MultiheadAttention` with distances in place of dot products: same constructor, call and weights."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attention_spec import AttentionSpec
from ..core.inputs import ModuleCall, add_bias, causal_keep, split_mask
from ..core.interface import attend
from ..core.metrics import get_metric
from ..core.parameters import HeadParameters


class DistanceMultiheadAttention(nn.MultiheadAttention):
    """softmax(-λ_h·distance(q_i, k_j)/√d + bias_ij)·v between PyTorch's own projections.

    Arguments, call and the names of the weights are those of `torch.nn.MultiheadAttention`, so that the state of one
    loads into it (`strict=False`: λ and its like are `distattn.*`). Differences: `need_weights` gives weights before
    dropout; a query that sees no key gives zeros in place of NaN; PyTorch's fused inference path, which would compute
    dot products, is not taken.

    Args:
        spec: an `AttentionSpec` of an exact metric (its layers and heads must be None), or the name of one.

    Raises:
        ValueError: for a spec of another mechanism, or one of some heads only.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
        add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
        device=None, dtype=None, *, spec: AttentionSpec | str = "l2",
    ):  # fmt: skip
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._attend_by(HeadParameters(checked_spec(spec), num_heads, self.head_dim).to(device))

    @classmethod
    def from_multihead(cls, layer: nn.MultiheadAttention, spec: AttentionSpec | str) -> "DistanceMultiheadAttention":
        """Return a copy of a layer that attends by distances, with its weights, hooks and mode.

        Raises `ValueError` for a subclass, whose own code would be lost.
        """
        check_replaceable(layer)
        return cls.convert_in_place(copy.deepcopy(layer), spec)

    @classmethod
    def convert_in_place(cls, layer: nn.MultiheadAttention, spec: AttentionSpec | str) -> "DistanceMultiheadAttention":
        """Make the layer itself one of this class: whatever shares it, or a weight of it, goes on sharing."""
        weight = layer.out_proj.weight
        parameters = HeadParameters(checked_spec(spec), layer.num_heads, layer.head_dim).to(weight.device)
        layer.__class__ = cls
        layer._attend_by(parameters.train(layer.training))
        return layer

    def _attend_by(self, parameters: HeadParameters) -> None:
        self.distattn = parameters
        # What nn.TransformerEncoderLayer asks before it computes dot products from these weights, past this call.
        self._qkv_same_embed_dim = False
        # Set while a conversion calibrates: called with (self, query, key, value, call) in place of the attention.
        self.observer = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `torch.nn.MultiheadAttention` does: (output, weights or None), shapes and masks as there.

        Masks: bool, True = *not* attended to, or float, added to the logits. is_causal: attn_mask, if there is one, is
        the causal mask, as PyTorch has it.
        """
        unbatched, is_cross = query.dim() == 2, key is not query
        if unbatched:
            query, key, value = (tensor.unsqueeze(0 if self.batch_first else 1) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        heads = self._heads(query, key, value)
        shape = (*heads[0].shape[:3], heads[1].shape[2])
        if is_causal and shape[3] > key.shape[1]:
            # The layer's own keys, at the end, are open to every query, which the hint does not say.
            attn_mask = ~causal_keep(shape[2], key.shape[1], key.device) if attn_mask is None else attn_mask
            is_causal = False
        keep, bias = self._masks(key_padding_mask, None if is_causal else attn_mask, shape, heads[1])
        call = ModuleCall(
            self.head_dim**-0.5, keep, bias, is_causal, is_cross,
            dropout_p=self.dropout if self.training else 0.0, return_weights=need_weights,
        )  # fmt: skip
        if self.observer is not None:
            output, weights = self.observer(self, *heads, call), None
        else:
            output, weights = attend(self.distattn, *heads, call)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if unbatched:
            output = output.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return query (B, H, N, d), key and value (B, H, M, d), with the layer's own further keys at the end."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        if self.bias_k is not None:
            key, value = (
                torch.cat([x, own.expand(len(x), 1, -1)], dim=1)
                for x, own in ((key, self.bias_k), (value, self.bias_v))
            )
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (query, key, value)]

    def _masks(
        self, padding: Tensor | None, attn_mask: Tensor | None, shape: tuple[int, int, int, int], key: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (keep, bias), broadcastable to shape (B, H, N, M), of PyTorch's two masks; own keys are open."""
        own = (self.bias_k is not None) + self.add_zero_attn
        num_keys, keep, bias = shape[3] - own, None, None
        for name, mask, expected in (
            ("key_padding_mask", padding, [(shape[0], num_keys)]),
            ("attn_mask", attn_mask, [(shape[2], num_keys), (shape[0] * shape[1], shape[2], num_keys)]),
        ):
            if mask is None:
                continue
            if tuple(mask.shape) not in expected or not (mask.dtype == torch.bool or mask.is_floating_point()):
                allowed = " or ".join(map(str, expected))
                raise ValueError(
                    f"{name} must be bool or float of shape {allowed}, got {mask.dtype} of {tuple(mask.shape)}"
                )
            mask = F.pad(~mask, (0, own), value=True) if mask.dtype == torch.bool else F.pad(mask, (0, own))
            if mask.dim() == 2:
                mask = mask[:, None, None, :] if name == "key_padding_mask" else mask[None, None]
            else:
                mask = mask.unflatten(0, shape[:2])
            kept, added = split_mask(mask, shape)
            keep = kept if keep is None else keep & kept
            bias = add_bias(bias, None if added is None else added.to(key.dtype))
        return keep, bias


def check_replaceable(layer: nn.MultiheadAttention) -> None:
    """Raise `ValueError` for a subclass of `torch.nn.MultiheadAttention`, whose own code would be lost."""
    if type(layer) is not nn.MultiheadAttention:
        raise ValueError(
            f"{type(layer).__module__}.{type(layer).__qualname__} is not torch.nn.MultiheadAttention itself: what it "
            "does beyond that would be lost (a subclass, a quantised or a parametrised layer)"
        )


def checked_spec(spec: AttentionSpec | str) -> AttentionSpec:
    """Return the spec of a whole layer's exact attention, else raise `ValueError` naming the field."""
    spec = AttentionSpec(spec) if isinstance(spec, str) else spec
    if spec.mechanism != "distance":
        raise ValueError(f"mechanism must be 'distance' in torch.nn.MultiheadAttention's place, got {spec.mechanism!r}")
    for name in ("layers", "heads"):
        if getattr(spec, name) is not None:
            raise ValueError(f"{name} must be None, a layer's heads all take one spec, got {getattr(spec, name)!r}")
    get_metric(spec.metric).validate(spec.p)
    return spec
