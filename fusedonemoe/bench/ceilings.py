"""The best matrix-product rate and read bandwidth of this machine, sampled between the timed calls.

Both are the best that torch itself reaches, so torch code can be compared with a floor computed from them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fusedonemoe.bench.timing import Timer

GEMM_SIZES = (512, 1024, 2048)
# Far beyond any cache, so that a sum over it streams from memory.
STREAM_BYTES = 1 << 29


def _products(a: Tensor, b: Tensor) -> list[Callable[[], object]]:
    """Return torch's ways to multiply matrices. torch.mm takes MKL in float32: on AMD machines half of oneDNN's rate."""
    ways: list[Callable[[], object]] = [partial(torch.mm, a, b)]
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # The weight as it is, and reordered once into oneDNN's blocks, as for inference.
        weights = (b, torch.ops.mkldnn._reorder_linear_weight(b, a.shape[0]))
        ways += [partial(torch.ops.mkldnn._linear_pointwise, a, weight, None, "none", [], "") for weight in weights]
    return ways


@dataclass
class Ceilings:
    """The best samples of a run so far, of all cells: other guests of a host, or another memory node, halve a sample."""

    flops_per_s: dict[torch.dtype, float] = field(default_factory=dict)  # matrix-product rate by dtype
    bytes_per_s: float = 0.0  # read bandwidth

    def take(self, other: "Ceilings") -> None:
        """Keep the better of these samples and another's."""
        self.bytes_per_s = max(self.bytes_per_s, other.bytes_per_s)
        for dtype, rate in other.flops_per_s.items():
            self.flops_per_s[dtype] = max(self.flops_per_s.get(dtype, 0.0), rate)

    def sampler(self, dtype: torch.dtype) -> Callable[[], None]:
        """Return a function that measures once more and keeps the best."""
        stream, timer = torch.ones(STREAM_BYTES // 4, device="cpu"), Timer()

        def sample() -> None:
            found = Ceilings(bytes_per_s=STREAM_BYTES / min(timer.seconds([stream.sum] * 2)))
            for n in GEMM_SIZES:
                a, b = (torch.ones(n, n, dtype=dtype, device="cpu") for _ in range(2))
                found.flops_per_s[dtype] = 2 * n**3 / min(timer.seconds(_products(a, b)))
                self.take(found)

        return sample
