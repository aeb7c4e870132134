"""What runs between the entry and the end of a pass: fused ops, convolutions and their layouts, everything else."""

import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssp_fused._layout import is_rows

CONVOLUTIONS = {"aten::convolution", "aten::convolution_backward"}


class Schedule(TorchDispatchMode):
    """Counts the fused ops and the convolutions, and notes every other op that reads or writes an activation.

    Views and uninitialized memory are free.
    """

    def __init__(self, smallest):
        super().__init__()
        self.smallest, self.count, self.others = smallest, collections.Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name.startswith("ssp_fused::") or name in CONVOLUTIONS:
            self.count[name.split("::")[1]] += 1
        elif not (func.is_view or name.startswith(("aten::empty", "aten::new_empty"))):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            if any(t.numel() >= self.smallest for t in tensors):
                self.others.append(name)
        return out


class Layouts(TorchDispatchMode):
    """Notes whether convolutions write rows (channels last), and whether the gradients of what they write are rows."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name in CONVOLUTIONS:
            self.seen.add(is_rows(out if name == "aten::convolution" else args[0]))
        return out
