"""A chain of blocks as one autograd node: the schedule of its forward and backward over the ops.

Forward, for each evaluation of F: a stage u and z = act(norm1(u)) from one op, conv1, act(norm2) from one op, conv2.
A block's last stage is combined by the next block's first op. Kept for backward are u and conv1's output, or one bit an
element where the chain is frozen. Backward, from the last stage to the first, with G_i = dL/du_i:

    G_k = sum_{i>k} alpha_ik G_i + dF(u_k)^T ( sum_{i>k} beta_ik h G_i )

Convolutions are linear: where one stage alone uses F(u_k), beta h is a factor in the next op and in the weight's
gradient; where several do, the sum is one ``stage_combine``. The alpha terms are added by the op that ends dF's
transpose. z is computed again by the reduction over dz, after a convolution's input gradient, before its weight's.

conv2's bias enters u_i as (sum_k beta_ik h) b; with S_i the sum of G_i over all but the channels, its gradient is
sum_i (sum_k beta_ik h) S_i, and S_k = sum_i alpha_ik S_i + norm1's own part: nothing under batch statistics.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import _autocast, _distributed, reference
from ._backends import Backend
from ._layout import common_rows, dense_strides, stage_dtype
from ._ops import ACTIVATIONS, MAX_TERMS
from ._plan import BATCH, FIXED, Block, Builder, Conv, Norm, Plan

_PIECEWISE_LINEAR = tuple(ACTIVATIONS.index(name) for name in ("identity", "relu", "leaky_relu"))


def run(builder: Builder, backend: Backend, x: Tensor, *, recompute: bool = True) -> Tensor:
    """The blocks that were added to ``builder``, applied to x; running statistics move.

    Args:
        builder: holds one block or more.
        backend: whose ops run, forward and backward.
        x: ``[N, C, H, W]``.
        recompute: whether backward computes the convolutions' inputs again, or they are kept.
    """
    plan = Plan(
        backend,
        tuple(builder.blocks),
        _autocast.convolution_dtype([x]),
        torch.is_grad_enabled(),
        recompute,
    )
    with _autocast.disabled(x):
        y, *moments = Chain.apply(plan, x, *builder.tensors)
        _update_running_statistics(backend.ops, builder, moments)
    return y


def _update_running_statistics(
    ops: Any, builder: Builder, moments: Sequence[Tensor | None]
) -> None:
    """Each norm's uses in their order, as many at once as saw equally many values."""
    uses = list(zip(builder.updates, moments[::3], moments[1::3], moments[2::3], strict=True))
    for norm in dict.fromkeys(update.norm for update, *_ in uses):
        if not (norm.training and norm.track_running_stats):
            continue
        own = [use for use in uses if use[0].norm is norm]
        for _, group in itertools.groupby(own, key=lambda use: (use[0].rows, use[3] is None)):
            group = list(group)
            ops.update_running_stats_(
                norm.running_mean,
                norm.running_var,
                norm.num_batches_tracked,
                torch.stack([use[1] for use in group for _ in range(use[0].times)]),
                torch.stack([use[2] for use in group for _ in range(use[0].times)]),
                float(group[0][0].rows),
                group[0][3],
                norm.momentum,
            )


class Stage(NamedTuple):
    """sum_k c_k t_k + bias, not computed yet; ``coefficients``, where given, stands for the numbers."""

    terms: list[Tensor]
    numbers: list[float]
    coefficients: Tensor | None = None
    bias: Tensor | None = None

    def at_most(self, ops: Any, limit: int) -> Stage:
        """The same, its leading terms summed up where there are more than an op takes."""
        terms, numbers, coefficients, bias = self
        while len(terms) > limit:
            partial = ops.stage_combine(terms[:limit], numbers[:limit], None, None)
            terms, numbers = [partial, *terms[limit:]], [1.0, *numbers[limit:]]
        return Stage(terms, numbers, coefficients, bias)


