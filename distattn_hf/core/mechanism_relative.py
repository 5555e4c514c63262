"""Relative position embeddings of keys and values (Shaw et al.), without a vector for every pair of positions."""

import torch
from torch import Tensor, nn
from transformers import initialization

from .inputs import masked_softmax
from .mechanism_base import Call, Mechanism, Option, register_mechanism


@register_mechanism("relative", aliases=("shaw",))
class RelativeAttention(Mechanism):
    """logits_ij = scaling·q_i·(k_j + a_r) + bias_ij, output_i = Σ_j weight_ij·(v_j + b_r), r = j - i.

    r is cut to ±max_distance; a and b (2·max_distance + 1, d) are learned and shared by all heads. q_i·a_r exists for
    the distinct r only and is looked up for each key; weights are summed by r before they meet b. Values must have the
    size of keys.

    Source: Shaw et al., Self-Attention with Relative Position Representations (2018).
    """

    takes_bias = True
    complexity = "O(N·M·d)"
    memory = "O(N·M + N·max_distance)"
    options = {"max_distance": Option(16)}

    def _build(self):
        for name in ("key_embedding", "value_embedding"):
            setattr(self, name, nn.Parameter(torch.empty(2 * self.max_distance + 1, self.head_dim)))

    def reset_parameters(self):
        """Draw the embeddings from N(0, 0.02²), as transformers does."""
        for embedding in (self.key_embedding, self.value_embedding):
            initialization.normal_(embedding, std=0.02)

    def _relative(self, call: Call) -> Tensor:
        """Return (N, M): which row of the embeddings a pair uses."""
        query = torch.arange(call.query.shape[2], device=call.query.device) + call.before
        relative = torch.arange(call.key.shape[2], device=call.query.device) - query[:, None]
        return relative.clamp(-self.max_distance, self.max_distance) + self.max_distance

    def _weights(self, call):
        query, relative = call.scaled_query, self._relative(call)
        logits = query @ call.key.mT
        distance_logits = query @ self.key_embedding.to(query.dtype).mT
        logits = logits + distance_logits.gather(-1, relative.expand_as(logits))
        if call.bias is not None:
            logits = logits + call.bias
        return masked_softmax(logits, call.seen().expand_as(logits))

    def _attend(self, call):
        if call.value.shape[-1] != self.head_dim:
            raise ValueError(
                f"mechanism 'relative' adds embeddings of size head_dim={self.head_dim} to values, got values of size "
                f"{call.value.shape[-1]}"
            )
        weights = call.drop(self._weights(call))
        distance_weights = weights.new_zeros(*weights.shape[:3], 2 * self.max_distance + 1)
        distance_weights = distance_weights.scatter_add(-1, self._relative(call).expand_as(weights), weights)
        return weights @ call.value + distance_weights @ self.value_embedding.to(weights.dtype)
