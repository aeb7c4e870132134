"""The autograd Functions: what each saves, and its backward in terms of the ops.

Forward and backward run the same backend. Where a gradient is itself to be differentiated (``create_graph=True``),
backward is computed by the reference's formulas instead, which autograd records; saved inputs and outputs carry
their history, so nothing else is needed. No buffer is touched there.
"""

from .batch_norm import StageBatchNormAct
from .fixed_norm import StageFixedNormAct, fixed_statistics
from .group_norm import StageGroupNormAct
from .stage import Norm, Stage, StageCombine

__all__ = [
    "Norm",
    "Stage",
    "StageBatchNormAct",
    "StageCombine",
    "StageFixedNormAct",
    "StageGroupNormAct",
    "fixed_statistics",
]
