"""MoMoE's names: ``MoMoE``, its ``TopKRouter`` and the block ``MoE`` of both.

Suffixes of tensor names are MoMoE's here: B batch, S sequence, M = B * S tokens, D embedding, H intermediate, N experts,
K experts per token, of which the last Ks experts are shared (every token takes them).

Source:
    Costin et al. 2025, "MoMoE: Memory optimized Mixture of Experts"; Wang et al. 2024 (arXiv 2408.15664) for the biases.
"""

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fusedonemoe import functional as F
from fusedonemoe.balance.bias import check_step_dtype, update_selection_bias
from fusedonemoe.checks import check_count, check_float, check_same_device, check_save_percent, check_shape, check_tensor
from fusedonemoe.compat.arguments import check_finite, check_last, check_placed
from fusedonemoe.layers.kept_buffers import KeptBuffers
from fusedonemoe.layers.routers import routing_impl
from fusedonemoe.linear import routing_linear, uniform_by_fan_in


def _home(device: torch.device | str | None, dtype: torch.dtype | None, **weights: Tensor | None) -> dict[str, Any]:
    """Where parameters live: as asked for, as given, or as in MoMoE: bfloat16 on the GPU, when there is one."""
    for name, weight in weights.items():
        if weight is not None:
            check_float(name, weight)
    given = next((weight for weight in weights.values() if weight is not None), None)
    if device is None:
        device = torch.get_default_device() if given is None else given.device
        if given is None and device.type == "cpu" and torch.cuda.is_available():
            device = "cuda"
    return {"device": torch.device(device), "dtype": dtype or (torch.bfloat16 if given is None else given.dtype)}


def _parameter(name: str, given: Tensor | None, shape: tuple[int, ...], fan_in: int, home: dict[str, Any]) -> nn.Parameter:
    if given is not None:
        check_shape(name, given, shape)
        return nn.Parameter(given.detach().clone(memory_format=torch.contiguous_format).to(**home))
    parameter = nn.Parameter(torch.empty(shape, **home))
    uniform_by_fan_in(parameter, fan_in)
    return parameter


def _check_sizes(num_experts: int, num_chosen_experts: int, **sizes: int) -> None:
    for name, size in {**sizes, "num_experts": num_experts}.items():
        check_count(name, size)
    check_count("num_chosen_experts", num_chosen_experts, 1, num_experts, "num_experts")


def _ids_of(mask_NM: Tensor, K: int) -> Tensor:
    """``[M, K]`` ids of the experts that each token's column of the mask names, in id order; N where it names fewer."""
    N, M = mask_NM.shape
    chosen_MN = mask_NM.t() != 0
    slot_MN = chosen_MN.cumsum(1) - 1
    # Slot K is thrown away: it takes the experts that are not chosen, and a token's choices beyond its K-th.
    slot_MN = torch.where(chosen_MN & (slot_MN < K), slot_MN, K)
    ids_N = torch.arange(N, device=mask_NM.device)
    return ids_N.new_full((M, K + 1), N).scatter(1, slot_MN, ids_N.expand(M, N))[:, :K]


