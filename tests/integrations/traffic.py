"""What a process sends, and how often it waits for its device."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Bytes and rows that leave this process, as the collective itself is told."""

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.rank, self.width = rank, width  # a row of x has this many numbers
        self.bytes = self.rows = self.own = 0
        self.dtypes: set[torch.dtype] = set()
        self.widths: dict[torch.dtype, set[int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            tensor, _, sizes, _ = args
            row_bytes = tensor[:1].nbytes if tensor.shape[0] else tensor.new_empty(1, *tensor.shape[1:]).nbytes
            assert sum(sizes) == tensor.shape[0]
            if tensor.dtype != torch.int64:  # the counts
                self.own += sizes[self.rank]
                self.bytes += sum(sizes) * row_bytes
                if tensor.shape[1] == self.width:
                    self.rows += sum(sizes)
                self.dtypes.add(tensor.dtype)
                self.widths.setdefault(tensor.dtype, set()).add(tensor.shape[1])
        return function(*args, **(kwargs or {}))


class Reads:
    """Counts how often a tensor's values come to the host."""

    WAYS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu")

    def __enter__(self):
        self.count, self.originals = 0, {way: getattr(Tensor, way) for way in self.WAYS}

        def counting(original):
            def read(*args, **kwargs):
                self.count += 1
                return original(*args, **kwargs)

            return read

        for way, original in self.originals.items():
            setattr(Tensor, way, counting(original))
        return self

    def __exit__(self, *_):
        for way, original in self.originals.items():
            setattr(Tensor, way, original)