class Use(NamedTuple):
    """What backward needs of one application of a norm: mostly places in the list of saved tensors.

    Attributes:
        shape, dtype, rows: of u (``rows``: its layout; a compiler does not tell that of a gradient).
        operand: u, or the lone term that stands for it.
        mask: the activation's bits.
        mean, rstd, count: the statistics, where they are not the norm's own fixed ones.
        bias: place in the plan's list of tensors of a bias that the operand lacks.
        z: the result, where it is not computed again.
    """

    shape: torch.Size
    dtype: torch.dtype
    rows: bool
    operand: int | None
    mask: int | None
    mean: int | None
    rstd: int | None
    count: int | None
    bias: int | None
    z: int | None


class Slope(NamedTuple):
    """What backward needs of one evaluation of F; ``value`` is F itself, kept where coefficients are learned."""

    norm1: Use
    norm2: Use
    value: int | None


class Chain(Function):
    """The blocks of a plan, one after another."""

    @staticmethod
    def forward(ctx, plan, x, *tensors):
        """The chain's output; then mean, biased variance and count of each use of a batch norm, in order."""
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        run = _Forward(plan, x, tensors, ctx.needs_input_grad[1:])
        y = run.chain(x)
        ctx.masks, ctx.slopes, ctx.shortcuts = run.masks, run.slopes, run.shortcuts
        ctx.save_for_backward(*tensors, *run.saved, x if run.whole else None)
        ctx.mark_non_differentiable(*(m for m in run.moments if m is not None))
        return y, *run.moments

    @staticmethod
    def backward(ctx, dy, *_):
        """Gradients of x and of the tensors, where they are wanted."""
        needs = ctx.needs_input_grad[1:]
        if dy is None:
            return None, *[None] * len(needs)
        tensors, saved = ctx.saved_tensors[: len(needs) - 1], ctx.saved_tensors[len(needs) - 1 :]
        if torch.is_grad_enabled() and not ctx.masks:
            return None, *_differentiable(ctx.plan, saved[-1], tensors, dy, needs)
        run = _Backward(ctx.plan, tensors, saved, needs)
        dx = run.chain(dy, ctx.slopes, ctx.shortcuts)
        return None, dx, *run.gradients


def _get(tensors: Sequence[Tensor], place: int | None) -> Tensor | None:
    return None if place is None else tensors[place]


