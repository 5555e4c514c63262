"""Parts that the Triton kernels share: the distances of one tile, their gradients, and the masked logits.

Importing this file needs Triton. All pointers to vectors are blocks of pointers to their first coordinates.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton backend needs the package triton") from error

# Logits are kept in base 2, because exp2 is what the hardware has.
LOG2_E = tl.constexpr(1.4426950408889634)

# As in metrics.Euclidean: below this ‖q-k‖² is rounding noise, and its root has slope 0.
NORM_EPSILON = tl.constexpr(1e-12)


@triton.jit
def power(x, P: tl.constexpr):
    """Return x^P for x >= 0, without logarithms where a few products and a root are enough."""
    if P == 0.5:
        result = tl.sqrt(x)
    elif P == 1.0:
        result = x
    elif P == 1.5:
        result = x * tl.sqrt(x)
    elif P == 2.0:
        result = x * x
    elif P == 2.5:
        result = x * x * tl.sqrt(x)
    elif P == 3.0:
        result = x * x * x
    elif P == 4.0:
        result = (x * x) * (x * x)
    else:
        result = tl.where(x > 0, tl.exp2(P * tl.log2(tl.where(x > 0, x, 1.0))), 0.0)
    return result


@triton.jit
def log1p(t):
    """Return log(1 + t), t >= 0, with the digits of a small t."""
    above = 1.0 + t
    step = above - 1.0
    return tl.where(step == 0, t, tl.log(above) * (t / tl.where(step == 0, 1.0, step)))


@triton.jit
def power_excess(t, P: tl.constexpr):
    """Return (1 + t)^P - 1, t >= 0, with the digits of a small t."""
    if P == 0.5:
        result = t / (tl.sqrt(1.0 + t) + 1.0)
    elif P == 1.0:
        result = t
    else:
        z = P * log1p(t)
        near = z * (1.0 + z * (0.5 + z * (0.16666667 + z * (0.041666667 + z * (0.0083333333 + z * 0.0013888889)))))
        result = tl.where(z < 0.35, near, tl.exp(z) - 1.0)
    return result


@triton.jit
def soft_coordinate_distance(
    a_ptrs,
    a_stride,
    a_inside,
    b_ptrs,
    b_stride,
    b_inside,
    METRIC: tl.constexpr,
    P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Return the softened distance in units of ε, of u = a - b in units of the knee, (BLOCK_A, BLOCK_B).

    soft_l1 mean_c(m·(|u_c| - m/2)), m = min(|u_c|, 1); soft_lp (mean_c (1 + u_c²)^(P/2))^(1/P) - 1; soft_chebyshev
    log(mean_c cosh u_c). Also what the slopes need: of soft_chebyshev, whose slopes are a softmax,
    Σ_c 2·cosh(u_c)·e^(-max|u|) and max|u|; of the others nothing (0) and the distance.
    """
    largest = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    count = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    if METRIC != "soft_l1":
        # No power and no exponential is taken of more than the ratio to the largest, so that none overflows.
        for c in range(HEAD_DIM):
            a = tl.load(a_ptrs + c * a_stride, mask=a_inside, other=0.0).to(tl.float32)
            b = tl.load(b_ptrs + c * b_stride, mask=b_inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(a[:, None] - b[None, :]))
    unit = tl.maximum(largest, 1.0)
    knee = 1.0 / unit
    for c in range(HEAD_DIM):
        a = tl.load(a_ptrs + c * a_stride, mask=a_inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptrs + c * b_stride, mask=b_inside, other=0.0).to(tl.float32)
        size = tl.abs(a[:, None] - b[None, :])
        if METRIC == "soft_l1":
            inner = tl.minimum(size, 1.0)
            total += inner * (size - 0.5 * inner)
        elif METRIC == "soft_lp":
            ratio = size * knee
            square = ratio * ratio
            if P == 2.0:
                total += square
            elif P == 3.0:
                root = tl.sqrt(square + knee * knee)
                total += square * (root + knee * knee / (root + knee))
            else:
                far = power(square + knee * knee, 0.5 * P) - power(knee, P)
                total += tl.where(largest <= 1.0, power_excess(square, 0.5 * P), far)
        else:
            square = tl.minimum(size * size, 1.0)
            total += square * (0.5 + square * (0.041666667 + square * (0.0013888889 + square * 2.4801587e-5)))
            count += tl.exp(size - largest) + tl.exp(-size - largest)
    if METRIC == "soft_l1":
        distance = total / HEAD_DIM
    elif METRIC == "soft_lp":
        mean = total / HEAD_DIM
        far = power(mean + power(knee, P), 1.0 / P) * unit - 1.0
        distance = tl.where(largest <= 1.0, power_excess(mean, 1.0 / P), far)
    else:
        far = largest + tl.log(tl.maximum(count, 1.0) / (2.0 * HEAD_DIM))
        distance = tl.where(largest <= 1.0, log1p(total / HEAD_DIM), far)
    reached = distance
    if METRIC == "soft_chebyshev":
        reached = largest
    return distance, count, reached