class MoMoE(nn.Module):
    """SwiGLU experts behind a dense mask: ``y_m = sum_n s_nm ((a * silu(b)) Wl2_n)``, ``[a | b] = x_m Wl1_n``, ``mask_nm != 0``.

    Args:
        embedding_dim: ``D``.
        intermediate_dim: ``H``.
        num_experts: ``N``.
        num_chosen_experts: ``K``, experts per token, shared ones included.
        save_percent: 0 to 100, the share of pre-activations kept for the backward pass; the rest is computed again.
        Wl1_ND2H: ``[N, D, 2H]``, linear columns and then gate columns, copied into the parameter; None draws it.
        Wl2_NHD: ``[N, H, D]``, likewise.
        impl: as in :func:`fusedonemoe.functional.experts_mlp`.
        device: of the parameters; by default that of the given weights, or a GPU, or the CPU.
        dtype: of the parameters; by default that of the given weights, or bfloat16.

    Shape:
        x_BSD ``[..., D]`` with M tokens in all, mask_NM ``[N, M]``, s_NM ``[N, M]`` to y_BSD ``[..., D]`` in the dtype of the
        parameters and tokens_per_expert_N ``[N]`` int64.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.momoe import MoMoE
        >>> momoe = MoMoE(embedding_dim=16, intermediate_dim=8, num_experts=4, num_chosen_experts=2, device="cpu")
        >>> mask_NM = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0], [0, 0, 1]])
        >>> y_BSD, tokens_per_expert_N = momoe(torch.randn(1, 3, 16), mask_NM, mask_NM / 2)
        >>> y_BSD.shape, tokens_per_expert_N
        (torch.Size([1, 3, 16]), tensor([2, 2, 1, 1]))
    """

    def __init__(
        self,
        embedding_dim: int,
        intermediate_dim: int,
        num_experts: int,
        num_chosen_experts: int,
        save_percent: int = 0,
        Wl1_ND2H: Tensor | None = None,
        Wl2_NHD: Tensor | None = None,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, num_chosen_experts, embedding_dim=embedding_dim, intermediate_dim=intermediate_dim)
        check_save_percent(save_percent)
        self.D, self.H, self.N, self.K = embedding_dim, intermediate_dim, num_experts, num_chosen_experts
        self.save_percent = save_percent
        self.impl = impl
        home = _home(device, dtype, Wl1_ND2H=Wl1_ND2H, Wl2_NHD=Wl2_NHD)
        self.Wl1_ND2H: nn.Parameter = _parameter("Wl1_ND2H", Wl1_ND2H, (self.N, self.D, 2 * self.H), self.D, home)
        self.Wl2_NHD: nn.Parameter = _parameter("Wl2_NHD", Wl2_NHD, (self.N, self.H, self.D), self.H, home)

    def forward(self, x_BSD: Tensor, mask_NM: Tensor, s_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Run every token through the experts that its column of the mask names.

        Args:
            x_BSD: ``[..., D]``, any float dtype; computed in the dtype of the parameters.
            mask_NM: ``[N, M]``, boolean or integer, not 0 where expert n takes token m. A token with fewer than K experts
                runs through those; with more than K, through the K of lowest id.
            s_NM: ``[N, M]`` routing weights of any float dtype; read where the mask is set.
        """
        check_last("x_BSD", x_BSD, self.D)
        x_MD = x_BSD.reshape(-1, self.D)
        check_tensor("mask_NM", mask_NM)
        if mask_NM.is_floating_point() or mask_NM.is_complex():
            raise TypeError(f"mask_NM must be boolean or of an integer dtype, got {mask_NM.dtype}")
        check_float("s_NM", s_NM)
        for name, tensor in (("mask_NM", mask_NM), ("s_NM", s_NM)):
            check_shape(name, tensor, (self.N, x_MD.shape[0]))
        for name, tensor in (("x_BSD", x_BSD), ("mask_NM", mask_NM), ("s_NM", s_NM)):
            check_same_device(name, tensor, "the parameters", self.Wl1_ND2H.device)
        ids_MK = _ids_of(mask_NM, self.K)
        # An id of N names no expert: whatever stands at the clamped place is read, contributes nothing and gets no gradient.
        s_MK = s_NM.t().gather(1, ids_MK.clamp(max=self.N - 1))
        return self._experts(x_MD, ids_MK, s_MK).reshape(x_BSD.shape), (mask_NM != 0).sum(1)

    def _experts(self, x_MD: Tensor, ids_MK: Tensor, s_MK: Tensor) -> Tensor:
        form: dict[str, Any] = {"gate_up_layout": "up_gate", "transposed": True, "save_percent": self.save_percent}
        x_MD = x_MD.to(self.Wl1_ND2H.dtype)
        return F.experts_mlp(x_MD, ids_MK, s_MK, self.Wl1_ND2H, self.Wl2_NHD, **form, impl=self.impl)

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        return (
            f"embedding_dim={self.D}, intermediate_dim={self.H}, num_experts={self.N}, num_chosen_experts={self.K}, "
            f"save_percent={self.save_percent}"
        )


class TopKRouter(nn.Module):
    """MoMoE's router: softmax and then top-k over the routed experts, a softmax of their own for the shared ones.

    With logits ``l = x Wg``: ``p = softmax(l[:N-Ks])``, the ``K - Ks`` experts of largest ``p + bias``, ``s = p / sum(p)`` over
    them; and ``s = softmax(l[N-Ks:])`` for the last Ks experts, which every token takes. The bias never enters a weight.
    All of it runs in float32.

    Args:
        embedding_dim: ``D``.
        num_experts: ``N``, shared ones included.
        num_chosen_experts: ``K``, shared ones included.
        num_shared_experts: ``Ks``.
        Wg_DN: ``[D, N]``, copied into the parameter; None draws it.
        impl: as in :func:`fusedonemoe.functional.route`; ``device`` and ``dtype`` as in :class:`MoMoE`.

    Shape:
        x_BSD ``[..., D]``, biases_N ``[N]`` to x_BSD itself, mask_NM ``[N, M]`` int32 and s_NM ``[N, M]`` float32.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.momoe import TopKRouter
        >>> router = TopKRouter(16, num_experts=5, num_chosen_experts=3, num_shared_experts=1, device="cpu")
        >>> x_BSD, mask_NM, s_NM = router(torch.randn(2, 7, 16), torch.zeros(5))
        >>> mask_NM.shape, mask_NM.sum(0).unique(), mask_NM[-1].unique()
        (torch.Size([5, 14]), tensor([3]), tensor([1], dtype=torch.int32))
        >>> torch.allclose(s_NM.sum(0), torch.tensor(2.0))
        True
    """

    def __init__(
        self,
        embedding_dim: int,
        num_experts: int,
        num_chosen_experts: int,
        num_shared_experts: int,
        Wg_DN: Tensor | None = None,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, num_chosen_experts, embedding_dim=embedding_dim)
        check_count("num_shared_experts", num_shared_experts, 0, num_chosen_experts, "num_chosen_experts")
        self.D, self.N, self.K = embedding_dim, num_experts, num_chosen_experts
        self.Ks: int = num_shared_experts
        self.impl = impl
        self.Wg_DN: nn.Parameter = _parameter("Wg_DN", Wg_DN, (self.D, self.N), self.D, _home(device, dtype, Wg_DN=Wg_DN))

    def forward(self, x_BSD: Tensor, biases_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route every token of ``x_BSD``.

        Args:
            x_BSD: ``[..., D]``, any float dtype.
            biases_N: ``[N]``, any float dtype; added to a routed expert's probability for the selection only. The entries of
                the shared experts are not read.
        """
        weights_MK, ids_MK = self._route(x_BSD, biases_N)
        s_MN = weights_MK.new_zeros(ids_MK.shape[0], self.N).scatter(1, ids_MK, weights_MK)
        mask_MN = torch.zeros_like(s_MN, dtype=torch.int32).scatter(1, ids_MK, 1)
        return x_BSD, mask_MN.t(), s_MN.t()

    def _route(self, x_BSD: Tensor, biases_N: Tensor) -> tuple[Tensor, Tensor]:
        check_last("x_BSD", x_BSD, self.D)
        check_same_device("x_BSD", x_BSD, "the parameters", self.Wg_DN.device)
        check_placed("biases_N", biases_N, (self.N,), x_BSD.device, "x_BSD")
        logits_MN = routing_linear(x_BSD.reshape(-1, self.D), self.Wg_DN.t())
        return F.route_with_shared(logits_MN, self.K, self.Ks, selection_bias=biases_N, impl=self.impl)

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        return f"embedding_dim={self.D}, num_experts={self.N}, num_chosen_experts={self.K}, num_shared_experts={self.Ks}"


class MoE(KeptBuffers):
    """MoMoE's block: :class:`TopKRouter`, :class:`MoMoE`, and expert biases that even out the load without a loss.

    After each step of a torch optimizer that holds a parameter of the block, ``bias_i += bias_update_rate * sign(mean(c) - c_i)``
    with ``c_i`` the tokens that expert i of the ``N - Ks`` routed ones took in training mode since the last step. Between two
    steps biases stay as they are, so that what activation checkpointing repeats is routed as the first time; it is counted
    once. Evaluation changes nothing.

    Args:
        bias_update_rate: how far a bias moves in one step. All other arguments are those of :class:`TopKRouter` and
            :class:`MoMoE`.

    Shape:
        ``[..., D]`` to ``[..., D]`` in the dtype of the parameters.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.momoe import MoE
        >>> moe = MoE(16, 8, num_experts=5, num_chosen_experts=3, num_shared_experts=1, device="cpu")
        >>> moe(torch.randn(2, 7, 16)).shape
        torch.Size([2, 7, 16])
    """

    biases_N: Tensor
    counts_N: Tensor
    float32_buffers: ClassVar[tuple[str, ...]] = ("biases_N",)
    fixed_buffers: ClassVar[tuple[str, ...]] = ("counts_N",)

    def __init__(
        self,
        embedding_dim: int,
        intermediate_dim: int,
        num_experts: int,
        num_chosen_experts: int,
        num_shared_experts: int,
        save_percent: int = 0,
        bias_update_rate: float = 1e-4,
        Wg_DN: Tensor | None = None,
        Wl1_ND2H: Tensor | None = None,
        Wl2_NHD: Tensor | None = None,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_finite("bias_update_rate", bias_update_rate, least=0)
        self.bias_update_rate = bias_update_rate
        home: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (num_experts, num_chosen_experts)
        self.router: TopKRouter = TopKRouter(embedding_dim, *sizes, num_shared_experts, Wg_DN, impl=routing_impl(impl), **home)
        self.momoe: MoMoE = MoMoE(embedding_dim, intermediate_dim, *sizes, save_percent, Wl1_ND2H, Wl2_NHD, impl=impl, **home)
        self.D, self.H, self.N, self.K = embedding_dim, intermediate_dim, *sizes
        self.Ks: int = num_shared_experts
        self.save_percent = save_percent
        biases_N = torch.zeros(self.N, dtype=torch.float32, device=self.router.Wg_DN.device)
        biases_N[self.N - self.Ks :] = -torch.inf
        self.register_buffer("biases_N", biases_N)
        self.register_buffer("counts_N", torch.zeros_like(biases_N, dtype=torch.int64))
        _blocks.add(self)

    @torch.no_grad()
    def update_biases(self) -> None:
        """Move the biases by what was counted and start counting anew; steps of torch's optimizers call this."""
        if self.Ks < self.N:
            check_step_dtype("biases_N", self.biases_N)
            update_selection_bias(self.biases_N, self.counts_N, self.bias_update_rate, num_shared_experts=self.Ks)
        self.counts_N.zero_()

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Run the block on ``x_BSD`` ``[..., D]``."""
        weights_MK, ids_MK = self.router._route(x_BSD, self.biases_N)
        if self.training:
            torch.ops.fusedonemoe.count_tokens_(self.counts_N, ids_MK)
        return self.momoe._experts(x_BSD.reshape(-1, self.D), ids_MK, weights_MK).reshape(x_BSD.shape)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _blocks.add(self)  # a copy balances itself too

    def extra_repr(self) -> str:
        """Return the sizes that the parts do not print, for ``print(module)``."""
        return f"bias_update_rate={self.bias_update_rate}"


_blocks: "weakref.WeakSet[MoE]" = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _blocks:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for block in list(_blocks):
            if any(id(parameter) in stepped for parameter in block.parameters()):
                block.update_biases()


# MoMoE's users call nothing for the biases: the block has to learn of a step by itself.
register_optimizer_step_post_hook(_after_step)
