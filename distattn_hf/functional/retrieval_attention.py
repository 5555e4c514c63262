"""Retrieval attention as a function: every key kept, few read, any metric."""

import math
from dataclasses import replace
from numbers import Real

from torch import Tensor

from ..core.attention import check_lambda, check_shapes
from ..core.inputs import AttentionInputs, merge_masks, split_mask
from ..core.metrics import get_metric
from ..core.retrieval import Retrieval, Search, first_keys
from ..core.retrieval_gather import run_retrieval
from ..core.softening import check_softening
from .nystrom import check_mask_length


def retrieval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    metric: str = "dot",
    block_size: int = 16,
    num_blocks: int | tuple[int, ...] = Search.num_blocks,
    min_weight: float = Search.min_weight,
    window_size: int = 64,
    num_sinks: int = 4,
    far_field: bool = True,
    cluster_keys: bool = Search.cluster_keys,
    lam: float | Tensor | None = None,
    p: float | None = None,
    scaling: float | None = None,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool = False,
    is_cross: bool = False,
    dropout_p: float = 0.0,
    softening: float | Tensor = 0.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention of each query to the first keys, the last ones, and the blocks of others that match it best.

    Softmax attention over the keys that a query reads, and over one key for each block that it does not; logits as in
    `distance_attention`. Keys stand in blocks, counted from the first that is not padding. A query reads the blocks
    that hold the first num_sinks keys, its own block (as far as causality lets it) and those beside it that hold
    window_size - 1 more keys, and at most num_blocks others: those with the largest logits, as far as a copy of the
    keys in four bits says, where logits are a dot product ("dot", "cosine"); other metrics look at the keys themselves.
    With cluster_keys a causal query reads the keys from the start of the unit of 16 blocks on in which its window
    begins; those before it stand in blocks by their likeness, and only of the 128 blocks (num_blocks, if more) whose
    means, and how far their keys lie about them, promise most are the copies looked at.
    Query heads of one key head choose together. The choice has no gradient. A block that is not read counts as a key of
    its own: a block of alike keys whose logits are dot products by the means of its keys and values; any other such
    that to first order about the mean of the first 64 queries (in both directions: of all) nothing is lost.
    With min_weight=0 and num_blocks at least the number of blocks it is exact attention.

    A query costs M / block_size products (without cluster_keys M more, in whole numbers of four bits), and those with
    the keys it reads; memory is linear in N and M. On the CPU without gradients one kernel does it.

    Args:
        query: (B, H, N, d).
        key: (B, H_kv, M, d); H a multiple of H_kv.
        value: (B, H_kv, M, d_v).
        metric: "dot" (λ·scaling·q·k, λ = 1), or any metric of `distance_attention`.
        block_size: keys of a block.
        num_blocks: blocks that each query chooses at most: a number, or one for each key head.
        min_weight: the share of the query's weight that a block's best key must have, among the keys that are read in
            any case and the best ones of all other blocks, for the block to be read. 0: num_blocks are; so they are
            with is_cross and beside a position_bias.
        window_size: at least so many last keys are seen, the query's own included (in both directions unless causal).
        num_sinks: at least so many first keys are seen.
        far_field: False: blocks that are not read count as nothing. So they do across sequences and beside a bias.
            With fewer queries than keys, the first of which are not here, blocks that are expanded about the first
            queries are about the first of these.
        cluster_keys: False: blocks are those of the text. So they are in both directions, across sequences and beside a
            bias. (Ordering keys by likeness costs O(M·log M·d).)
        lam, p, scaling, dropout_p, softening: as in `distance_attention`.
        mask: padding: (B, M) or (B, 1, 1, M), bool or 0/1 integers, True = keep.
        position_bias: (B or 1, H, N, M), added to the logits of the keys that are seen; it has no part in the choice.
        is_causal: the last N of the M keys are the queries' own, and query i sees none after its own.
        is_cross: the keys are another sequence's: no window, no sinks. Neither: N = M, of one sequence.
        return_weights: also return the weights (B, H, N, M), before dropout, written out.

    Returns:
        (B, H, N, d_v) in value's dtype; with `return_weights`, also the weights. A query that sees nothing gets zeros.

    Raises:
        ValueError: naming the field, its value and what is allowed.

    Sources: Landmark attention (Mohtashami & Jaggi, 2023), Quest (Tang et al., 2024), RetroInfer (Chen et al., 2025).
    """
    problem = problem_of(
        query, key, value, metric=metric, block_size=block_size, num_blocks=num_blocks, window_size=window_size,
        num_sinks=num_sinks, min_weight=min_weight, far_field=far_field, cluster_keys=cluster_keys, lam=lam, p=p,
        scaling=scaling, mask=mask, position_bias=position_bias, is_causal=is_causal, is_cross=is_cross,
        dropout_p=dropout_p, softening=softening,
    )  # fmt: skip
    output, weights = run_retrieval(problem, return_weights)
    return (output, weights) if return_weights else output


def problem_of(
    query, key, value, *, metric, block_size, num_blocks, min_weight, window_size, num_sinks, far_field, cluster_keys,
    lam, p, scaling, mask, softening, position_bias=None, is_causal=True, is_cross=False, dropout_p=0.0,
) -> Retrieval:  # fmt: skip
    """Return the problem that the arguments of `retrieval_attention` describe; raises as it does."""
    metric = get_metric(metric)
    p = metric.validate(p)
    check_shapes(query, key, value)
    batch, heads, num_queries, size = query.shape
    num_keys = key.shape[2]
    scaling = size**-0.5 if scaling is None else scaling
    if isinstance(scaling, bool) or not isinstance(scaling, Real) or not 0 < scaling < math.inf:
        raise ValueError(f"scaling must be a positive finite number, got {scaling!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    if is_causal and is_cross:
        raise ValueError("is_causal and is_cross exclude each other: another sequence has no future")
    if not is_cross and (num_queries > num_keys if is_causal else num_queries != num_keys):
        wanted = "no fewer keys than queries" if is_causal else "as many keys as queries, or is_cross=True"
        raise ValueError(f"retrieval attention needs {wanted}, got {num_queries} queries and {num_keys} keys")
    search = Search(window_size, num_sinks, block_size, num_blocks, min_weight, far_field, cluster_keys)
    search = replace(search, window_size=0, num_sinks=0) if is_cross else search
    search.budget(key.shape[1])
    if not is_cross and window_size < 1:
        raise ValueError(f"window_size must be an integer >= 1 unless is_cross, got {window_size!r}")
    check_mask_length(mask, num_keys)
    keep = _padding(mask, (batch, heads, num_queries, num_keys))
    open_entries, bias = merge_masks(None, position_bias, (batch, heads, num_queries, num_keys))
    if open_entries is not None and not bool(open_entries.all()):
        raise ValueError("position_bias must be finite: what it masks is not padding, which `mask` takes")
    inputs = AttentionInputs(
        query, key, value, metric, check_lambda(lam, metric, size, scaling, p, heads), float(scaling), p,
        None if keep is None else keep[:, None, None], bias, is_causal, dropout_p,
        softening=check_softening(metric, softening, heads),
    )  # fmt: skip
    return Retrieval(inputs, search, first_keys(keep))


def _padding(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """Return keep (B, M), or None where nothing is padding; raises `ValueError` for what is no padding mask."""
    keep, bias = split_mask(mask, shape)
    if bias is not None or (keep is not None and keep.shape[1:3] != (1, 1)):
        raise ValueError(
            f"mask must be padding, (B, M) or (B, 1, 1, M) of bool or 0/1 integers, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    if keep is None or bool(keep.all()):
        return None
    return keep[:, 0, 0].expand(shape[0], shape[3])