@triton.jit
def coordinate_distance(
    a_ptrs,
    a_stride,
    a_inside,
    b_ptrs,
    b_stride,
    b_inside,
    METRIC: tl.constexpr,
    P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Return (Σ_c|a_c - b_c|^P)^(1/P) or max_c|a_c - b_c|, (BLOCK_A, BLOCK_B), how many c reach the maximum, and it.

    One coordinate at a time: only the tile itself is held in registers, whatever the head size. Each step reads one
    number per row and per column, contiguous ones if the vectors are stored coordinate by coordinate.
    """
    distance = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    count = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for c in range(HEAD_DIM):
        a = tl.load(a_ptrs + c * a_stride, mask=a_inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptrs + c * b_stride, mask=b_inside, other=0.0).to(tl.float32)
        difference = tl.abs(a[:, None] - b[None, :])
        if METRIC == "chebyshev":
            count = tl.where(difference > distance, 1.0, count + tl.where(difference == distance, 1.0, 0.0))
            distance = tl.maximum(distance, difference)
        elif METRIC == "l1":
            distance += difference
        else:
            distance += power(difference, P)
    if METRIC == "lp":
        distance = power(distance, 1.0 / P)
    return distance, count, distance


@triton.jit
def power_of_softened(x, P: tl.constexpr):
    """Return x^(P/2 - 1) for x > 0."""
    if P == 1.5:
        result = 1.0 / tl.sqrt(tl.sqrt(x))
    elif P == 2.0:
        result = tl.full(x.shape, 1.0, tl.float32)
    else:
        result = power(x, 0.5 * P - 1.0)
    return result


@triton.jit
def add_coordinate_gradient(
    gradient_ptrs,
    gradient_stride,
    own_ptrs,
    own_stride,
    own_inside,
    other_ptrs,
    other_stride,
    other_inside,
    weight,
    distance,
    METRIC: tl.constexpr,
    P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Add Σ_other weight·∂distance/∂own_c to gradient[own, c]; weight and distance are (other, own).

    Of soft_chebyshev `distance` is the largest difference, and the weight is over Σ_c 2·cosh(u_c)·e^(-largest).

    The sums run over axis 0, which a thread mostly holds itself. They are added up in memory, as registers cannot be
    indexed by c. The rows belong to this program alone, and always to the same thread of it, so that the order of the
    additions is fixed, atomic or not; atomic ones do without barriers and without waiting for the old value.
    """
    if METRIC == "lp":
        inverse = tl.where(distance > 0, 1.0 / tl.where(distance > 0, distance, 1.0), 0.0)
    elif METRIC == "soft_lp":
        inverse = 1.0 / (1.0 + distance)
    elif METRIC == "soft_chebyshev":
        scale = tl.exp(-tl.minimum(distance, 80.0))
    for c in range(HEAD_DIM):
        own = tl.load(own_ptrs + c * own_stride, mask=own_inside, other=0.0).to(tl.float32)
        other = tl.load(other_ptrs + c * other_stride, mask=other_inside, other=0.0).to(tl.float32)
        difference = own[None, :] - other[:, None]
        if METRIC == "l1":
            size = weight
        elif METRIC == "lp":
            # The ratio is at most 1, so that no power of it overflows.
            size = weight * power(tl.abs(difference) * inverse, P - 1.0)
        elif METRIC == "soft_l1":
            size = weight * (tl.minimum(tl.abs(difference), 1.0) / HEAD_DIM)
        elif METRIC == "soft_lp":
            ratio = tl.abs(difference) * inverse
            size = weight * (ratio * power_of_softened(ratio * ratio + inverse * inverse, P) / HEAD_DIM)
        elif METRIC == "soft_chebyshev":
            far = tl.abs(difference)
            square = tl.minimum(far * far, 1.0)
            near = 1.0 + square * (
                0.16666667 + square * (0.0083333333 + square * (1.984127e-4 + square * 2.7557319e-6))
            )
            far = tl.where(far <= 1.0, 2.0 * far * near * scale, tl.exp(far - distance) - tl.exp(-far - distance))
            size = weight * far
        else:
            size = tl.where(tl.abs(difference) == distance, weight, 0.0)
        slope = tl.where(difference > 0, size, tl.where(difference < 0, -size, 0.0))
        tl.atomic_add(gradient_ptrs + c * gradient_stride, tl.sum(slope, axis=0), mask=own_inside, sem="relaxed")


@triton.jit
def load_rows(ptrs, stride, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Return (rows, BLOCK_DIM) in the tensor's own dtype, with zeros outside."""
    columns = tl.arange(0, BLOCK_DIM)
    return tl.load(
        ptrs[:, None] + columns[None, :] * stride, mask=inside[:, None] & (columns[None, :] < DIM), other=0.0
    )


@triton.jit
def matmul_distance(a, b):
    """Return ‖a_i - b_j‖ by ‖a‖² + ‖b‖² - 2a·b, clamped as in Euclidean.fast_distance; a and b share a dtype."""
    a_wide, b_wide = a.to(tl.float32), b.to(tl.float32)
    squared = tl.sum(a_wide * a_wide, axis=1)[:, None] + tl.sum(b_wide * b_wide, axis=1)[None, :]
    # Products of half-precision numbers are exact in float32, in which they are summed.
    squared -= 2.0 * tl.dot(a, tl.trans(b), input_precision="ieee")
    return tl.sqrt(tl.maximum(squared, NORM_EPSILON))


@triton.jit
def add_matmul_gradient(gradient, own, other, weight, distance, PRECISION: tl.constexpr):
    """Return gradient (own, dim) + Σ_other weight·∂distance/∂own; weight and distance are (other, own).

    With w = weight/distance, Σ w·(own - other) = own·Σw - wᵀ·other.
    """
    # The clamp has slope 0: a distance at its lower end passes nothing on.
    weight = tl.where(distance * distance > 1.0001 * NORM_EPSILON, weight / distance, 0.0)
    gradient += own.to(tl.float32) * tl.sum(weight, axis=0)[:, None]
    return gradient - weighted_sum(weight, other, PRECISION)


@triton.jit
def weighted_sum(weight, rows, PRECISION: tl.constexpr):
    """Return weightᵀ (n, m) · rows (m, dim); weights stay in float32, half precision would lose their accuracy."""
    return tl.dot(tl.trans(weight), rows.to(tl.float32), input_precision=PRECISION)


@triton.jit
def load_shift(shift_ptr, rows, inside, HAS_CAP: tl.constexpr):
    """Return what is added to the logits of each row inside the cap; 0 without a cap, as a softmax forgets it."""
    shift = tl.zeros(rows.shape, tl.float32)
    if HAS_CAP:
        shift = tl.load(shift_ptr + rows, mask=inside, other=0.0)
    return shift


@triton.jit
def tanh(x):
    """Return tanh(x), with the digits of a small x, as logits far below a large cap are: its series below 0.2."""
    square = x * x
    near = x * (1.0 - square * (0.33333333 - square * (0.13333333 - square * 0.053968254)))
    shrunk = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(square < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def masked_logits(
    distance,
    queries,
    keys,
    slope,
    keep_ptr,
    keep_stride_n,
    keep_stride_m,
    bias_ptr,
    bias_stride_n,
    bias_stride_m,
    shift,
    cap,
    num_queries,
    num_keys,
    IS_CAUSAL: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Return (cap·tanh((shift - slope·distance) / cap) + bias)·log2(e), -inf where masked, and the slope of the tanh.

    Without a cap the logit is -slope·distance + bias, and its slope 1. `queries`, `keys` and `shift` broadcast.
    """
    # A mask of 46,341² entries has offsets beyond int32.
    far_queries, far_keys = queries.to(tl.int64), keys.to(tl.int64)
    kept = (queries < num_queries) & (keys < num_keys)
    if IS_CAUSAL:
        kept = kept & (keys <= queries)
    logits = -slope * distance
    passed = 1.0
    if HAS_CAP:
        share = tanh((shift + logits) / cap)
        logits = cap * share
        passed = 1.0 - share * share
    if HAS_BIAS:
        bias = tl.load(bias_ptr + far_queries * bias_stride_n + far_keys * bias_stride_m, mask=kept, other=0.0)
        logits += bias.to(tl.float32)
    if HAS_KEEP:
        keep = tl.load(keep_ptr + far_queries * keep_stride_n + far_keys * keep_stride_m, mask=kept, other=0)
        kept = kept & (keep != 0)
    return tl.where(kept, logits * LOG2_E, float("-inf")), passed
