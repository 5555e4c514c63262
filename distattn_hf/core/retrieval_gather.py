"""Retrieval attention by operators, with gradients: keys are gathered for some queries at a time."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .absolute_logits import finish_logits, row_constant
from .attention import without_autocast
from .inputs import AttentionInputs, masked_softmax, rows_of, say_backend
from .metrics import BUILT_IN
from .retrieval import Retrieval, aligned, has_codes
from .retrieval_blocks import Layout, dotted, in_full, order_of
from .retrieval_cpp import cpp_retrieval, cpp_supports, encode_keys
from .retrieval_far import far_field_of, has_far_field, summaries_of


def run_retrieval(
    problem: Retrieval, return_weights: bool = False, reference: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run retrieval attention by the CPU's kernel where it can, else (and for `reference`) by operators.

    Returns the output (B, H, N, d_v) in value's dtype, and the weights (B, H, N, M) before dropout or None.
    """
    dtype = problem.inputs.value.dtype
    with without_autocast(problem.inputs.query.device.type):
        problem = _with_order(problem)
        by_kernel = not (return_weights or reference) and cpp_supports(problem)
        query, key = problem.inputs.query, problem.inputs.key
        say_backend(f"retrieval by {problem.inputs.metric.name}", "cpp" if by_kernel else "operators", query, key)
        if by_kernel:
            return cpp_retrieval(_with_codes(problem)).to(dtype), None
        output, weights = retrieval_by_operators(problem, return_weights)
    return output.to(dtype), weights if weights is None else weights.to(dtype)


def _with_order(problem: Retrieval) -> Retrieval:
    """Return the problem with the order of its keys, where they are clustered."""
    if not problem.is_clustered or problem.order is not None or 0 in problem.inputs.key.shape:
        return problem
    return replace(problem, order=order_of(problem))


def _with_codes(problem: Retrieval) -> Retrieval:
    """Return the problem with its keys in full precision's dot form, where there is one, codes and summaries."""
    inputs, search = problem.inputs, problem.search
    order = problem.order
    if has_far_field(problem) and problem.summaries is None:
        problem = replace(problem, summaries=summaries_of(problem, order=order))
    if not has_codes(inputs):
        return problem
    if inputs.metric is BUILT_IN["cosine"] or problem.codes is None or inputs.key.dtype == torch.float16:
        inputs = inputs.in_full_precision()
    inputs = dotted(replace(inputs, query=inputs.query.float()))
    key, codes = inputs.key, problem.codes
    if codes is None and search.most_blocks and (order is None or order.shape[3]):
        keep = torch.ones(1, key.shape[2], dtype=torch.bool) if inputs.keep is None else inputs.keep[:, 0, 0]
        own = key.float() if inputs.keep is None else key.float().masked_fill(~keep[:, None, :, None], 0.0)
        keep = keep.expand(len(own), -1)
        codes = encode_keys(
            aligned(own, problem.first, 2), aligned(keep, problem.first, 1), search.block_size,
            None if order is None else order.flatten(2),
        )  # fmt: skip
    return replace(problem, inputs=inputs, codes=codes)


def weight_rows(problem: Retrieval) -> Callable[[int, int], Tensor]:
    """Return (start, stop) -> the weights (B, H, n, M) of those queries."""
    chosen, tensors = _tensors_of(problem, needs_shares=True)
    return lambda start, stop: chosen.weights(slice(start, stop), *tensors)


def visible_keys(problem: Retrieval, choose: Callable | None = None) -> Callable[[int, int], Tensor]:
    """Return (start, stop) -> which keys those queries see, bool (B, H, n, M); `choose` as the operators take it."""
    chosen = _chosen_for(problem, choose)[0]
    return lambda start, stop: chosen.visible(slice(start, stop))


