"""Backward kernels of the Triton backend: weights are recomputed from the saved log-sum-exp, tile by tile.

Each kernel owns a block of rows (queries, or keys) and streams the others past it. Tiles are (streamed, owned), so that
sums for the owned rows run over axis 0. Importing this file needs Triton.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton backend needs the package triton") from error

from .kernel_triton_tile import (
    add_coordinate_gradient,
    add_matmul_gradient,
    coordinate_distance,
    load_rows,
    load_shift,
    masked_logits,
    matmul_distance,
    soft_coordinate_distance,
    weighted_sum,
)


@triton.jit
def query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    keep_ptr,
    bias_ptr,
    shift_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    grad_slope_ptr,
    grad_bias_ptr,
    grad_shift_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_m,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_m,
    v_stride_d,
    keep_stride_b,
    keep_stride_h,
    keep_stride_n,
    keep_stride_m,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    bias_stride_m,
    num_heads,
    groups,
    num_queries,
    num_keys,
    cap,
    METRIC: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute gradients for one block of queries of one head.

    grad_q (B, H, d, N) float32 starts as zeros, grad_slope is (B, H, N), as grad_shift where there is a cap, and
    grad_bias (B, H, N, M) starts as zeros.
    """
    blocks = tl.cdiv(num_queries, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    item = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = item // num_heads, item % num_heads
    k_ptr += batch * k_stride_b + head // groups * k_stride_h
    v_ptr += batch * v_stride_b + head // groups * v_stride_h
    keep_ptr += batch * keep_stride_b + head * keep_stride_h
    bias_ptr += batch * bias_stride_b + head * bias_stride_h
    slope = tl.load(slope_ptr + head)

    queries = first + tl.arange(0, BLOCK_N)
    query_inside = queries < num_queries
    rows = item * num_queries + queries
    q_ptrs = q_ptr + batch * q_stride_b + head * q_stride_h + queries.to(tl.int64) * q_stride_n
    grad_q_ptrs = grad_q_ptr + item * HEAD_DIM * num_queries + queries
    lse = tl.load(lse_ptr + rows, mask=query_inside, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=query_inside, other=0.0)
    grad_out = load_rows(grad_out_ptr + rows * VALUE_DIM, 1, query_inside, VALUE_DIM, BLOCK_V)
    shift = load_shift(shift_ptr, rows, query_inside, HAS_CAP)
    grad_slope = tl.zeros((BLOCK_N,), tl.float32)
    grad_shift = tl.zeros((BLOCK_N,), tl.float32)
    if METRIC == "l2":
        q = load_rows(q_ptrs, q_stride_d, query_inside, HEAD_DIM, BLOCK_D)
        grad_q = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    stop = num_keys
    if IS_CAUSAL:
        stop = tl.minimum(num_keys, first + BLOCK_N)
    for start in range(0, stop, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        key_inside = keys < num_keys
        k_ptrs = k_ptr + keys.to(tl.int64) * k_stride_m
        if METRIC == "l2":
            k = load_rows(k_ptrs, k_stride_d, key_inside, HEAD_DIM, BLOCK_D)
            distance = matmul_distance(k, q)
        elif SOFT:
            distance, count, reached = soft_coordinate_distance(
                k_ptrs, k_stride_d, key_inside, q_ptrs, q_stride_d, query_inside, METRIC, P, HEAD_DIM, BLOCK_M, BLOCK_N
            )
        else:
            distance, count, reached = coordinate_distance(
                k_ptrs, k_stride_d, key_inside, q_ptrs, q_stride_d, query_inside, METRIC, P, HEAD_DIM, BLOCK_M, BLOCK_N
            )
        logits, passed = masked_logits(
            distance,
            queries[None, :],
            keys[:, None],
            slope,
            keep_ptr,
            keep_stride_n,
            keep_stride_m,
            bias_ptr,
            bias_stride_n,
            bias_stride_m,
            shift[None, :],
            cap,
            num_queries,
            num_keys,
            IS_CAUSAL,
            HAS_KEEP,
            HAS_BIAS,
            HAS_CAP,
        )
        weights = tl.exp2(logits - lse[None, :])
        v = load_rows(v_ptr + keys.to(tl.int64) * v_stride_m, v_stride_d, key_inside, VALUE_DIM, BLOCK_V)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[None, :])
        if NEEDS_BIAS:
            tl.store(
                grad_bias_ptr + rows[None, :] * num_keys + keys[:, None],
                grad_logits,
                mask=query_inside[None, :] & key_inside[:, None],
            )
        grad_logits = grad_logits * passed
        grad_slope -= tl.sum(grad_logits * distance, axis=0)
        grad_shift += tl.sum(grad_logits, axis=0)
        grad_distance = -slope * grad_logits
        if METRIC == "l2":
            grad_q = add_matmul_gradient(grad_q, q, k, grad_distance, distance, PRECISION)
        else:
            if METRIC == "chebyshev" or METRIC == "soft_chebyshev":
                grad_distance = grad_distance / count
            add_coordinate_gradient(
                grad_q_ptrs,
                num_queries,
                q_ptrs,
                q_stride_d,
                query_inside,
                k_ptrs,
                k_stride_d,
                key_inside,
                grad_distance,
                reached,
                METRIC,
                P,
                HEAD_DIM,
            )

    tl.store(grad_slope_ptr + rows, grad_slope, mask=query_inside)
    if HAS_CAP:
        tl.store(grad_shift_ptr + rows, grad_shift, mask=query_inside)
    if METRIC == "l2":
        columns = tl.arange(0, BLOCK_D)
        tl.store(
            grad_q_ptrs[:, None] + columns[None, :] * num_queries,
            grad_q,
            mask=query_inside[:, None] & (columns[None, :] < HEAD_DIM),
        )


@triton.jit
def key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    keep_ptr,
    bias_ptr,
    shift_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_m,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_m,
    v_stride_d,
    keep_stride_b,
    keep_stride_h,
    keep_stride_n,
    keep_stride_m,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    bias_stride_m,
    num_heads,
    groups,
    num_queries,
    num_keys,
    cap,
    METRIC: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute gradients for one block of keys and values of one key head, over all query heads that use it.

    grad_k (B, H_kv, d, M) float32 starts as zeros; grad_v is (B, H_kv, M, d_v), contiguous float32.
    """
    blocks = tl.cdiv(num_keys, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    item = (tl.program_id(0) // blocks).to(tl.int64)
    key_heads = num_heads // groups
    batch, key_head = item // key_heads, item % key_heads

    keys = first + tl.arange(0, BLOCK_M)
    key_inside = keys < num_keys
    k_ptrs = k_ptr + batch * k_stride_b + key_head * k_stride_h + keys.to(tl.int64) * k_stride_m
    v_ptrs = v_ptr + batch * v_stride_b + key_head * v_stride_h + keys.to(tl.int64) * v_stride_m
    grad_k_ptrs = grad_k_ptr + item * HEAD_DIM * num_keys + keys
    v = load_rows(v_ptrs, v_stride_d, key_inside, VALUE_DIM, BLOCK_V)
    grad_v = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if METRIC == "l2":
        k = load_rows(k_ptrs, k_stride_d, key_inside, HEAD_DIM, BLOCK_D)
        grad_k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    begin = 0
    if IS_CAUSAL:
        # Queries before the block's first key see none of it.
        begin = first // BLOCK_N * BLOCK_N
    for member in range(groups):
        head = key_head * groups + member
        slope = tl.load(slope_ptr + head)
        for start in range(begin, num_queries, BLOCK_N):
            queries = start + tl.arange(0, BLOCK_N)
            query_inside = queries < num_queries
            rows = (batch * num_heads + head) * num_queries + queries
            q_ptrs = q_ptr + batch * q_stride_b + head * q_stride_h + queries.to(tl.int64) * q_stride_n
            if METRIC == "l2":
                q = load_rows(q_ptrs, q_stride_d, query_inside, HEAD_DIM, BLOCK_D)
                distance = matmul_distance(q, k)
            elif SOFT:
                distance, count, reached = soft_coordinate_distance(
                    q_ptrs,
                    q_stride_d,
                    query_inside,
                    k_ptrs,
                    k_stride_d,
                    key_inside,
                    METRIC,
                    P,
                    HEAD_DIM,
                    BLOCK_N,
                    BLOCK_M,
                )
            else:
                distance, count, reached = coordinate_distance(
                    q_ptrs,
                    q_stride_d,
                    query_inside,
                    k_ptrs,
                    k_stride_d,
                    key_inside,
                    METRIC,
                    P,
                    HEAD_DIM,
                    BLOCK_N,
                    BLOCK_M,
                )
            shift = load_shift(shift_ptr, rows, query_inside, HAS_CAP)
            logits, passed = masked_logits(
                distance,
                queries[:, None],
                keys[None, :],
                slope,
                keep_ptr + batch * keep_stride_b + head * keep_stride_h,
                keep_stride_n,
                keep_stride_m,
                bias_ptr + batch * bias_stride_b + head * bias_stride_h,
                bias_stride_n,
                bias_stride_m,
                shift[:, None],
                cap,
                num_queries,
                num_keys,
                IS_CAUSAL,
                HAS_KEEP,
                HAS_BIAS,
                HAS_CAP,
            )
            lse = tl.load(lse_ptr + rows, mask=query_inside, other=float("inf"))
            delta = tl.load(delta_ptr + rows, mask=query_inside, other=0.0)
            weights = tl.exp2(logits - lse[:, None])
            grad_out = load_rows(grad_out_ptr + rows * VALUE_DIM, 1, query_inside, VALUE_DIM, BLOCK_V)
            grad_v += weighted_sum(weights, grad_out, PRECISION)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            grad_distance = -slope * passed * weights * (grad_weights - delta[:, None])
            if METRIC == "l2":
                grad_k = add_matmul_gradient(grad_k, k, q, grad_distance, distance, PRECISION)
            else:
                if METRIC == "chebyshev" or METRIC == "soft_chebyshev":
                    grad_distance = grad_distance / count
                add_coordinate_gradient(
                    grad_k_ptrs,
                    num_keys,
                    k_ptrs,
                    k_stride_d,
                    key_inside,
                    q_ptrs,
                    q_stride_d,
                    query_inside,
                    grad_distance,
                    reached,
                    METRIC,
                    P,
                    HEAD_DIM,
                )

    item_keys = item * num_keys + keys
    columns = tl.arange(0, BLOCK_V)
    tl.store(
        grad_v_ptr + item_keys[:, None] * VALUE_DIM + columns[None, :],
        grad_v,
        mask=key_inside[:, None] & (columns[None, :] < VALUE_DIM),
    )
    if METRIC == "l2":
        columns = tl.arange(0, BLOCK_D)
        tl.store(
            grad_k_ptrs[:, None] + columns[None, :] * num_keys,
            grad_k,
            mask=key_inside[:, None] & (columns[None, :] < HEAD_DIM),
        )
