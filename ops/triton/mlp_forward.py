"""Forward of the mixture of MLP experts: plan, gate and up projection, down projection, sum over choices.

``y_t = sum_j w_tj (act(x_t Wup_e + bup_e) Wdown_e + bdown_e)``. No step looks at the routing on the host.
"""

from torch import Tensor

from fusedonemoe.ops.grouped import saved_rows
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.records import PLAIN, Activation
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.plan import make_plan
from fusedonemoe.ops.triton.rows import grouped_rows
from fusedonemoe.ops.triton.rules import tiles_of
from fusedonemoe.ops.triton.up import up_projection


def experts_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    save_percent: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer's output, and what its backward needs.

    Args:
        x_TD: tokens, bfloat16, float16 or float32.
        experts_TK: ids of any integer dtype; those outside ``[0, E)`` contribute nothing.
        weights_TK: routing weights of any floating dtype.
        up_EGD: a view with any strides, in the dtype of x.
        down_EDF: a view with any strides, in the dtype of x.
        up_bias_EG: or None.
        down_bias_ED: or None.
        act: activation and layout of ``G``.
        save_percent: how much of z is kept.

    Returns:
        ``y_TD``; ``z``, the first ``floor(N * save_percent / 100)`` rows of the sorted pre-activations, those of ids outside
        ``[0, E)`` not written; and the plan's ``order`` and ``offsets``.
    """
    E, G, _ = up_EGD.shape
    T, K = experts_TK.shape
    N = T * K
    tiles = tiles_of(x_TD, N, down_EDF.shape, gated=act.layout != PLAIN)
    plan = make_plan(experts_TK, E, tiles.up.BLOCK_M)
    z = x_TD.new_empty(saved_rows(N, save_percent), G)
    h_NF = up_projection(x_TD, up_EGD, up_bias_EG, plan, K, act, tiles.up, z)
    dtype = row_dtype(x_TD.dtype)
    y_ND = grouped_rows(h_NF, down_EDF.transpose(1, 2), plan, tiles.down, bias_EB=down_bias_ED, dtype=dtype)
    del h_NF
    return combine(y_ND, weights_TK, plan, x_TD.dtype), z, plan.order, plan.offsets
