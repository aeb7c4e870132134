"""A chain of blocks as one autograd node: the schedule of its forward and backward over the ops.

Forward, for each evaluation of F: a stage u and z = act(norm1(u)) from one op, conv1, act(norm2) from one op, conv2.
A block's last stage is combined by the next block's first op. Kept for backward are u and conv1's output, or one bit an
element where the chain is frozen. Backward, from the last stage to the first, with G_i = dL/du_i:

    G_k = sum_{i>k} alpha_ik G_i + dF(u_k)^T ( sum_{i>k} beta_ik h G_i )

Convolutions are linear: where one stage alone uses F(u_k), beta h is a factor in the next op and in the weight's
gradient; where several do, the sum is one ``stage_combine``. The alpha terms are added by the op that ends dF's
transpose. z is computed again by the reduction over dz, after a convolution's input gradient, before its weight's.

On a CPU the blocks run in rows (channels last) also where x is in planes: x and the gradient of the result are brought
into rows, the result and the gradient of x into planes. There the ops also write over tensors that nobody reads any
more, which are in the caches, and walks are replayed (``replay``).

conv2's bias enters u_i as (sum_k beta_ik h) b; with S_i the sum of G_i over all but the channels, its gradient is
sum_i (sum_k beta_ik h) S_i, and S_k = sum_i alpha_ik S_i + norm1's own part: nothing under batch statistics.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _autocast
from .._backends import Backend
from .._layout import dense_strides, is_rows, rows_are_faster
from .backward import Backward
from .cache import cache_bytes
from .differentiable import differentiable
from .forward import Forward
from .plan import Builder, Plan, Row, Term, Update
from .records import Notes
from .replay import Replays, Tensors

__all__ = ["CACHE", "Builder", "Row", "Term", "run"]

CACHE = "cache"
# Tensors of a block's size that are in use at once: two stages, a slope, a convolution's input and output, gradients.
_LIVE = 8
_REPLAYS = Replays()


def run(
    builder: Builder, backend: Backend, x: Tensor, *, recompute: bool, tile: int | str | None
) -> Tensor:
    """The blocks that were added to ``builder``, applied to x; running statistics move.

    Args:
        builder: holds one block or more.
        backend: whose ops run, forward and backward.
        x: ``[N, C, H, W]``.
        recompute: whether backward computes the convolutions' inputs again, or they are kept.
        tile: samples that go through all blocks together, where nothing couples samples; CACHE: as many as fit.
    """
    recording = torch.is_grad_enabled()
    weights = [builder.tensors[conv.weight] for block in builder.blocks for conv in block.convs()]
    channels = (size for weight in weights for size in weight.shape[:2])
    plan = Plan(
        backend,
        tuple(builder.blocks),
        builder.z_dtype,
        recording,
        recompute,
        rows_are_faster(x, builder.z_dtype, channels),
        _tiles(builder, x, tile, recording),
        tuple(builder.updates),
    )
    with _autocast.disabled(x):
        y, *moments = Chain.apply(plan, x, _trace_of(x, builder, recording), *builder.tensors)
        if torch.compiler.is_compiling():
            _update_running_statistics(plan, moments, builder.tensors)
    return y


def _trace_of(x: Tensor, builder: Builder, recording: bool) -> Tensor | None:
    """Nothing, that depends on x: for a frozen chain, which keeps no x, to be differentiable by it a second time."""
    frozen = recording and x.requires_grad and not _learns(builder)
    return x[:0].clone() if frozen and not torch.compiler.is_compiling() else None


def _learns(builder: Builder) -> bool:
    return any(tensor.requires_grad for tensor in builder.tensors)


def _tiles(
    builder: Builder, x: Tensor, tile: int | str | None, recording: bool
) -> tuple[tuple[int, int], ...]:
    """Where the batch is cut: nowhere, if its samples are coupled by statistics or by gradients that sum over them.

    A weight's gradient would be summed in another order. No part is smaller than ``tile``.
    """
    samples = x.shape[0]
    coupled = builder.updates or (recording and _learns(builder))
    if tile is None or coupled or torch.compiler.is_compiling():
        return ((0, samples),)
    if tile == CACHE:
        tile = max(2, cache_bytes(x.device) // (_LIVE * max(x[:1].nbytes, 1)))
    if samples < 2 * tile:
        return ((0, samples),)
    parts = samples // tile
    cuts = [samples * part // parts for part in range(parts + 1)]
    return tuple(itertools.pairwise(cuts))


def _update_running_statistics(
    plan: Plan, moments: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> None:
    """Each norm's updates in their order, as many at once as saw equally many values after the same bias."""
    widths: dict[int, list[list[Update]]] = {}
    for norm in dict.fromkeys(update.norm for update in plan.updates):
        groups: list[list[Update]] = []
        for update in plan.updates:
            if update.norm is norm:
                last = groups[-1][0] if groups else None
                if groups and last.rows == update.rows and last.bias == update.bias:
                    groups[-1].append(update)
                else:
                    groups.append([update])
        channels = moments[3 * groups[0][0].moments].numel()
        widths[channels] = widths.get(channels, []) + groups
    # One table for all norms of a width: each op on a few vectors is hardly any work.
    for groups in widths.values():
        updates = [update for group in groups for update in group]
        columns = [[moments[3 * update.moments + k] for update in updates] for k in (0, 1)]
        means, variances = torch.stack(columns[0] + columns[1]).split(len(updates))
        end = 0
        for group in groups:
            first, start, end = group[0], end, end + len(group)
            mean = means[start:end]
            if first.bias is not None:
                mean = mean + tensors[first.bias].detach()
            plan.backend.ops.update_running_stats_(
                first.norm.running_mean,
                first.norm.running_var,
                first.norm.num_batches_tracked,
                mean,
                variances[start:end],
                float(first.rows),
                moments[3 * first.moments + 2],
                first.norm.momentum,
            )


