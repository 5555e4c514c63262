"""Landmark attention: retrieval attention whose blocks are found by their mean keys, among the nearest ones.

Native models may still have this name; `mechanism="retrieval"` finds single keys, and at any distance.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import AttentionInputs
from .mechanism_base import Call, Mechanism, Option, register_mechanism
from .metrics import BUILT_IN
from .retrieval import Retrieval, Search, first_keys
from .retrieval_gather import retrieval_by_operators, visible_keys

# Scores of blocks (float32: 16 MB) that exist at a time.
_ENTRIES = 2**22


@register_mechanism("landmark")
class LandmarkAttention(Mechanism):
    """Softmax attention of each query to its own block of b = block_size keys, and to the num_blocks best of others.

    Blocks are counted from the first real key, so that padding on the left changes nothing.
    A block's landmark is the mean of its real keys, and the best blocks are those of the
    largest q·landmark, each query choosing for itself among the num_candidates nearest blocks: causal, those before its
    own, which are whole; bidirectional, num_candidates // 2 on either side. So one layer sees num_candidates·b keys
    back, and time and memory are linear. The choice has no gradient. A position bias acts on the weights, not on the
    choice.

    Mohtashami & Jaggi train a landmark token a block, with a softmax in two levels, and search all blocks; here
    landmarks are means, the softmax is the plain one over the chosen keys, and the search is bounded.

    Source: Mohtashami & Jaggi, Landmark Attention (2023).
    """

    takes_bias = True
    complexity = "O(N·(k·b + C)·d), k = num_blocks, C = num_candidates"
    memory = "O((N + M)·(d + k))"
    options = {"block_size": Option(16), "num_blocks": Option(4), "num_candidates": Option(256, minimum=2)}

    def _choose(self, layout) -> tuple[Tensor, Tensor]:
        """Return (numbers of the chosen blocks (B, H, N, k), which of them exist) of retrieval attention's layout."""
        query, is_causal = layout.problem.inputs.query, layout.problem.inputs.is_causal
        keep = layout.keep.unflatten(1, (-1, self.block_size))
        # Keys of padding are zeros here.
        sums = layout.key.unflatten(2, (-1, self.block_size)).sum(3)
        landmarks = sums / keep.sum(-1).clamp(min=1)[:, None, :, None]
        # Of each row, (B or 1, N): its blocks are counted from its first real key.
        real, own = keep.any(-1)[:, None, None], layout.positions // self.block_size
        behind = self.num_candidates if is_causal else self.num_candidates // 2
        ahead = 0 if is_causal else behind
        chosen, exists = [], []
        # Together, so many queries meet at most twice as many candidates as one of them does.
        reach = behind + ahead
        rows = max(1, min(reach * self.block_size, _ENTRIES // (2 * len(query) * self.num_heads * reach)))
        for query_part, own_part in zip(query.split(rows, dim=2), own.split(rows, dim=1)):
            start = min(max(0, int(own_part.min()) - behind), layout.blocks - 1)
            stop = max(start + 1, min(layout.blocks, int(own_part.max()) + ahead + 1))
            offset = (torch.arange(start, stop, device=own.device) - own_part[..., None])[:, None]
            may = (offset >= -behind) & (offset <= ahead) & (offset != 0) & real[..., start:stop]
            scores = (query_part @ landmarks[:, :, start:stop].mT).masked_fill(~may, float("-inf"))
            best = scores.topk(min(self.num_blocks, stop - start), dim=-1)
            fill = (0, self.num_blocks - best.indices.shape[-1])
            chosen.append(F.pad(best.indices + start, fill))
            exists.append(F.pad(best.values > float("-inf"), fill, value=False))
        return torch.cat(chosen, dim=2), torch.cat(exists, dim=2)

    def _problem(self, call: Call) -> Retrieval:
        """Return the problem of retrieval attention, with a window of the query's own block."""
        keep = None if call.keep is None else call.keep[:, None, None]
        inputs = AttentionInputs(
            call.scaled_query, call.key, call.value, BUILT_IN["dot"], 1.0, 1.0, None, keep, call.bias, call.is_causal,
            call.dropout_p,
        )  # fmt: skip
        search = Search(1, 0, self.block_size, self.num_blocks, min_weight=0.0, far_field=False, cluster_keys=False)
        return Retrieval(inputs, search, first_keys(call.keep))

    def _attend(self, call):
        return retrieval_by_operators(self._problem(call), choose=self._choose)[0]

    def _visible(self, call):
        return visible_keys(self._problem(call), self._choose)(0, call.query.shape[2])
