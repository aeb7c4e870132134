"""Local Lipschitz constants of groups of blocks, estimated from below by their Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .ascent import attack_mode
from .groups import Groups, group_modules, passed_through, quantiles
from .training import Batches

# What a gradient needs to be differentiated again is kept for so many samples at once.
_SAMPLES_AT_ONCE = 50

LinearMap = Callable[[Tensor], Tensor]


def jacobian_norms(
    model: nn.Module,
    batches: Batches,
    *,
    groups: Groups = None,
    iterations: int = 20,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Spectral norm of each group's Jacobian J at each sample, by power iteration on J^T J.

    Where the group is differentiable, this norm is the limit of the largest ratio
    |out(x + d) - out(x)|_2 / |d|_2 as d goes to 0, hence a lower bound of the group's Lipschitz
    constant in l2. Power iteration comes to it from below: with few steps it is a lower one.

    The model is in eval mode and its parameters are frozen meanwhile; modes and `requires_grad` are
    restored, also after an exception. Random numbers are its own.

    Args:
        model: maps images to logits `[N, num_classes]`, sample by sample.
        batches: pairs of images `[N, C, H, W]` and labels `[N]` (not looked at) on the model's
            device.
        groups: as in `perturbation_growth`; each is called with one tensor.
        iterations: products with J.
        seed: of the vectors that the iteration begins with.

    Returns:
        By group: "median", "p90" and "max" over the samples; "samples" and "iterations".

    Raises:
        ValueError: `iterations` below 1; no batches; groups as in `perturbation_growth`; a group
            that cannot be differentiated.
        TypeError: a group that does not map a tensor to a tensor.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    modules = group_modules(model, groups)
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    images = 0
    generator = None
    with attack_mode(model, "eval"):
        for x, _ in batches:
            if generator is None:
                generator = torch.Generator(x.device).manual_seed(seed)
            with torch.no_grad():
                passed = passed_through(model, modules, x)
            for name, module in modules.items():
                for part in passed[name][0].split(_SAMPLES_AT_ONCE):
                    jacobian, transposed = _jacobian(module, part, name)
                    # Contiguous: the same start in whichever layout the group's input is.
                    start = part.new_empty(part.shape).normal_(generator=generator)
                    found[name].append(_spectral_norms(jacobian, transposed, start, iterations))
            images += len(x)
    if not images:
        raise ValueError("no batch was seen")
    return {
        name: {**quantiles(torch.cat(parts)), "samples": images, "iterations": iterations}
        for name, parts in found.items()
    }


def _jacobian(module: nn.Module, x: Tensor, name: str) -> tuple[LinearMap, LinearMap]:
    """Products with each sample's Jacobian at x, and with its transpose.

    J^T u is a gradient, linear in u: the gradient of <J^T u, v> by u is J v.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        # A copy, since the module may write into its input.
        y = module(leaf.clone())
        if not y.requires_grad:
            raise ValueError(f"group {name!r} must be differentiable, its output has no gradient")
        u = torch.zeros_like(y, requires_grad=True)
        (pulled_back,) = torch.autograd.grad(y, leaf, u, create_graph=True)

    def jacobian(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled_back, u, v, retain_graph=True)[0]

    def transposed(w: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaf, w, retain_graph=True)[0]

    return jacobian, transposed


def _spectral_norms(
    jacobian: LinearMap, transposed: LinearMap, start: Tensor, iterations: int
) -> Tensor:
    """Each sample's |J v|_2, v after steps of v <- J^T J v / |J^T J v|_2; fp64."""
    v = start / _lengths(start)
    for _ in range(iterations - 1):
        w = transposed(jacobian(v))
        length = _lengths(w)
        # Where J v is 0 there is nowhere to go.
        v = torch.where(length == 0, v, w / length)
    return _lengths(jacobian(v)).flatten().double()


def _lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