class Chain(Function):
    """The blocks of a plan, one after another; tile by tile of the batch, where the plan has tiles."""

    @staticmethod
    def forward(ctx, plan, x, trace, *tensors):
        """The chain's output; then ``Forward.moments``."""
        ctx.set_materialize_grads(False)
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        saved: list[Tensor] = []
        notes: list[Notes] = []
        moments: list[Tensor | None] = []

        def parts() -> Iterator[Tensor]:
            for part in _cut(x, plan.tiles):
                (y, *rest), note = _walk(_forward, plan, needs, None, [part, *tensors])
                saved.extend(rest[: note.saved])
                moments[:] = rest[note.saved :]
                notes.append(note)
                yield y

        y = _in_tiles(plan.tiles, parts())
        # Within the node, where torch.utils.checkpoint repeats it; a compiler wants it outside.
        if not torch.compiler.is_compiling():
            _update_running_statistics(plan, moments, tensors)
        ctx.plan, ctx.notes = plan, notes
        ctx.save_for_backward(x if notes[0].whole else None, trace, *tensors, *saved)
        ctx.mark_non_differentiable(*(m for m in moments if m is not None))
        return y, *moments

    @staticmethod
    def backward(ctx, dy, *_):
        """Gradients of x and of the tensors, where they are wanted."""
        plan, needs = ctx.plan, (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        if dy is None:
            return None, None, *[None] * len(needs)
        x, trace, *rest = ctx.saved_tensors
        tensors, kept = rest[: len(needs) - 1], rest[len(needs) - 1 :]
        if torch.is_grad_enabled() and not ctx.notes[0].masks:
            dx, *gradients = differentiable(plan, x, tensors, dy, needs)
            return None, dx, None, *gradients
        gradients: list[Tensor | None] = []

        def parts() -> Iterator[Tensor | None]:
            start = 0
            cuts = [_cut(tensor, plan.tiles) for tensor in (dy, x)]
            for dy_part, x_part, note in zip(*cuts, ctx.notes, strict=True):
                saved, start = kept[start : start + note.saved], start + note.saved
                inputs = [dy_part, x_part, *tensors, *saved]
                (dx, *gradients[:]), _ = _walk(_backward, plan, needs, note, inputs)
                yield dx

        dx = _in_tiles(plan.tiles, parts())
        if torch.is_grad_enabled() and trace is not None:
            dx = dx + trace.sum()
        return None, dx, None, *gradients


def _walk(
    walk: Callable[..., tuple[list[Tensor | None], Notes]],
    plan: Plan,
    needs: Sequence[bool],
    notes: Notes | None,
    tensors: Tensors,
) -> tuple[list[Tensor | None], Notes]:
    """``_forward`` or ``_backward``, replayed where the backend's ops are all the dispatcher's and call nobody else."""

    def run(tensors: Tensors) -> tuple[list[Tensor | None], Notes]:
        return walk(plan, needs, notes, tensors)

    spread = any(norm.process_group is not None for block in plan.blocks for norm in block.norms())
    if not plan.backend.writes_over or spread or torch.compiler.is_compiling():
        return run(tensors)
    settings = (plan.blocks, plan.z_dtype, plan.recording, plan.recompute, plan.rows)
    return _REPLAYS.run((walk, plan.backend.name, settings, tuple(needs), notes), run, tensors)


def _forward(
    plan: Plan, needs: Sequence[bool], _: None, tensors: Tensors
) -> tuple[list[Tensor | None], Notes]:
    """From x and the plan's tensors: y, what backward needs, and the moments."""
    x, *rest = tensors
    walk = Forward(plan, x, rest, needs)
    y = walk.run()
    places = tuple(walk.slopes), tuple(walk.shortcuts)
    notes = Notes(*places, len(walk.saved), walk.whole, walk.masks)
    return [y, *walk.saved, *walk.moments], notes


def _backward(
    plan: Plan, needs: Sequence[bool], notes: Notes, tensors: Tensors
) -> tuple[list[Tensor | None], Notes]:
    """From dy, x (where it is kept), the plan's tensors and what ``_forward`` kept: dx and the tensors' gradients."""
    dy, x, *rest = tensors
    count = len(needs) - 1
    saved = [*rest[count:], None if x is None else plan.inside(x)]
    walk = Backward(plan, rest[:count], saved, needs)
    dx, gradients = walk.run(dy, notes.slopes, notes.shortcuts)
    return [dx, *gradients], notes


def _cut(tensor: Tensor | None, tiles: Sequence[tuple[int, int]]) -> list[Tensor | None]:
    if tensor is None or len(tiles) == 1:
        return [tensor] * len(tiles)
    return [tensor[a:b] for a, b in tiles]


def _in_tiles(tiles: Sequence[tuple[int, int]], parts: Iterator[Tensor | None]) -> Tensor | None:
    """One batch of the parts, each put in its place while it is in the cache."""
    if len(tiles) == 1:
        return next(parts)
    if torch.is_grad_enabled():
        return torch.cat(list(parts))
    whole = None
    for (a, b), part in zip(tiles, parts, strict=True):
        if part is None:
            return None
        if whole is None:
            shape = (tiles[-1][1], *part.shape[1:])
            strides = dense_strides(shape, is_rows(part))
            whole = part.new_empty_strided(shape, strides)
        whole[a:b].copy_(part)
    return whole
