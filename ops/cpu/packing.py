"""Expert weights packed for inference: a second copy in the order in which the CPU kernels read, which knows its originals."""

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusedonemoe.ops.activation import Activation
from fusedonemoe.ops.cpu import native

_living: "weakref.WeakValueDictionary[int, PackedExperts]" = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Expert weights as the CPU kernels like to read them, beside the weights they were made from.

    Attributes:
        up: panels of ``gate_up_proj``.
        down: panels of ``down_proj``.
        layout: the ``gate_up_layout`` that was packed, or ``plain``.
        sources: the weights, sharing their memory and their count of changes.
        versions: how often each had been changed in place when it was packed.
    """

    up: Tensor
    down: Tensor
    layout: str
    sources: tuple[Tensor, Tensor]
    versions: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes held beside the weights."""
        return self.up.nbytes + self.down.nbytes

    def is_of(self, *weights: Tensor) -> bool:
        """Whether these are the very weights that were packed, unchanged since."""
        return all(
            (w.data_ptr(), w.shape, w.dtype) == (source.data_ptr(), source.shape, source.dtype) and source._version == version
            for w, source, version in zip(weights, self.sources, self.versions, strict=True)
        )


def pack(up_EGD: Tensor, down_EDF: Tensor, act: Activation) -> PackedExperts:
    """Pack contiguous weights of a dtype that the kernels have."""
    sources = (up_EGD.detach(), down_EDF.detach())
    packed = PackedExperts(*native.pack_mlp(*sources, act), act.layout, sources, (sources[0]._version, sources[1]._version))
    _living[packed.up.data_ptr()] = packed
    return packed


def experts_mlp_packed(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    packed_up: Tensor,
    packed_down: Tensor,
    *act: Any,
) -> Tensor:
    """The output of the MLP from packed weights, after a look whether they are still those of the weights."""
    packed = _living.get(packed_up.data_ptr())
    if packed is None or not packed.is_of(up_EGD, down_EDF):
        raise RuntimeError("the expert weights were changed or replaced after they were packed: pack them again, or unpack")
    tensors = (x_TD, experts_TK, weights_TK, up_EGD, down_EDF, up_bias_EG, down_bias_ED)
    return native.experts_mlp_output(*tensors, Activation(*act), (packed_up, packed_down))
