"""The walk through a chain: one op between two convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _distributed
from .._layout import common_rows, empty, is_dense, mask_shape, stage_dtype
from .._ops import MAX_TERMS, PIECEWISE_LINEAR
from .plan import BATCH, FIXED, Block, Conv, Norm, Plan
from .records import Slope, Stage, Use, Weights, get


class Forward:
    """One walk through the chain, collecting what backward needs.

    Attributes:
        whole: whether activations are kept.
        masks: whether one bit an element is kept in their place.
        saved: what is kept; -1 stands for x inside the chain, which follows behind.
        slopes, shortcuts: places in ``saved``, for each evaluation of F and for each block.
        moments: mean (without a bias that is left to the norm), biased variance and count of each use of a batch norm.
        spare: tensors that nobody reads after the next op, which writes over them, the last ones first.
    """

    def __init__(
        self, plan: Plan, x: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> None:
        self.plan, self.ops, self.t, self.x = plan, plan.backend.ops, tensors, plan.inside(x)
        self.weights, self.needs = Weights(tensors), needs[1:]
        recording = plan.recording and any(needs)
        fixed = all(
            norm.kind == FIXED and norm.activation in PIECEWISE_LINEAR
            for block in plan.blocks
            for norm in block.norms()
        )
        self.masks = recording and fixed and not any(self.needs)
        self.whole = recording and not self.masks
        self.saved: list[Tensor] = []
        self.slopes: list[Slope] = []
        self.shortcuts: list[Use | None] = []
        self.moments: list[Tensor | None] = []
        # A compiler plans memory itself.
        compiling = torch.compiler.is_compiling()
        self.writes_over = not self.whole and plan.backend.writes_over and not compiling
        self.spare: list[Tensor] = []
        self.shifts: dict[tuple[int, int], Tensor] = {}

    def discard(self, *tensors: Tensor | None) -> None:
        """The last use of these is the next op's. More than two would be memory that convolutions could have."""
        if self.writes_over:
            mine = [t for t in tensors if t is not None and t is not self.x]
            self.spare = [*self.spare, *mine][-2:]

    def room(self, like: Tensor, rows: bool, dtype: torch.dtype) -> Tensor:
        """Where to write a tensor of ``like``'s shape: over a spare one, or a new one."""
        for position in reversed(range(len(self.spare))):
            spare = self.spare[position]
            if spare.shape == like.shape and spare.dtype == dtype and is_dense(spare, rows):
                return self.spare.pop(position)
        return empty(like, rows, dtype)

    def keep(self, tensor: Tensor | None, wanted: bool = True) -> int | None:
        if tensor is None or not wanted:
            return None
        if tensor is self.x:
            return -1
        self.saved.append(tensor)
        return len(self.saved) - 1

    def run(self) -> Tensor:
        """The chain's output."""
        stage = Stage([self.x], [1.0])
        for block in self.plan.blocks:
            stage = self.block(block, stage)
        return self.plan.outside(self.ops.stage_combine(*stage.at_most(self.ops, MAX_TERMS)))

    def block(self, block: Block, stage: Stage) -> Stage:
        """The block's last stage from the one it starts with."""
        learned = block.coefficients is not None and self.needs[block.coefficients]
        # The last row that has a term of u_k, or of F(u_k).
        last = {(k.of_slope, k.index): i for i, row in enumerate(block.rows) for k in row}
        us: list[Tensor | None] = []
        fs: list[Tensor | None] = []
        sideways = aside = None
        biases = self.biases(block)
        for i in range(len(block.rows)):
            u, z, use1 = self.norm(block.norm1, stage, None, (False, i) in last)
            us.append(u)
            inner, use2 = self.inside(block.conv1, block.norm2, z)
            if block.shortcut is not None:
                sideways, aside = self.inside(*block.shortcut, z)
            fs.append(self.convolve(block.conv2, inner))
            self.discard(z, inner)
            del z, inner
            self.slopes.append(Slope(use1, use2, self.keep(fs[-1], learned)))
            stage = self.row(block, i, us, fs, sideways, biases[i])
            for k in range(i + 1):  # what no later row has is not kept alive
                if last.get((False, k), -1) <= i:
                    self.discard(us[k])
                    us[k] = None
                if last.get((True, k), -1) <= i:
                    self.discard(fs[k])
                    fs[k] = None
        self.shortcuts.append(aside)
        return stage

    def convolve(self, conv: Conv, z: Tensor) -> Tensor:
        """The convolution without its bias."""
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return torch.conv2d(z, self.weights.of(conv, z), None, *geometry)

    def inside(self, conv: Conv, norm: Norm, z: Tensor) -> tuple[Tensor, Use]:
        """act(norm(conv(z)))."""
        inner = self.convolve(conv, z)
        self.discard(inner)
        stage = Stage([inner], [1.0], None, get(self.t, conv.bias))
        _, z, use = self.norm(norm, stage, conv.bias, False)
        return z, use

    def row(
        self,
        block: Block,
        i: int,
        us: Sequence[Tensor | None],
        fs: Sequence[Tensor | None],
        sideways: Tensor | None,
        bias: Tensor | None,
    ) -> Stage:
        """The stage after the i-th evaluation of F."""
        row = block.rows[i]
        terms = [(fs if k.of_slope else us)[k.index] for k in row]
        numbers = [k.number for k in row]
        coefficients = self.coefficients(block, i)
        if sideways is not None:
            terms, numbers = [sideways, *terms], [1.0, *numbers]
        return Stage(terms, [] if coefficients is not None else numbers, coefficients, bias)

    def coefficients(self, block: Block, i: int) -> Tensor | None:
        """Those of the i-th row, where a tensor stands for its numbers."""
        if block.coefficients is None:
            return None
        start = block.offset(i)
        return self.t[block.coefficients][start : start + len(block.rows[i])]

    def biases(self, block: Block) -> Sequence[Tensor | None]:
        """What conv2's bias adds to each stage of the block."""
        bias = get(self.t, block.conv2.bias)
        if bias is None:
            return [None] * len(block.rows)
        totals = []
        for i, row in enumerate(block.rows):
            values = self.coefficients(block, i)
            values = [k.number for k in row] if values is None else values
            totals.append(sum(values[p] for p, k in enumerate(row) if k.of_slope))
        if block.coefficients is not None:
            return [bias * total for total in totals]
        numbers = [total for total in totals if total != 1]
        found = iter(torch._foreach_mul([bias] * len(numbers), numbers) if numbers else ())
        return [bias if total == 1 else next(found) for total in totals]

    def shifted(self, norm: Norm, shift: Tensor, place: int) -> Tensor:
        """A FIXED norm's mean less a bias; once for all stages."""
        found = self.shifts.get((norm.mean, place))
        if found is None:
            mean = self.t[norm.mean]
            found = self.shifts[norm.mean, place] = mean - shift.to(mean.dtype)
        return found

    def norm(
        self, norm: Norm, stage: Stage, bias_place: int | None, used: bool
    ) -> tuple[Tensor | None, Tensor, Use]:
        """u (where it is ``used`` or kept), z = act(norm(u)), and what backward needs.

        A lone term stands for u. Its bias, where it has one, is left to the normalization: under batch statistics it
        shifts the mean and nothing else, given statistics are shifted for it.
        """
        plan = self.plan
        lone = len(stage.terms) == 1
        if lone and used:  # it is u from now on
            self.spare = [t for t in self.spare if t is not stage.terms[0]]
        terms, numbers, coefficients, bias = stage.at_most(self.ops, MAX_TERMS)
        dtype, rows = stage_dtype(terms), common_rows(terms)
        write_u = not lone and (used or self.whole or norm.kind == BATCH)
        affine = (get(self.t, norm.weight), get(self.t, norm.bias))
        operands = (terms, numbers, coefficients, None if lone else bias)
        shift = bias if lone else None
        mask = count = None
        if norm.kind == BATCH:
            u, z, mean, variance, rstd, count = _distributed.stage_batch_norm_act(
                self.ops,
                operands,
                affine,
                norm.eps,
                norm.activation,
                plan.z_dtype,
                write_u,
                norm.process_group,
            )
            self.moments += [mean, variance, count]
        elif norm.kind == FIXED:
            mean, rstd = self.t[norm.mean], self.t[norm.rstd]
            if shift is not None:
                mean = self.shifted(norm, shift, bias_place)
            bits = self.masks and norm.activation != 0
            normalization = (mean, rstd, *affine, norm.activation)
            if self.writes_over:
                u = self.room(terms[0], rows, dtype) if write_u else None
                z = self.room(terms[0], rows, plan.z_dtype)
                if bits:
                    mask = z.new_empty(mask_shape(z.shape, rows), dtype=torch.uint8)
                self.ops.stage_norm_act.out(*operands, *normalization, u=u, z=z, mask=mask)
            else:
                u, z, mask = self.ops.stage_norm_act(
                    *operands, *normalization, plan.z_dtype, write_u, bits
                )
            mask = mask if bits else None
        else:
            operands = (terms, numbers, coefficients, bias)
            norm_options = (norm.num_groups, *affine, norm.eps, norm.activation)
            u, z, mean, rstd = self.ops.stage_group_norm_act(
                *operands, *norm_options, plan.z_dtype, write_u
            )
        own = self.whole and norm.kind != FIXED
        use = Use(
            shape=terms[0].shape,
            dtype=dtype,
            rows=rows,
            operand=self.keep(terms[0] if lone else u, self.whole),
            mask=self.keep(mask),
            mean=self.keep(mean, own or (self.whole and shift is not None)),
            rstd=self.keep(rstd, own),
            count=self.keep(count, own),
            bias=bias_place,
            z=self.keep(z, self.whole and not plan.recompute),
        )
        return (terms[0] if lone else u), z, use