class _Forward:
    """One walk through the chain, collecting what backward needs.

    Attributes:
        whole: whether activations are kept.
        masks: whether one bit an element is kept in their place.
        saved: what is kept; -1 stands for x, which follows behind.
        slopes, shortcuts: places in ``saved``, for each evaluation of F and for each block.
        moments: mean, biased variance and count of each use of a batch norm.
    """

    def __init__(
        self, plan: Plan, x: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> None:
        self.plan, self.ops, self.t, self.x = plan, plan.backend.ops, tensors, x
        self.needs = needs[1:]
        recording = plan.recording and any(needs)
        fixed = all(
            norm.kind == FIXED and norm.activation in _PIECEWISE_LINEAR
            for block in plan.blocks
            for norm in block.norms()
        )
        self.masks = recording and fixed and not any(self.needs)
        self.whole = recording and not self.masks
        self.saved: list[Tensor] = []
        self.slopes: list[Slope] = []
        self.shortcuts: list[Use | None] = []
        self.moments: list[Tensor | None] = []

    def keep(self, tensor: Tensor | None, wanted: bool = True) -> int | None:
        if tensor is None or not wanted:
            return None
        if tensor is self.x:
            return -1
        self.saved.append(tensor)
        return len(self.saved) - 1

    def chain(self, x: Tensor) -> Tensor:
        stage = Stage([x], [1.0])
        for block in self.plan.blocks:
            stage = self.block(block, stage)
        return self.ops.stage_combine(*stage.at_most(self.ops, MAX_TERMS))

    def block(self, block: Block, stage: Stage) -> Stage:
        """The block's last stage from the one it starts with."""
        learned = block.coefficients is not None and self.needs[block.coefficients]
        us: list[Tensor | None] = []
        fs: list[Tensor] = []
        sideways = aside = None
        for i in range(len(block.rows)):
            used = any(k.index == i and not k.of_slope for row in block.rows for k in row)
            u, z, use1 = self.norm(block.norm1, stage, None, used)
            us.append(u)
            inner, use2 = self.inside(block.conv1, block.norm2, z)
            if block.shortcut is not None:
                sideways, aside = self.inside(*block.shortcut, z)
            fs.append(self.convolve(block.conv2, inner))
            del z, inner
            self.slopes.append(Slope(use1, use2, self.keep(fs[-1], learned)))
            stage = self.row(block, i, us, fs, sideways)
        self.shortcuts.append(aside)
        return stage

    def convolve(self, conv: Conv, z: Tensor) -> Tensor:
        """The convolution without its bias."""
        weight = self.t[conv.weight].to(z.dtype)
        return torch.conv2d(z, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    def inside(self, conv: Conv, norm: Norm, z: Tensor) -> tuple[Tensor, Use]:
        """act(norm(conv(z)))."""
        stage = Stage([self.convolve(conv, z)], [1.0], None, _get(self.t, conv.bias))
        _, z, use = self.norm(norm, stage, conv.bias, False)
        return z, use

    def row(
        self,
        block: Block,
        i: int,
        us: Sequence[Tensor | None],
        fs: Sequence[Tensor],
        sideways: Tensor | None,
    ) -> Stage:
        """The stage after the i-th evaluation of F."""
        row, bias = block.rows[i], _get(self.t, block.conv2.bias)
        terms = [(fs if k.of_slope else us)[k.index] for k in row]
        numbers = [k.number for k in row]
        coefficients = None
        if block.coefficients is not None:
            start = block.offset(i)
            coefficients = self.t[block.coefficients][start : start + len(row)]
        if bias is not None:
            values = numbers if coefficients is None else coefficients
            total = sum(values[p] for p, k in enumerate(row) if k.of_slope)
            if isinstance(total, Tensor) or total != 1:
                bias = bias * total
        if sideways is not None:
            terms, numbers = [sideways, *terms], [1.0, *numbers]
        return Stage(terms, [] if coefficients is not None else numbers, coefficients, bias)

    def norm(
        self, norm: Norm, stage: Stage, bias_place: int | None, used: bool
    ) -> tuple[Tensor | None, Tensor, Use]:
        """u (where it is ``used`` or kept), z = act(norm(u)), and what backward needs.

        A lone term stands for u. Its bias, where it has one, is left to the normalization: under batch statistics it
        shifts the mean and nothing else, given statistics are shifted for it.
        """
        plan = self.plan
        lone = len(stage.terms) == 1
        terms, numbers, coefficients, bias = stage.at_most(self.ops, MAX_TERMS)
        write_u = not lone and (used or self.whole or norm.kind == BATCH)
        affine = (_get(self.t, norm.weight), _get(self.t, norm.bias))
        operands = (terms, numbers, coefficients, None if lone else bias)
        shift = bias if lone else None
        mask = count = None
        if norm.kind == BATCH:
            u, z, mean, variance, rstd, count = self.batch(norm, operands, affine, write_u)
            shifted = mean if shift is None else mean + shift.to(mean.dtype)
            self.moments += [shifted, variance, count]
        elif norm.kind == FIXED:
            mean, rstd = self.t[norm.mean], self.t[norm.rstd]
            if shift is not None:
                mean = mean - shift.to(mean.dtype)
            bits = self.masks and norm.activation != 0
            u, z, mask = self.ops.stage_norm_act(
                *operands, mean, rstd, *affine, norm.activation, plan.z_dtype, write_u, bits
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
            dtype=stage_dtype(terms),
            rows=common_rows(terms),
            operand=self.keep(terms[0] if lone else u, self.whole),
            mask=self.keep(mask),
            mean=self.keep(mean, own or (self.whole and shift is not None)),
            rstd=self.keep(rstd, own),
            count=self.keep(count, own),
            bias=bias_place,
            z=self.keep(z, self.whole and not plan.recompute),
        )
        return (terms[0] if lone else u), z, use

    def batch(
        self, norm: Norm, operands: tuple, affine: tuple, write_u: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """u, z, mean, biased variance, rstd; over several processes, also the count of values a channel."""
        z_dtype = self.plan.z_dtype
        if norm.process_group is None:
            results = self.ops.stage_batch_norm_act(
                *operands, *affine, norm.eps, norm.activation, z_dtype, write_u
            )
            return *results, None
        u, mean, variance = self.ops.stage_moments(*operands, write_u)
        rows = operands[0][0].numel() // operands[0][0].shape[1]
        mean, variance, count = _distributed.merge_moments(mean, variance, rows, norm.process_group)
        rstd = (variance + norm.eps).rsqrt()
        if write_u:
            operands = ([u], [1.0], None, None)
        _, z, _ = self.ops.stage_norm_act(
            *operands, mean, rstd, *affine, norm.activation, z_dtype, False, False
        )
        return u, z, mean, variance, rstd, count


def _uses(block: Block, i: int, of_slope: bool) -> list[tuple[int, int]]:
    """Where u_i, or F(u_i), enters: (j, position in the row that gives u_j)."""
    return [
        (j, position)
        for j, row in enumerate(block.rows, start=1)
        for position, k in enumerate(row)
        if k.index == i and k.of_slope == of_slope
    ]


class _Backward:
    """The walk back, adding up the tensors' gradients on its way.

    Where the gradient's own graph is being recorded (on a frozen chain), the ops are the reference's.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> None:
        self.plan, self.t, self.saved = plan, tensors, saved
        self.ops = reference if torch.is_grad_enabled() else plan.backend.ops
        self.needs_x, self.needs = needs[0], needs[1:]
        self.gradients: list[Tensor | None] = [None] * len(tensors)
        self.with_sums = any(self.wants(b.conv2.bias, b.coefficients) for b in plan.blocks)

    def wants(self, *places: int | None) -> bool:
        return any(place is not None and self.needs[place] for place in places)

    def add(self, place: int | None, gradient: Tensor | None, factor: float | Tensor = 1.0) -> None:
        """``factor`` times a gradient, to that of a tensor."""
        if gradient is None or not self.wants(place):
            return
        gradient = gradient.to(self.t[place].dtype)
        if isinstance(factor, Tensor):
            gradient, factor = gradient * factor.to(gradient.dtype), 1.0
        total = self.gradients[place]
        if total is not None:
            gradient = torch.add(total, gradient, alpha=factor)
        elif factor != 1:
            gradient = gradient * factor
        self.gradients[place] = gradient

    def chain(
        self, dy: Tensor, slopes: Sequence[Slope], shortcuts: Sequence[Use | None]
    ) -> Tensor | None:
        """The gradient of x, where it is wanted."""
        blocks = self.plan.blocks
        upstream = [self.needs_x]
        for block in blocks:
            upstream.append(upstream[-1] or self.wants(*block.tensors()))
        sums = self.ops.channel_sum(dy) if self.with_sums else None
        g, end = dy, len(slopes)
        for position in reversed(range(len(blocks))):
            block, start = blocks[position], end - len(blocks[position].rows)
            if not upstream[position + 1]:
                break
            g, sums = self.block(
                block, g, sums, slopes[start:end], shortcuts[position], upstream[position]
            )
            end = start
        return g if self.needs_x else None

    def block(
        self,
        block: Block,
        g: Tensor,
        last_sums: Tensor | None,
        slopes: Sequence[Slope],
        aside: Use | None,
        upstream: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """G_0 and S_0 of a block, from G_s and S_s."""
        stages = len(block.rows)
        gs, sums = {stages: g}, {stages: last_sums}
        inside = self.wants(*block.tensors())
        for i in reversed(range(stages)):
            if self.wants(block.coefficients):
                self.learn(block, i, gs[i + 1], sums[i + 1], slopes)
            wanted = upstream or (inside and i > 0)
            du, own = self.evaluation(block, i, gs, slopes[i], aside, wanted)
            if du is not None:
                gs[i] = du
            if last_sums is not None:
                sums[i] = self.sums(block, i, sums, own, slopes[i].norm1)
            for j in list(gs):  # an earlier stage may have no more use for it
                if j > i and not any(k.index < i for k in block.rows[j - 1]):
                    del gs[j]
        if self.wants(block.conv2.bias):
            for j, row in enumerate(block.rows, start=1):
                for p, k in enumerate(row):
                    if k.of_slope:
                        self.add(block.conv2.bias, sums[j], self.coefficient(block, j, p))
        return gs.get(0), sums.get(0)

    def coefficient(self, block: Block, j: int, position: int) -> float | Tensor:
        """The coefficient of a term of the row that gives u_j."""
        if block.coefficients is None:
            return block.rows[j - 1][position].number
        return self.t[block.coefficients][block.offset(j - 1) + position]

    def later(self, block: Block, uses: Sequence[tuple[int, int]], gs: dict[int, Tensor]) -> Stage:
        """The sum of the later stages' gradients over these uses."""
        terms = [gs[j] for j, _ in uses]
        coefficients = [self.coefficient(block, j, p) for j, p in uses]
        if block.coefficients is None or not uses:
            return Stage(terms, coefficients).at_most(self.ops, MAX_TERMS)
        return Stage(terms, [], torch.stack(coefficients))

    def learn(
        self, block: Block, row: int, g: Tensor, sums: Tensor, slopes: Sequence[Slope]
    ) -> None:
        """The gradients of a row's coefficients, <G, F(u_k)>, with the bias of F."""
        terms = block.rows[row]
        values = [self.saved[slopes[k.index].value] for k in terms if k.of_slope]
        dots = self.ops.stage_dots(g, values)
        bias = _get(self.t, block.conv2.bias)
        if bias is not None:
            dots = dots + (sums * bias.to(sums.dtype)).sum()
        found = iter(dots.unbind())
        zero = dots.new_zeros(())
        gradient = [
            next(found) if j == row and k.of_slope else zero
            for j in range(len(block.rows))
            for k in block.rows[j]
        ]
        self.add(block.coefficients, torch.stack(gradient))

    def sums(
        self,
        block: Block,
        i: int,
        sums: dict[int, Tensor | None],
        own: Tensor | None,
        use: Use,
    ) -> Tensor:
        """S_i = sum_j alpha_ji S_j + norm1's own part."""
        total = own
        for j, p in _uses(block, i, of_slope=False):
            part = sums[j] * self.coefficient(block, j, p)
            total = part if total is None else total + part
        return sums[len(block.rows)].new_zeros(use.shape[1]) if total is None else total

    def evaluation(
        self,
        block: Block,
        i: int,
        gs: dict[int, Tensor],
        slope: Slope,
        aside: Use | None,
        wanted: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """G_i, where it is wanted, and norm1's own part of S_i."""
        extras = self.later(block, _uses(block, i, of_slope=False), gs)
        above = self.later(block, _uses(block, i, of_slope=True), gs)
        if not above.terms:
            return (self.ops.stage_combine(*extras) if wanted else None), None
        if len(above.terms) > 1:
            above = Stage([self.ops.stage_combine(*above)], [1.0])
        g = above.terms[0].to(self.plan.z_dtype)
        factor = above.numbers[0] if above.coefficients is None else above.coefficients

        below = wanted or self.wants(block.conv1.weight, block.norm1.weight, block.norm1.bias)
        if block.shortcut is not None:
            below = below or self.wants(block.shortcut[0].weight)
        dc = self.through(block.conv2, block.norm2, slope.norm2, g, factor, below, block.conv1.bias)
        if block.shortcut is None:
            if not below:
                return None, None
            dz = self.input_gradient(block.conv1, dc, slope.norm1)
            du, own, z = self.norm(
                block.norm1, slope.norm1, dz, 1.0, extras, wanted, self.wants(block.conv1.weight)
            )
            self.add(block.conv1.weight, self.weight_gradient(block.conv1, dc, z))
            return du, own
        return self.fork(block, slope.norm1, aside, g, dc, below, wanted)

    def fork(
        self,
        block: Block,
        use: Use,
        aside: Use,
        g: Tensor,
        dc: Tensor | None,
        below: bool,
        wanted: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The rest of ``evaluation`` where act(norm1(x)) goes into conv1 and into a shortcut."""
        conv, norm = block.shortcut
        dq, own, _ = self.norm(norm, aside, g, 1.0, Stage([], []), below, False)
        self.add_bias(conv.bias, own)
        if not below:
            return None, None
        dz = self.ops.stage_combine(
            [self.input_gradient(block.conv1, dc, use), self.input_gradient(conv, dq, use)],
            [1.0, 1.0],
            None,
            None,
        )
        learns = self.wants(block.conv1.weight, conv.weight)
        du, own, z = self.norm(block.norm1, use, dz, 1.0, Stage([], []), wanted, learns)
        self.add(block.conv1.weight, self.weight_gradient(block.conv1, dc, z))
        self.add(conv.weight, self.weight_gradient(conv, dq, z))
        return du, own

    def through(
        self,
        conv: Conv,
        norm: Norm,
        use: Use,
        g: Tensor,
        factor: float | Tensor,
        below: bool,
        inner_bias: int | None,
    ) -> Tensor | None:
        """From a convolution's output to the input of the norm before it; ``factor`` belongs to g."""
        learns = self.wants(conv.weight)
        dz = self.input_gradient(conv, g, use)
        du, own, z = self.norm(norm, use, dz, factor, Stage([], []), below, learns)
        self.add_bias(inner_bias, own)
        self.add(conv.weight, self.weight_gradient(conv, g, z), factor)
        return du

    def add_bias(self, place: int | None, own: Tensor | None) -> None:
        """The gradient of a bias that only a norm sees: exactly zero under batch statistics."""
        if self.wants(place):
            self.add(place, torch.zeros_like(self.t[place]) if own is None else own)

    def input_gradient(self, conv: Conv, g: Tensor, use: Use) -> Tensor:
        """Of a convolution whose input has the shape of ``use``."""
        strides = dense_strides(use.shape, use.rows)
        like = torch.empty_strided(use.shape, strides, dtype=g.dtype, device=g.device)
        return self.transpose(conv, g, like, (True, False, False))[0]

    def weight_gradient(self, conv: Conv, g: Tensor, z: Tensor | None) -> Tensor | None:
        """Of a convolution with input z, where it is wanted."""
        if z is None or not self.wants(conv.weight):
            return None
        return self.transpose(conv, g, z, (False, True, False))[1]

    def transpose(
        self, conv: Conv, g: Tensor, z: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        weight = self.t[conv.weight].to(g.dtype)
        geometry = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
        return torch.ops.aten.convolution_backward(g, z, weight, None, *geometry, mask)

    def norm(
        self,
        norm: Norm,
        use: Use,
        dz: Tensor,
        factor: float | Tensor,
        extras: Stage,
        wanted: bool,
        learns: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """du with the extras added (where wanted), its own sum over all but the channels, and z (for ``learns``).

        The own sum is None under batch statistics, where it is zero, and where no bias asks for it.
        """
        scale = (1.0, factor) if isinstance(factor, Tensor) else (factor, None)
        write_z = learns and use.z is None
        added = (extras.terms, extras.numbers, extras.coefficients)
        affine = (_get(self.t, norm.weight), _get(self.t, norm.bias))
        u = _get(self.saved, use.operand)
        kept = _get(self.saved, use.z)
        if norm.kind == BATCH:
            moments = (self.saved[use.mean], self.saved[use.rstd])
            operands = (u, *moments, *affine, norm.activation)
            du, z = self.batch(norm, use, (dz, *scale), operands, added, wanted, write_z)
            own = None
        elif norm.kind == FIXED:
            mean = _get(self.saved, use.mean)
            mean = self.t[norm.mean] if mean is None else mean
            operands = (mean, self.t[norm.rstd], *affine, norm.activation)
            du, own, z = self.fixed(norm, use, (dz, *scale), operands, added, wanted, write_z)
        else:
            du, d_gamma, d_beta, own, z = self.ops.group_norm_act_backward(
                dz,
                *scale,
                u,
                _get(self.t, use.bias),
                self.saved[use.mean],
                self.saved[use.rstd],
                *affine,
                norm.activation,
                *added,
                write_z,
            )
            self.add(norm.weight, d_gamma)
            self.add(norm.bias, d_beta)
        return du, own, (kept if kept is not None else z if learns else None)

    def batch(
        self,
        norm: Norm,
        use: Use,
        dz: tuple,
        operands: tuple,
        added: tuple,
        wanted: bool,
        write_z: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """du and z under batch statistics."""
        alone = norm.process_group is None
        du = None
        if alone and wanted:
            du, dy, dy_xhat, z = self.ops.batch_norm_act_backward(*dz, *operands, *added, write_z)
        else:
            dy, dy_xhat, z = self.ops.norm_act_backward_reduce(*dz, *operands, write_z)
        self.add(norm.weight, dy_xhat)
        self.add(norm.bias, dy)
        if wanted and not alone:
            totals = _distributed.all_reduce_sums(dy, dy_xhat, norm.process_group)
            u, *rest = operands
            count = self.saved[use.count]
            du = self.ops.norm_act_backward(*dz, u, None, *rest, *totals, 1.0, count, *added, None)
        return du, z

    def fixed(
        self,
        norm: Norm,
        use: Use,
        dz: tuple,
        operands: tuple,
        added: tuple,
        wanted: bool,
        write_z: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """du, its own sum and z under given statistics."""
        u, mask = _get(self.saved, use.operand), _get(self.saved, use.mask)
        du = own = z = None
        if write_z or self.with_sums or self.wants(norm.weight, norm.bias, use.bias):
            dy, dy_xhat, z = self.ops.norm_act_backward_reduce(*dz, u, *operands, write_z)
            self.add(norm.weight, dy_xhat)
            self.add(norm.bias, dy)
            own = dy * self.t[norm.rstd]
            if norm.weight is not None:
                own = own * self.t[norm.weight].to(own.dtype)
        if wanted:
            mean, *rest = operands
            du = self.ops.norm_act_backward(
                *dz,
                u,
                mask,
                None if u is None else mean,
                *rest,
                None,
                None,
                1.0,
                None,
                *added,
                use.dtype,
            )
        return du, own, z


def _differentiable(
    plan: Plan, x: Tensor, t: Sequence[Tensor], dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: autograd's own, through the chain in plain PyTorch."""
    if any(norm.process_group is not None for block in plan.blocks for norm in block.norms()):
        raise RuntimeError(
            "create_graph=True is not supported for batch statistics synchronized over processes"
        )
    # Aliases: what is differentiated by is then this call's own, and not a tensor that others lead to as well.
    inputs = [value.view_as(value) for value in (x, *t)]
    y = inputs[0]
    for block in plan.blocks:
        y = _plain_block(plan, block, y, inputs[1:])
    wanted = [value for value, want in zip(inputs, needs, strict=True) if want]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, materialize_grads=True))
    return [next(found) if want else None for want in needs]


def _plain_block(plan: Plan, block: Block, x: Tensor, t: Sequence[Tensor]) -> Tensor:
    """The block in plain PyTorch, with the statistics of the batch or those that were given."""

    def act(norm: Norm, u: Tensor) -> Tensor:
        affine = (_get(t, norm.weight), _get(t, norm.bias))
        if norm.kind == BATCH:
            y = F.batch_norm(u, None, None, *affine, True, 0.0, norm.eps)
        elif norm.kind == FIXED:
            mean, rstd = (v[:, None, None].to(u.dtype) for v in (t[norm.mean], t[norm.rstd]))
            y = (u - mean) * rstd
            for vector, op in zip(affine, (torch.mul, torch.add), strict=True):
                y = y if vector is None else op(y, vector[:, None, None])
        else:
            y = F.group_norm(u, norm.num_groups, *affine, norm.eps)
        return reference.torch_activation(y, norm.activation)

    def convolve(conv: Conv, z: Tensor) -> Tensor:
        weight, bias = t[conv.weight].to(plan.z_dtype), _get(t, conv.bias)
        bias = None if bias is None else bias.to(plan.z_dtype)
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return torch.conv2d(z.to(plan.z_dtype), weight, bias, *geometry)

    us, fs = [x], []
    for i, row in enumerate(block.rows):
        z = act(block.norm1, us[-1])
        fs.append(convolve(block.conv2, act(block.norm2, convolve(block.conv1, z))))
        numbers = [k.number for k in row]
        if block.coefficients is not None:
            start = block.offset(i)
            numbers = t[block.coefficients][start : start + len(row)]
        u = sum(c * (fs if k.of_slope else us)[k.index] for c, k in zip(numbers, row, strict=True))
        if block.shortcut is not None:
            conv, norm = block.shortcut
            u = u + act(norm, convolve(conv, z))
        us.append(u)
    return us[-1]
