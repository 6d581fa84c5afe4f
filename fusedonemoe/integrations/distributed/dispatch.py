"""The dispatchers of expert parallelism: they send each row to the process of its expert, and bring results back.

Experts stand in blocks of ``ceil(E / W)``, one block for each of ``W`` ranks, the last ones shorter or empty: the shards of
``DTensor``. Suffixes beside those of the library: W ranks, N rows that a rank sends out or keeps, R rows that it has after the
exchange, M routed rows among those, S slots for outgoing rows.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fusedonemoe.checks import check_count, check_dim, check_number, check_routing
from fusedonemoe.integrations.distributed.collectives import all_to_all, gather, gather_sum
from fusedonemoe.integrations.distributed.signature import Gradients, Ranks, gradients_of, joined, signature_of
from fusedonemoe.ops.plan import in_range, inverse_order, make_plan


class Dispatched(NamedTuple):
    """The rows of all ranks for the experts of this one.

    Attributes:
        x: ``[M, D]``, rows of one expert in the order of the whole batch: by rank, then by token.
        experts: ``[M, 1]`` int32 local ids; ``ceil(E / W)``, which names no expert, in rows that hold nothing.
        weights: ``[M, 1]`` routing weights.
        combine: from ``[M, D]``, the weighted output of every row, to this rank's ``[T, D]``.
    """

    x: Tensor
    experts: Tensor
    weights: Tensor
    combine: Callable[[Tensor], Tensor]


class _Dispatcher(Ranks):
    """A group, and where in it the experts are: rank ``r`` has ``[r * block, (r + 1) * block)``."""

    def __init__(self, group: ProcessGroup, num_experts: int, *, compares: bool = False) -> None:
        check_count("num_experts", num_experts)
        super().__init__(group, compares=compares)
        self.num_experts = num_experts
        self.block: int = math.ceil(num_experts / self.world)

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Bring this rank's tokens, any number, to their experts; a collective call.

        Ids are of any integer dtype and count the experts of all ranks; those outside ``[0, E)`` go nowhere.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: shapes that do not fit, or D, K, a dtype or ``E`` that differs between the ranks, which the message names.
            RuntimeError: another rank has refused its arguments, or died, or did not come.
        """

        def check() -> None:
            check_routing(x_TD, experts_TK, weights_TK)
            check_dim("x_TD", x_TD, "T, D")

        self.check(check, x_TD.device if isinstance(x_TD, Tensor) else torch.device("cpu"))
        return self.exchange(x_TD, experts_TK, weights_TK)

    def exchange(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *, trained: bool = False) -> Dispatched:
        """:meth:`dispatch` for checked arguments, and experts whose parameters are ``trained``.

        A gradient that one rank needs is exchanged by all of them, those too whose own arguments require none.
        """
        asked = gradients_of(x_TD, weights_TK, trained)
        signature = 0
        if self.world > 1:
            signature = self.check(lambda: signature_of(x_TD, experts_TK, weights_TK, self.num_experts, asked), x_TD.device)
        return self._send(x_TD, experts_TK, weights_TK, signature, asked)

    def _send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, signature: int, asked: Gradients) -> Dispatched:
        """Compare the signature with that of the other ranks, and exchange rows."""
        raise NotImplementedError

    def _owners(self, experts_TK: Tensor) -> Tensor:
        """The rank of each choice, ``W`` for an id that names no expert. ``[T, K]`` int64."""
        ids = experts_TK.to(torch.int64)
        return torch.where(in_range(ids, self.num_experts), ids // self.block, self.world)

    def _place(self, rank: Tensor) -> Tensor:
        """Where the rows for a rank stand among the outgoing ones: this rank's own are the last."""
        return torch.where(rank == self.rank, self.world - 1, rank - (rank > self.rank).to(rank.dtype))

    def _rank_at(self, place: Tensor) -> Tensor:
        return torch.where(place == self.world - 1, self.rank, place + (place >= self.rank).to(place.dtype))

    def _without_own(self, sizes: list[int]) -> list[int]:
        """Split sizes for the collective, in which rows that stay take no part."""
        return [0 if r == self.rank else size for r, size in enumerate(sizes)]

    def _travel(
        self, outgoing: tuple[Tensor, ...], send: list[int], receive: list[int], own: int, graded: bool
    ) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
        """Rows in the order of their ranks, so that every expert meets its rows in the order of the whole batch.

        Also returns the way back, to rows in the outgoing order; ``graded`` says that some rank needs gradients.
        """
        before, after = sum(receive[: self.rank]), sum(receive[self.rank :])
        arrived = []
        for rows in outgoing:
            leaving, staying = rows.split([sum(send), own])
            first, last = all_to_all(leaving, receive, send, self.group).split([before, after])
            arrived.append(torch.cat((first, staying, last)))

        def back(rows: Tensor) -> Tensor:
            first, staying, last = joined(rows, graded).split([before, own, after])
            return torch.cat((all_to_all(torch.cat((first, last)), send, receive, self.group), staying))

        return arrived, back


def _compact(marked: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the indices of a flat mask's marked entries, ``[length]``, and each entry's number among them; or ``length``."""
    # That length is taken from the device: what the host read is for shapes alone. Inductor may place a kernel that has such a
    # number for an argument before the line that reads it.
    number = torch.where(marked, marked.to(torch.int64).cumsum(0) - 1, marked.sum())
    slot = torch.where(marked, number, marked.shape[0])
    entries = torch.arange(marked.shape[0], device=marked.device)
    which = entries.new_zeros(marked.shape[0] + 1).scatter(0, slot, entries)
    return which[:length], number


class AllToAll(_Dispatcher):
    """Sends a token once to every rank that holds experts it picked: as many rows as there are, and no others.

    Ids and weights go with the row. The rank that receives it runs its experts and returns one row, their weighted sum. The
    sizes are read on the host, once in a forward.

    Args:
        group: the process group.
        num_experts: ``E``, over all ranks.
        spare: extra rows of zeros for the experts, with an id that names none: 1 for experts that cannot take 0 rows.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fusedonemoe.integrations.distributed import AllToAll
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dispatcher = AllToAll(dist.group.WORLD, num_experts=4)
        >>> rows = dispatcher.dispatch(torch.randn(3, 8), torch.tensor([[0, 1], [1, 3], [2, -1]]), torch.ones(3, 2))
        >>> rows.x.shape, rows.experts.flatten().tolist()
        (torch.Size([5, 8]), [0, 1, 1, 3, 2])
        >>> rows.combine(rows.x).shape
        torch.Size([3, 8])
        >>> dist.destroy_process_group()
    """

    numbers = 2

    def __init__(self, group: ProcessGroup, num_experts: int, *, spare: int = 0) -> None:
        super().__init__(group, num_experts, compares=True)
        self.spare = spare

    def _sizes(self, picked_TW: Tensor, owner_TK: Tensor, signature: int, asked: Gradients) -> tuple[list[list[int]], Gradients]:
        """Rows sent to each rank, choices in them, rows received from each, choices in those; and the gradients of all ranks."""
        W = self.world
        choices_W = (owner_TK.reshape(-1, 1) == torch.arange(W, device=owner_TK.device)).sum(0)
        sent_W2 = torch.stack((picked_TW.sum(0), choices_W), 1)
        # The signature travels with the sizes, so that the comparison costs no message.
        _, received_W3 = self.exchange_signatures(signature, sent_W2)
        if torch.compiler.is_compiling():
            self.assert_equal(received_W3[:, 2], signature)
            received_W3 = received_W3[:, :2]
        flat: list[int] = torch.cat((sent_W2, received_W3), 1).T.reshape(-1).tolist()  # the one look at the device
        for size in flat:
            torch._check(size >= 0)
        if not torch.compiler.is_compiling() and W > 1:
            asked = self.check_signatures(flat[4 * W :])
        return [flat[i * W : (i + 1) * W] for i in range(4)], asked

    def _send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, signature: int, asked: Gradients) -> Dispatched:
        (T, K), W, device = experts_TK.shape, self.world, x_TD.device
        owner_TK = self._owners(experts_TK)
        # The first choice that takes a token to a rank, K where there is none: the others travel with it.
        choice_TK = torch.arange(K, device=device).expand(T, K)
        first_TW = choice_TK.new_full((T, W + 1), K).scatter_reduce(1, owner_TK, choice_TK, "amin")
        is_first_TK = (first_TW.gather(1, owner_TK) == choice_TK) & (owner_TK < W)
        picked_TW = first_TW[:, :W] < K
        (sent, _, received, choices), needed = self._sizes(picked_TW, owner_TK, signature, asked)
        x_TD, weights_TK = joined(x_TD, needed.x), joined(weights_TK, needed.weights)
        send, receive, own = self._without_own(sent), self._without_own(received), sent[self.rank]
        N = sum(send) + own
        torch._check(N <= T * W)

        r = self.rank
        outgoing_TW = torch.cat((picked_TW[:, :r], picked_TW[:, r + 1 :], picked_TW[:, r : r + 1]), 1)
        flat_N, number_WT = _compact(outgoing_TW.T.reshape(-1), N)
        token_N = flat_N % max(T, 1)
        rank_N = self._rank_at(flat_N // max(T, 1))
        place_TK = self._place(owner_TK).clamp(max=W - 1)
        position_TK = torch.where(is_first_TK, number_WT.view(W, T).T.gather(1, place_TK), picked_TW.sum())

        here_NK = owner_TK.index_select(0, token_N) == rank_N[:, None]
        local_NK = experts_TK.index_select(0, token_N).to(torch.int64) - (rank_N * self.block)[:, None]
        ids_NK = torch.where(here_NK, local_NK, self.block).to(torch.int32)
        # Every row takes all K weights along; the experts give a gradient to those of the choices that are theirs.
        outgoing = (gather(x_TD, token_N, position_TK), ids_NK, gather(weights_TK, token_N, position_TK))
        (rows, ids, weights), back = self._travel(outgoing, send, receive, own, any(needed))
        return self._unfold(rows, ids, weights, sum(choices), lambda y_RD: gather_sum(back(y_RD), token_N, position_TK))

    def _unfold(
        self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor, routed: int, combine: Callable[[Tensor], Tensor]
    ) -> Dispatched:
        """One row for each choice that is this rank's: of a received row's K, those are few."""
        (R, K), M = ids_RK.shape, routed + self.spare
        torch._check(routed <= R * K)
        marked_RK = ids_RK < self.block
        if self.spare:
            x_RD, weights_RK = (torch.cat((rows, rows.new_zeros(self.spare, rows.shape[1]))) for rows in (x_RD, weights_RK))
            ids_RK = torch.cat((ids_RK, ids_RK.new_full((self.spare, K), self.block)))
            first_slot = torch.arange(K, device=ids_RK.device) == 0
            marked_RK = torch.cat((marked_RK, first_slot.expand(self.spare, K)))
        flat_M, number = _compact(marked_RK.reshape(-1), M)
        row_M, position_RK = flat_M // K, number.view(-1, K)
        return Dispatched(
            gather(x_RD, row_M, position_RK),
            ids_RK.reshape(-1, 1).index_select(0, flat_M),
            gather(weights_RK.reshape(-1, 1), flat_M, number[:, None]),
            lambda y_MD: combine(gather_sum(y_MD, row_M, position_RK)[:R]),
        )


class FixedCapacity(_Dispatcher):
    """Sends every other rank the same number of rows, filled up or cut off: nothing is read on the host.

    One row for each choice of an expert elsewhere, at most ``S = ceil(capacity_factor * T * K / W)`` for each pair of ranks;
    even routing needs a factor of 1. What exceeds it is dropped in the order of the tokens: it adds nothing to the output, and
    ``dropped`` counts it. Rows that stay need no place, so a factor of ``W`` drops nothing.

    Args:
        group: the process group, in which every rank has the same number of tokens, unless ``capacity`` is given.
        num_experts: ``E``, over all ranks.
        capacity_factor: above 0; ``math.inf`` for as many rows as there can be.
        capacity: ``S`` itself, instead of a factor.

    Attributes:
        dropped: ``[1]`` int64, the choices dropped by this rank so far; None before the first call. What activation
            checkpointing repeats counts once.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fusedonemoe.integrations.distributed import FixedCapacity
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dispatcher = FixedCapacity(dist.group.WORLD, num_experts=4, capacity_factor=1.0)
        >>> rows = dispatcher.dispatch(torch.randn(3, 8), torch.tensor([[0, 1], [1, 3], [2, -1]]), torch.ones(3, 2))
        >>> rows.x.shape, rows.experts.flatten().tolist()
        (torch.Size([6, 8]), [0, 1, 1, 3, 2, 4])
        >>> dispatcher.dropped
        tensor([0])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, group: ProcessGroup, num_experts: int, *, capacity_factor: float | None = None, capacity: int | None = None
    ) -> None:
        super().__init__(group, num_experts)
        check_capacity(capacity_factor, capacity)
        self.capacity = capacity
        self._factor: Fraction | None = None
        if capacity_factor is not None and capacity_factor != math.inf:
            # Not 0, and with terms that fit into the sizes of a compiled graph: 1.1 is 11 / 10.
            most = 1 << (20 if capacity_factor > 1e-3 else 40)
            self._factor = Fraction(min(capacity_factor, 1 << 20)).limit_denominator(most) or Fraction(1, 1 << 40)
        self.dropped: Tensor | None = None

    def _slots(self, choices: int) -> int:
        if self.capacity is not None:
            return self.capacity
        if self._factor is None:
            return choices
        over, under = self._factor.numerator, self._factor.denominator * self.world
        return torch.sym_min(choices, (choices * over + under - 1) // under)

    def _send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, signature: int, asked: Gradients) -> Dispatched:
        (T, K), W, device = experts_TK.shape, self.world, x_TD.device
        if T == 0 and self.capacity is not None:  # the others have tokens: a row that goes nowhere stands for this rank's
            tensors = (torch.cat((t, t.new_zeros(1, t.shape[1]))) for t in (x_TD, weights_TK))
            padded = self._send(next(tensors), torch.full((1, K), -1, device=device), next(tensors), signature, asked)
            return padded._replace(combine=lambda y_RD: padded.combine(y_RD)[:0])
        choices = T * K
        S = self._slots(choices)
        needed = self.compare(signature, S, device, asked)
        x_TD, weights_TK = joined(x_TD, needed.x), joined(weights_TK, needed.weights)
        owner_TK = self._owners(experts_TK)
        order, offsets = make_plan(owner_TK, W)
        number_TK = inverse_order(order).view(T, K) - offsets[owner_TK.clamp(max=W - 1)]
        stays_TK = owner_TK == self.rank
        fits_TK = (owner_TK < W) & ~stays_TK & (number_TK < S)
        if self.dropped is None or self.dropped.device != device:
            self.dropped = torch.zeros(1, dtype=torch.int64, device=device)
        dropped_TK = (owner_TK < W) & ~stays_TK & (number_TK >= S)
        # The operator that counts tokens knows a repetition by activation checkpointing from a forward.
        torch.ops.fusedonemoe.count_tokens_(self.dropped, torch.where(dropped_TK, 0, -1))

        N = (W - 1) * S + choices  # for every choice of this rank a row that may stay
        every = torch.arange(choices, device=device)
        slot_TK = torch.where(fits_TK, self._place(owner_TK) * S + number_TK, (W - 1) * S)
        spread = every.new_zeros((W - 1) * S + 1).scatter(0, slot_TK.reshape(-1), every)
        filled = torch.zeros_like(spread).scatter(0, slot_TK.reshape(-1), 1) != 0
        choice_N = torch.cat((spread[:-1], every))
        holds_N = torch.cat((filled[:-1], stays_TK.reshape(-1)))
        position_TK = torch.where(stays_TK, (W - 1) * S + every.view(T, K), torch.where(fits_TK, slot_TK, N))

        # Within a full block: for each row, its expert's id less the first id of that expert's rank.
        local_TK = experts_TK.to(torch.int64) % self.block
        ids_N1 = torch.where(holds_N, local_TK.reshape(-1).index_select(0, choice_N), self.block).to(torch.int32)[:, None]
        token_N = choice_N // K
        sizes = self._without_own([S] * W)
        x_ND = gather(x_TD, token_N, position_TK)
        weights_N1 = gather(weights_TK.reshape(-1, 1), choice_N, position_TK.reshape(-1, 1))
        (x, ids, weights), back = self._travel((x_ND, ids_N1, weights_N1), sizes, sizes, choices, any(needed))
        return Dispatched(x, ids, weights, lambda y_RD: gather_sum(back(y_RD), token_N, position_TK))


def check_capacity(capacity_factor: float | None, capacity: int | None) -> None:
    """At most one of the two, and it is a positive number."""
    if capacity_factor is not None and capacity is not None:
        raise ValueError(f"give capacity_factor or capacity, got both: {capacity_factor} and {capacity}")
    if capacity_factor is not None:
        check_number("capacity_factor", capacity_factor)
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor must be above 0, got {capacity_factor}")
    if capacity is not None:
        check_count("capacity", capacity)