@torch.no_grad()
def caught_weight(problem: Retrieval) -> Tensor:
    """Return the share (B, H, N) of exact attention's weight that each query's keys have; 0 where it sees nothing."""
    chosen, inputs = _chosen_for(problem)
    layout = chosen.layout
    count = -(-layout.num_keys // problem.search.block_size) * problem.search.block_size
    key = layout.key[:, :, :count].repeat_interleave(layout.heads // layout.key.shape[1], dim=1)
    place = torch.arange(count, device=key.device)
    shares = []
    for part in layout.parts(4 * len(key) * layout.heads * len(place)):
        query, positions = inputs.query[:, :, part], layout.positions[:, part]
        bias, sink, shift = (rows_of(t, part) for t in (inputs.bias, inputs.sink_logit, inputs.shift))
        logits = -inputs.lambda_column() * inputs.scaling * inputs.distances(query, key)
        everywhere = place.expand(len(key), layout.key.shape[1], query.shape[2], -1)
        joined = chosen.biases(part, everywhere, bias, problem.relative_bias)
        joined = None if joined is None else joined.transpose(2, 3).flatten(1, 2)
        logits = finish_logits(inputs, logits, shift, joined)
        seen = layout.keep[:, None, None, :count]
        if inputs.is_causal:
            seen = seen & (place <= positions[:, None, :, None])
        weights = masked_softmax(logits, seen.expand_as(logits), sink)
        # Of the keys' weight: a learned sink takes the rest.
        whole = weights.sum(-1)
        shares.append((weights * chosen.seen_blocks(part)).sum(-1) / torch.where(whole > 0, whole, 1.0))
    return torch.cat(shares, dim=2)


def _chosen_for(problem: Retrieval, choose: Callable | None = None) -> tuple["_Chosen", AttentionInputs]:
    """Return the blocks that the queries of a problem see, and its inputs as operators take them."""
    problem = _with_order(problem)
    inputs, beginning, heads = _for_operators(problem.inputs), problem.beginning, problem.inputs.key.shape[1]
    if beginning is not None:
        beginning = _for_operators(replace(problem.inputs, query=beginning)).query
    # Known summaries are in the units of the keys themselves.
    known = None if isinstance(problem.inputs.softening, Tensor) else problem.summaries
    problem = replace(problem, inputs=inputs, beginning=beginning, summaries=known)
    layout = Layout(problem, inputs.query.shape[1] // heads)
    with torch.no_grad():
        blocks, exists = (choose or Layout.choose)(layout)
    # Drawn here, so that the backward pass can make the same dropout again.
    seed = int(torch.randint(2**31, ())) if inputs.dropout_p > 0 else 0
    return _Chosen(layout, blocks, exists, seed), inputs


def _for_operators(inputs: AttentionInputs) -> AttentionInputs:
    """Return the inputs in full precision, without a lift, and ε the same in all heads."""
    inputs = in_full(inputs)
    return inputs.in_units() if isinstance(inputs.softening, Tensor) else inputs


def retrieval_by_operators(
    problem: Retrieval, return_weights: bool = False, choose: Callable | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gather the blocks of some queries at a time: memory is linear in the length, backward gathers them again.

    choose: another rule by which queries choose their blocks; takes and returns what `Layout.choose` does.
    """
    given = problem.inputs
    if 0 in given.query.shape or 0 in given.key.shape:
        # Nothing to see; sums of nothing carry the gradient.
        zero = 0.0 * (given.query.sum() + given.key.sum() + given.value.sum())
        output = given.query.new_zeros(*given.query.shape[:3], given.value.shape[-1]) + zero
        return output, given.query.new_zeros(*given.query.shape[:3], given.key.shape[2]) if return_weights else None
    chosen, tensors = _tensors_of(problem, return_weights, choose)
    output = _Gathered.apply(chosen, *tensors)
    if not return_weights:
        return output, None
    return output, torch.cat([chosen.weights(part, *tensors) for part in chosen.parts], dim=2)


def _tensors_of(problem: Retrieval, needs_shares: bool, choose: Callable | None = None) -> tuple["_Chosen", tuple]:
    """Return the blocks that the queries of a problem see, and the tensors that attention to them takes."""
    chosen, inputs = _chosen_for(problem, choose)
    lam = inputs.lam if isinstance(inputs.lam, Tensor) else None
    far = None, None, None, None
    if has_far_field(problem):
        *far, chosen.shares = far_field_of(chosen.layout, needs_shares)
    tensors = inputs.query, chosen.layout.key, chosen.layout.value, lam, inputs.bias, problem.relative_bias
    return chosen, (*tensors, inputs.sink_logit, inputs.shift, *far)


class _Chosen:
    """The blocks that the queries of a layout see, and attention to them, for a part of the queries at a time."""

    def __init__(self, layout: Layout, blocks: Tensor, exists: Tensor, seed: int):
        self.layout, self.seed = layout, seed
        inputs, search = layout.problem.inputs, layout.problem.search
        key_heads = layout.key.shape[1]
        fixed, fixed_exists = layout.fixed()
        repeats = key_heads // blocks.shape[1]
        blocks, exists = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (blocks, exists))
        shape = (*blocks.shape[:3], fixed.shape[-1])
        self.exists = torch.cat([fixed_exists[:, None].expand(shape), exists], dim=-1)
        blocks = torch.cat([fixed[:, None].expand(shape), blocks], dim=-1)
        self.blocks = torch.where(self.exists, blocks, 0)
        entries = self.blocks.shape[-1] * search.block_size * max(layout.key.shape[-1], layout.value.shape[-1])
        # (B, H_kv, M'): where each key of the table stands.
        self.table_place = layout.place.expand(inputs.query.shape[0], key_heads, -1)
        self.parts = layout.parts(inputs.query.shape[0] * (key_heads * entries + layout.heads * layout.blocks))
        self.shares: Tensor | None = None

    def index(self, part: slice) -> Tensor:
        """Return row numbers of a table (B·H_kv·blocks, ...), flat, for the queries of a part."""
        batch, key_heads = self.blocks.shape[:2]
        head = torch.arange(batch * key_heads, device=self.blocks.device).view(batch, key_heads, 1, 1)
        return (head * self.layout.blocks + self.blocks[:, :, part]).flatten()

    def gather(self, tensor: Tensor, part: slice) -> Tensor:
        """Return (B, H_kv, n, L, x) from (B, H_kv, M', x)."""
        size = self.layout.problem.search.block_size
        rows = tensor.reshape(-1, size * tensor.shape[-1]).index_select(0, self.index(part))
        return rows.view(*self.blocks[:, :, part].shape[:3], -1, tensor.shape[-1])

    def places(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return where the seen keys stand, counted from `first`, (B, H_kv, n, L), and which of them count."""
        layout, size = self.layout, self.layout.problem.search.block_size
        entry = (self.blocks[:, :, part, :, None] * size + torch.arange(size, device=self.blocks.device)).flatten(3)
        keep = layout.keep[:, None, :].expand(-1, entry.shape[1], -1)
        seen = self.exists[:, :, part].repeat_interleave(size, dim=-1)
        seen = seen & keep.gather(2, entry.flatten(2)).view(entry.shape)
        place = self.table_place.gather(2, entry.flatten(2)).view(entry.shape)
        if layout.problem.inputs.is_causal:
            seen = seen & (place <= layout.positions[:, part][:, None, :, None])
        return place, seen

    def unread(self, part: slice) -> Tensor:
        """Return which blocks of the far field the queries of a part do not read, (B, H_kv, n, blocks)."""
        blocks, exists = self.blocks[:, :, part], self.exists[:, :, part]
        read = torch.zeros(*blocks.shape[:3], self.layout.blocks, dtype=torch.int32, device=blocks.device)
        read = read.scatter_add(-1, blocks, exists.int())[..., self.layout.offset :]
        return self.layout.may(part) & (read == 0)

    def attend(self, part, query, key, value, lam, bias, relative_bias, sink, shift, *far, weights=False) -> Tensor:
        """Return (B, H, n, d_v) of the queries of a part, or their weights (B, H_kv, n, G, L + blocks).

        key, value: gathered. far: query, key, bias and value of the far field, or None for each.
        """
        layout, inputs = self.layout, self.layout.problem.inputs
        key_heads = key.shape[1]
        place, seen = self.places(part)

        def in_groups(tensor):
            """(B, H, n, x) -> (B, H_kv, n, G, x)."""
            return None if tensor is None else tensor.unflatten(1, (key_heads, -1)).transpose(2, 3)

        number = lam if lam is not None else torch.as_tensor(inputs.lam, dtype=query.dtype, device=query.device)
        number = number.to(query.dtype).expand(layout.heads).view(key_heads, 1, -1, 1)
        distance = inputs.metric.checked_distance(in_groups(query), key, inputs.p, epsilon=inputs.softening)
        joined = self.biases(part, place, bias, relative_bias)
        sink = None if sink is None else in_groups(sink.expand(len(query), layout.heads, query.shape[2], 1))
        shift = None if shift is None else in_groups(shift.expand(len(query), layout.heads, query.shape[2], 1))
        logits = finish_logits(inputs, -number * inputs.scaling * distance, shift, joined)
        far_query, far_key, far_bias, far_value = far
        if far_query is not None:
            weight = number.view(-1, 1, 1) * inputs.scaling
            if has_codes(inputs):
                beyond = far_query @ far_key.mT
                if inputs.metric is not BUILT_IN["dot"]:
                    beyond = beyond + weight * row_constant(inputs.metric, query, key, inputs.softening is not None)
            else:
                beyond = -weight * inputs.distances(far_query, far_key)
            beyond = finish_logits(inputs, in_groups(beyond + far_bias[:, :, None]), shift, None)
            logits = torch.cat([logits, beyond], dim=-1)
            seen = torch.cat([seen, self.unread(part)], dim=-1)
        chances = masked_softmax(logits, seen[:, :, :, None].expand_as(logits), sink)
        if weights:
            return chances
        chances, length = self._drop(part, chances), key.shape[-2]
        output = (chances[..., :length] @ value).transpose(2, 3).flatten(1, 2)
        if far_query is None:
            return output
        return output + chances[..., length:].transpose(2, 3).flatten(1, 2) @ far_value

    def biases(self, part: slice, place: Tensor, bias: Tensor | None, relative_bias: Tensor | None) -> Tensor | None:
        """Return what joins the logits of seen keys, (B, H_kv, n, G, L), or None."""
        layout = self.layout
        key_heads, joined = place.shape[1], None
        groups = layout.heads // key_heads
        position = (place + layout.first[:, None, None, None]).clamp(max=layout.num_keys - 1)
        if bias is not None:
            shape = (len(place), layout.heads, place.shape[2], layout.num_keys)
            rows = bias.expand(shape).unflatten(1, (key_heads, groups)).transpose(2, 3)
            joined = rows.gather(-1, position[:, :, :, None].expand(*place.shape[:3], groups, -1))
        if relative_bias is not None:
            own = layout.positions[:, part][:, None, :, None] + layout.first[:, None, None, None]
            column = position - own + layout.num_keys - 1
            head = torch.arange(layout.heads, device=place.device).view(key_heads, 1, groups, 1)
            relative = relative_bias.flatten()[head * relative_bias.shape[1] + column[:, :, :, None]]
            joined = relative if joined is None else joined + relative
        return joined

    def _drop(self, part: slice, weights: Tensor) -> Tensor:
        dropout_p = self.layout.problem.inputs.dropout_p
        if not dropout_p:
            return weights
        generator = torch.Generator(weights.device).manual_seed(self.seed + part.start)
        kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout_p
        return weights * kept / (1 - dropout_p)

    def of_part(self, part: slice, query, key, value, lam, bias, relative_bias, sink, shift, far_query, *far) -> tuple:
        """Return the tensors that `attend` takes for a part, keys and values gathered."""
        bias, sink, shift = (rows_of(t, part) for t in (bias, sink, shift))
        gathered = self.gather(key, part), self.gather(value, part)
        far_query = None if far_query is None else far_query[:, :, part]
        return query[:, :, part], *gathered, lam, bias, relative_bias, sink, shift, far_query, *far

    def seen_blocks(self, part: slice) -> Tensor:
        """Return which keys of the blocks where keys stand the queries of a part see, bool (B, H, n, whole blocks)."""
        place, seen = self.places(part)
        size = self.layout.problem.search.block_size
        result = seen.new_zeros(*place.shape[:3], -(-self.layout.num_keys // size) * size, dtype=torch.int32)
        result = result.scatter_add(-1, place, seen.int()) > 0
        return result.repeat_interleave(self.layout.heads // result.shape[1], dim=1)

    def weights(self, part: slice, *tensors) -> Tensor:
        """Return the weights (B, H, n, M) of the queries of a part before dropout."""
        layout, given = self.layout, self.of_part(part, *tensors)
        chances = self.attend(part, *given, weights=True)
        place = self.places(part)[0]
        chances, beyond = chances.split([place.shape[-1], chances.shape[-1] - place.shape[-1]], dim=-1)
        position = (place + layout.first[:, None, None, None]).clamp(max=layout.num_keys - 1)
        position = position[:, :, :, None].expand_as(chances)
        index, chances, beyond = (t.transpose(2, 3).flatten(1, 2) for t in (position, chances, beyond))
        result = chances.new_zeros(*chances.shape[:3], layout.num_keys).scatter_add(-1, index, chances)
        if self.shares is None:
            return result
        spread = beyond.repeat_interleave(layout.problem.search.block_size, dim=-1) * self.shares[:, :, None]
        if layout.problem.order is not None:
            searched = self.table_place[:, :, -spread.shape[-1] :].repeat_interleave(
                layout.heads // self.table_place.shape[1], dim=1
            )
            own = spread.new_zeros(*spread.shape[:3], layout.offset * layout.problem.search.block_size)
            spread = own.scatter_add(-1, searched[:, :, None].expand_as(spread), spread)
        return result + self._at_positions(spread)

    def visible(self, part: slice) -> Tensor:
        """Return which keys the queries of a part read, bool (B, H, n, M)."""
        return self._at_positions(self.seen_blocks(part))

    def _at_positions(self, tensor: Tensor) -> Tensor:
        """Return (B, H, n, M), of keys where they stand in the problem, of keys of all blocks (B, H, n, M')."""
        place = torch.arange(self.layout.num_keys, device=tensor.device) - self.layout.first[:, None]
        index = place.clamp_min(0)[:, None, None].expand(len(tensor), *tensor.shape[1:3], -1)
        return tensor.gather(-1, index) * (place >= 0)[:, None, None]


class _Gathered(torch.autograd.Function):
    """Attention to chosen blocks, gathered for a part of the queries at a time, and again for the backward pass.

    Checkpointing each part would add up as many gradients of all keys as there are parts: quadratic.
    """

    @staticmethod
    def forward(ctx, chosen, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.chosen = chosen
        return torch.cat([chosen.attend(part, *chosen.of_part(part, *tensors)) for part in chosen.parts], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        tensors, chosen = ctx.saved_tensors, ctx.chosen
        # Contiguous, whatever the layout of what came in: rows are written through views.
        totals = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors]
        size = chosen.layout.problem.search.block_size
        for part in chosen.parts:
            given = chosen.of_part(part, *tensors)
            leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in given]
            with torch.enable_grad():
                output = chosen.attend(part, *leaves)
            own = torch.autograd.grad(
                output, [t for t in leaves if t is not None], gradient[:, :, part], allow_unused=True
            )
            own = iter(own)
            for number, (leaf, total) in enumerate(zip(leaves, totals, strict=True)):
                if leaf is None or (change := next(own)) is None:
                    continue
                if number in (1, 2):
                    table = total.view(-1, size * total.shape[-1])
                    table.index_add_(0, chosen.index(part), change.reshape(-1, table.shape[-1]))
                elif leaf.shape == total.shape:
                    total += change
                else:
                    total[:, :, part] += change
        return None, *totals
