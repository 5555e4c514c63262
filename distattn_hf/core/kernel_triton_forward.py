"""Forward kernel of the Triton backend: a block of queries reads the keys block by block, with an online softmax.

Importing this file needs Triton.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton backend needs the package triton") from error

from .kernel_triton_tile import (
    coordinate_distance,
    load_rows,
    load_shift,
    masked_logits,
    matmul_distance,
    soft_coordinate_distance,
)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    keep_ptr,
    bias_ptr,
    shift_ptr,
    out_ptr,
    lse_ptr,
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
    """Compute out (B, H, N, d_v), lse (B, H, N), contiguous float32, for one block of queries of one head.

    lse_i = log2 Σ_j 2^(logits_ij), or +inf for a row with nothing kept, so that 2^(logits - lse) is its weight, 0.
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
    q_ptrs = q_ptr + batch * q_stride_b + head * q_stride_h + queries.to(tl.int64) * q_stride_n
    if METRIC == "l2":
        q = load_rows(q_ptrs, q_stride_d, query_inside, HEAD_DIM, BLOCK_D)

    shift = load_shift(shift_ptr, item * num_queries + queries, query_inside, HAS_CAP)
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    out = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    stop = num_keys
    if IS_CAUSAL:
        stop = tl.minimum(num_keys, first + BLOCK_N)
    for start in range(0, stop, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        key_inside = keys < num_keys
        k_ptrs = k_ptr + keys.to(tl.int64) * k_stride_m
        if METRIC == "l2":
            k = load_rows(k_ptrs, k_stride_d, key_inside, HEAD_DIM, BLOCK_D)
            distance = matmul_distance(q, k)
        elif SOFT:
            distance, _, _ = soft_coordinate_distance(
                q_ptrs, q_stride_d, query_inside, k_ptrs, k_stride_d, key_inside, METRIC, P, HEAD_DIM, BLOCK_N, BLOCK_M
            )
        else:
            distance, _, _ = coordinate_distance(
                q_ptrs, q_stride_d, query_inside, k_ptrs, k_stride_d, key_inside, METRIC, P, HEAD_DIM, BLOCK_N, BLOCK_M
            )
        logits, _ = masked_logits(
            distance,
            queries[:, None],
            keys[None, :],
            slope,
            keep_ptr,
            keep_stride_n,
            keep_stride_m,
            bias_ptr,
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
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        # -inf - (-inf) is NaN: a row that has seen nothing is measured from 0.
        offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(logits - offset[:, None])
        shrink = tl.exp2(largest - offset)
        total = total * shrink + tl.sum(weights, axis=1)
        v = load_rows(v_ptr + keys.to(tl.int64) * v_stride_m, v_stride_d, key_inside, VALUE_DIM, BLOCK_V)
        out = out * shrink[:, None] + tl.dot(weights, v.to(tl.float32), input_precision=PRECISION)
        largest = new_largest

    alive = total > 0
    divisor = tl.where(alive, total, 1.0)
    rows = item * num_queries + queries
    tl.store(lse_ptr + rows, tl.where(alive, largest + tl.log2(divisor), float("inf")), mask=query_inside)
    columns = tl.arange(0, BLOCK_V)
    tl.store(
        out_ptr + rows[:, None] * VALUE_DIM + columns[None, :],
        out / divisor[:, None],
        mask=query_inside[:, None] & (columns[None, :] < VALUE_DIM),
    )
