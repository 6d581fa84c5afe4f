"""Jit functions that the kernels share: which tile a program owns, and the activations with their derivatives."""

import triton
import triton.language as tl


@triton.jit
def swizzled(pid, num_blocks, num_columns, GROUP_M: tl.constexpr):
    """Block of rows and block of columns of a program: GROUP_M row blocks share a column block before the next is read."""
    group_size = GROUP_M * num_columns
    first_block = pid // group_size * GROUP_M
    height = tl.minimum(num_blocks - first_block, GROUP_M)
    within = pid % group_size
    return first_block + within % height, within // height


@triton.jit
def multiply_rows(
    rows_ptr,  # [., length]
    weights_ptr,  # [length, .], an expert's
    source,  # [BLOCK_M]
    column,  # [BLOCK_N]
    in_columns,
    length,
    stride_wk,
    stride_wn,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``rows[source] @ weights[:, column]`` in float32; zeros in columns that do not exist.

    EVEN_K: ``length`` is a multiple of BLOCK_K. EVEN_N: all columns exist. Either saves a mask in the loop.
    """
    depth = tl.arange(0, BLOCK_K)
    rows_ptrs = rows_ptr + source.to(tl.int64)[:, None] * length + depth[None, :]
    weights_ptrs = weights_ptr + depth.to(tl.int64)[:, None] * stride_wk + column.to(tl.int64)[None, :] * stride_wn
    acc = tl.zeros((source.shape[0], column.shape[0]), tl.float32)
    for k in range(0, length, BLOCK_K):
        if EVEN_K:
            rows = tl.load(rows_ptrs)
        else:
            rows = tl.load(rows_ptrs, mask=depth[None, :] < length - k, other=0.0)
        if EVEN_K and EVEN_N:
            weights = tl.load(weights_ptrs)
        elif EVEN_K:
            weights = tl.load(weights_ptrs, mask=in_columns[None, :], other=0.0)
        else:
            weights = tl.load(weights_ptrs, mask=(depth[:, None] < length - k) & in_columns[None, :], other=0.0)
        acc = tl.dot(rows, weights, acc, input_precision=PRECISION)
        rows_ptrs += BLOCK_K
        weights_ptrs += BLOCK_K * stride_wk
    return acc


@triton.jit
def experts_of_choices(experts_ptr, token, j, E, K: tl.constexpr):
    """Experts of a token's choices ``j``, 0 where there is none, and which choices have one."""
    expert = tl.load(experts_ptr + token * K + j, mask=j < K, other=-1).to(tl.int64)
    here = (j < K) & (expert >= 0) & (expert < E)
    return tl.where(here, expert, 0), here


@triton.jit
def sigmoid(v):
    """``1 / (1 + exp(-v))`` of a float32."""
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def act_value(v, ACT: tl.constexpr):
    """``act(v)`` in float32, for the activations of one argument."""
    if ACT == "silu":
        return v * sigmoid(v)
    elif ACT == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return v * sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACT == "relu":
        return tl.maximum(v, 0.0)
    elif ACT == "relu2":
        r = tl.maximum(v, 0.0)
        return r * r
    elif ACT == "sigmoid":
        return sigmoid(v)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        return v


@triton.jit
def act_slope(v, ACT: tl.constexpr):
    """``act'(v)`` in float32."""
    if ACT == "silu":
        s = sigmoid(v)
        return s * (1.0 + v * (1.0 - s))
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    elif ACT == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
        return s + v * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * v * v)
    elif ACT == "relu":
        return tl.where(v > 0.0, 1.0, 0.0)
    elif ACT == "relu2":
        return 2.0 * tl.maximum(v, 0.0)
    elif ACT == "sigmoid":
        s = sigmoid(v)
        return s * (1.0 - s)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        return tl.full(v.shape, 1.0, tl.float32)


@triton.jit
def gated_value(gate, up, alpha, limit, ACT: tl.constexpr):
    """``h = act(gate) * up``, or GPT-OSS's clamped SwiGLU."""
    if ACT == "swiglu_oai":
        g = tl.minimum(gate, limit)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        return (u + 1.0) * (g * sigmoid(alpha * g))
    else:
        return act_value(gate, ACT) * up


@triton.jit
def gated_slopes(gate, up, dh, alpha, limit, ACT: tl.constexpr):
    """Gradients of gate and up. A clamp passes the gradient on its boundary and stops it outside."""
    if ACT == "swiglu_oai":
        g = tl.minimum(gate, limit)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        s = sigmoid(alpha * g)
        dgate = tl.where(gate <= limit, dh * (u + 1.0) * s * (1.0 + alpha * g * (1.0 - s)), 0.0)
        dup = tl.where(tl.abs(up) <= limit, dh * g * s, 0.0)
    else:
        dgate = dh * up * act_slope(gate, ACT)
        dup = dh * act_value(gate, ACT)
    return dgate, dup
