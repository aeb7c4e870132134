"""The walk back through a chain, from the last stage to the first.

G_k = sum_{i>k} alpha_ik G_i + dF(u_k)^T ( sum_{i>k} beta_ik h G_i ),    G_i = dL/du_i
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _distributed, reference
from .._layout import dense, dense_strides, empty, is_dense
from .._ops import MAX_TERMS
from .gradients import Gradients
from .plan import BATCH, FIXED, Block, Conv, Norm, Plan
from .records import Slope, Stage, Use, Weights, cast, get


def _uses(block: Block, i: int, of_slope: bool) -> list[tuple[int, int]]:
    """Where u_i, or F(u_i), enters: (j, position in the row that gives u_j)."""
    return [
        (j, position)
        for j, row in enumerate(block.rows, start=1)
        for position, k in enumerate(row)
        if k.index == i and k.of_slope == of_slope
    ]


class Backward:
    """The walk back, by the backend's ops.

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
        self.weights = Weights(tensors)
        self.ops = reference if torch.is_grad_enabled() else plan.backend.ops
        # A compiler plans memory itself.
        compiling = torch.compiler.is_compiling()
        self.writes_over = self.ops is not reference and plan.backend.writes_over and not compiling
        self.needs_x = needs[0]
        self.gradients = Gradients(tensors, needs[1:])
        self.z: Tensor | None = None  # that was written last, if it is to be written over
        self.with_sums = any(
            self.gradients.wants(b.conv2.bias, b.coefficients) for b in plan.blocks
        )
        # S at the chain's end; a number n among the S_i stands for n times it.
        self.end: Tensor | None = None

    def run(
        self, dy: Tensor, slopes: Sequence[Slope], shortcuts: Sequence[Use | None]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of x and of the tensors, where they are wanted."""
        blocks = self.plan.blocks
        upstream = [self.needs_x]
        for block in blocks:
            upstream.append(upstream[-1] or self.gradients.wants(*block.tensors()))
        # A gradient may come in any strides, that of an average pooling expanded: made dense once, for all readers.
        g, end = dense(dy, slopes[-1].norm1.rows), len(slopes)
        sums = None
        if self.with_sums:
            self.end, sums = self.ops.channel_sum(g), 1.0
        for position in reversed(range(len(blocks))):
            block, start = blocks[position], end - len(blocks[position].rows)
            if not upstream[position + 1]:
                break
            g, sums = self.block(
                block, g, sums, slopes[start:end], shortcuts[position], upstream[position]
            )
            end = start
        gradients = self.gradients.found(self.end)
        return (self.plan.outside(g) if self.needs_x else None), gradients

    def block(
        self,
        block: Block,
        g: Tensor,
        last_sums: Tensor | float | None,
        slopes: Sequence[Slope],
        aside: Use | None,
        upstream: bool,
    ) -> tuple[Tensor | None, Tensor | float | None]:
        """G_0 and S_0 of a block, from G_s and S_s."""
        stages = len(block.rows)
        gs, sums = {stages: g}, {stages: last_sums}
        inside = self.gradients.wants(*block.tensors())
        for i in reversed(range(stages)):
            if self.gradients.wants(block.coefficients):
                self.learn(block, i, gs[i + 1], sums[i + 1], slopes)
            wanted = upstream or (inside and i > 0)
            du, own = self.evaluation(block, i, gs, slopes[i], aside, wanted)
            if du is not None:
                gs[i] = du
            if last_sums is not None:
                sums[i] = self.sums(block, i, sums, own)
            for j in list(gs):  # an earlier stage may have no more use for it
                if j > i and not any(k.index < i for k in block.rows[j - 1]):
                    del gs[j]
        if self.gradients.wants(block.conv2.bias):
            self.add_bias(block, sums)
        if upstream and 0 not in gs:  # a scheme whose last stage is nothing of x
            use = slopes[0].norm1
            gs[0] = g.new_zeros(use.shape, dtype=use.dtype)
        return gs.get(0), sums.get(0)

    def coefficient(self, block: Block, j: int, position: int) -> float | Tensor:
        """The coefficient of a term of the row that gives u_j."""
        if block.coefficients is None:
            return block.rows[j - 1][position].number
        return self.t[block.coefficients][block.offset(j - 1) + position]

    def later(self, block: Block, uses: Sequence[tuple[int, int]], gs: dict[int, Tensor]) -> Stage:
        """The sum of the later stages' gradients over these uses."""
        uses = [(j, p) for j, p in uses if j in gs]
        terms = [gs[j] for j, _ in uses]
        coefficients = [self.coefficient(block, j, p) for j, p in uses]
        if block.coefficients is None or not uses:
            return Stage(terms, coefficients).at_most(self.ops, MAX_TERMS)
        return Stage(terms, [], torch.stack(coefficients))

    def learn(
        self, block: Block, row: int, g: Tensor, sums: Tensor | float, slopes: Sequence[Slope]
    ) -> None:
        """The gradients of a row's coefficients, <G, F(u_k)>, with the bias of F."""
        terms = block.rows[row]
        values = [self.saved[slopes[k.index].value] for k in terms if k.of_slope]
        dots = self.ops.stage_dots(g, values)
        bias = get(self.t, block.conv2.bias)
        if bias is not None and (sums := self.vector(sums)) is not None:
            dots = dots + (sums * bias.to(sums.dtype)).sum()
        found = iter(dots.unbind())
        zero = dots.new_zeros(())
        gradient = [
            next(found) if j == row and k.of_slope else zero
            for j in range(len(block.rows))
            for k in block.rows[j]
        ]
        self.gradients.add(block.coefficients, torch.stack(gradient))

    def sums(
        self, block: Block, i: int, sums: dict[int, Tensor | float], own: Tensor | None
    ) -> Tensor | float:
        """S_i = sum_j alpha_ji S_j + norm1's own part; a number where it is that many times S at the chain's end."""
        uses = _uses(block, i, of_slope=False)
        parts = [(sums[j], self.coefficient(block, j, p)) for j, p in uses]
        if own is None and not any(isinstance(value, Tensor) for part in parts for value in part):
            return sum(s * coefficient for s, coefficient in parts)
        total = own
        for s, coefficient in parts:
            vector = self.vector(s)
            if vector is not None:
                part = vector * coefficient
                total = part if total is None else total + part
        return 0.0 if total is None else total

    def vector(self, sums: Tensor | float) -> Tensor | None:
        """S_i itself, None for an exact zero."""
        if isinstance(sums, Tensor):
            return sums
        if sums == 0:
            return None
        return self.end if sums == 1 else self.end * sums

    def add_bias(self, block: Block, sums: dict[int, Tensor | float]) -> None:
        """The gradient of conv2's bias, sum_i (sum_k beta_ik h) S_i."""
        number = 0.0
        for j, row in enumerate(block.rows, start=1):
            for p, k in enumerate(row):
                if not k.of_slope:
                    continue
                s, coefficient = sums[j], self.coefficient(block, j, p)
                if isinstance(s, Tensor) or isinstance(coefficient, Tensor):
                    self.gradients.add(block.conv2.bias, self.vector(s), coefficient)
                else:
                    number += s * coefficient
        if number != 0:
            self.gradients.add(block.conv2.bias, self.end, number)

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
            lonely = wanted and extras.terms
            return (self.ops.stage_combine(*extras) if lonely else None), None
        if len(above.terms) > 1:
            above = Stage([self.ops.stage_combine(*above)], [1.0])
        g = cast(above.terms[0], self.plan.z_dtype)
        factor = above.numbers[0] if above.coefficients is None else above.coefficients

        below = wanted or self.gradients.wants(
            block.conv1.weight, block.norm1.weight, block.norm1.bias
        )
        if block.shortcut is not None:
            below = below or self.gradients.wants(block.shortcut[0].weight)
        dc = self.through(block.conv2, block.norm2, slope.norm2, g, factor, below, block.conv1.bias)
        if block.shortcut is None:
            if not below:
                return None, None
            dz = self.input_gradient(block.conv1, dc, slope.norm1)
            du, own, z = self.norm(
                block.norm1,
                slope.norm1,
                dz,
                1.0,
                extras,
                wanted,
                self.gradients.wants(block.conv1.weight),
            )
            self.gradients.add(block.conv1.weight, self.weight_gradient(block.conv1, dc, z))
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
        dq, own, _ = self.norm(norm, aside, g, 1.0, Stage([], []), below, False, keep_dz=True)
        self.gradients.add(conv.bias, own)
        if not below:
            return None, None
        branch = self.input_gradient(block.conv1, dc, use)
        if self.writes_over:
            dz = self.add_input_gradient(branch, conv, dq, use)
        else:
            shortcut = self.input_gradient(conv, dq, use)
            dz = self.ops.stage_combine([branch, shortcut], [1.0, 1.0], None, None)
        learns = self.gradients.wants(block.conv1.weight, conv.weight)
        du, own, z = self.norm(block.norm1, use, dz, 1.0, Stage([], []), wanted, learns)
        self.gradients.add(block.conv1.weight, self.weight_gradient(block.conv1, dc, z))
        self.gradients.add(conv.weight, self.weight_gradient(conv, dq, z))
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
        learns = self.gradients.wants(conv.weight)
        dz = self.input_gradient(conv, g, use)
        du, own, z = self.norm(norm, use, dz, factor, Stage([], []), below, learns)
        self.gradients.add(inner_bias, own)
        self.gradients.add(conv.weight, self.weight_gradient(conv, g, z), factor)
        return du

    def input_gradient(self, conv: Conv, g: Tensor, use: Use) -> Tensor:
        """Of a convolution whose input has the shape of ``use``."""
        like = g  # only its shape and layout are looked at
        if g.shape != use.shape:
            strides = dense_strides(use.shape, use.rows)
            like = torch.empty_strided(use.shape, strides, dtype=g.dtype, device=g.device)
        return self.transpose(conv, g, like, (True, False, False))[0]

    def add_input_gradient(self, to: Tensor, conv: Conv, g: Tensor, use: Use) -> Tensor:
        """``to``, written over with its sum with ``input_gradient``.

        A 1x1 kernel with strides reads a part of the positions: its gradient is added there alone.
        """
        kernel = self.t[conv.weight].shape[2:]
        if kernel == (1, 1) and conv.padding == (0, 0):
            read = to[:, :, :: conv.stride[0], :: conv.stride[1]]
            dense_conv = dataclasses.replace(conv, stride=(1, 1))
            read.add_(self.input_gradient(dense_conv, g, use._replace(shape=read.shape)))
            return to
        return to.add_(self.input_gradient(conv, g, use))

    def weight_gradient(self, conv: Conv, g: Tensor, z: Tensor | None) -> Tensor | None:
        """Of a convolution with input z, where it is wanted."""
        if z is None or not self.gradients.wants(conv.weight):
            return None
        return self.transpose(conv, g, z, (False, True, False))[1]

    def transpose(
        self, conv: Conv, g: Tensor, z: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        weight = self.weights.of(conv, g)
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
        *,
        keep_dz: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """du with the extras added (where wanted), its own sum over all but the channels, and z (for ``learns``).

        The own sum is None under batch statistics, where it is zero, and where no bias asks for it. Where dz has no
        other reader, du may be written over it.
        """
        scale = (1.0, factor) if isinstance(factor, Tensor) else (factor, None)
        write_z = learns and use.z is None
        added = (extras.terms, extras.numbers, extras.coefficients)
        affine = (get(self.t, norm.weight), get(self.t, norm.bias))
        u = get(self.saved, use.operand)
        kept = get(self.saved, use.z)
        out = None
        if self.writes_over and not keep_dz and dz.dtype == use.dtype and is_dense(dz, use.rows):
            out = dz
        if norm.kind == BATCH:
            moments = (self.saved[use.mean], self.saved[use.rstd])
            operands = (u, *moments, *affine, norm.activation)
            du, z = self.batch(norm, use, (dz, *scale), operands, added, wanted, write_z, out)
            own = None
        elif norm.kind == FIXED:
            mean = get(self.saved, use.mean)
            mean = self.t[norm.mean] if mean is None else mean
            operands = (mean, self.t[norm.rstd], *affine, norm.activation)
            du, own, z = self.fixed(norm, use, (dz, *scale), operands, added, wanted, write_z, out)
        else:
            du, d_gamma, d_beta, own, z = self.ops.group_norm_act_backward(
                dz,
                *scale,
                u,
                get(self.t, use.bias),
                self.saved[use.mean],
                self.saved[use.rstd],
                *affine,
                norm.activation,
                *added,
                write_z,
            )
            self.gradients.add(norm.weight, d_gamma)
            self.gradients.add(norm.bias, d_beta)
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
        out: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        """du and z under batch statistics."""
        if wanted:
            over = None
            if out is not None and norm.process_group is None:
                over = out, self.room_for_z(use, dz[0]) if write_z else None
            du, dy, dy_xhat, z = _distributed.batch_norm_act_backward(
                self.ops,
                dz,
                operands,
                added,
                write_z,
                norm.process_group,
                get(self.saved, use.count),
                over,
            )
        else:
            du = None
            dy, dy_xhat, z = self.ops.norm_act_backward_reduce(*dz, *operands, write_z)
        self.gradients.add(norm.weight, dy_xhat)
        self.gradients.add(norm.bias, dy)
        return du, z

    def room_for_z(self, use: Use, dz: Tensor) -> Tensor:
        """Where to write a z: over the last one, whose convolutions have their weights' gradients, or a new tensor."""
        z = self.z
        if z is None or z.shape != use.shape or z.dtype != dz.dtype or not is_dense(z, use.rows):
            z = self.z = empty(dz, use.rows, dz.dtype)
        return z

    def fixed(
        self,
        norm: Norm,
        use: Use,
        dz: tuple,
        operands: tuple,
        added: tuple,
        wanted: bool,
        write_z: bool,
        out: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """du, its own sum and z under given statistics."""
        u, mask = get(self.saved, use.operand), get(self.saved, use.mask)
        du = own = z = None
        if write_z or self.with_sums or self.gradients.wants(norm.weight, norm.bias, use.bias):
            dy, dy_xhat, z = self.ops.norm_act_backward_reduce(*dz, u, *operands, write_z)
            self.gradients.add(norm.weight, dy_xhat)
            self.gradients.add(norm.bias, dy)
            own = dy * self.t[norm.rstd]
            if norm.weight is not None:
                own = own * self.t[norm.weight].to(own.dtype)
        if wanted:
            mean, *rest = operands
            mean = None if u is None else mean
            arguments = (*dz, u, mask, mean, *rest, None, None, 1.0, None, *added)
            if out is None:
                du = self.ops.norm_act_backward(*arguments, use.dtype)
            else:
                self.ops.norm_act_backward.out(*arguments, du=out)
                du = out
        return du, own, z
