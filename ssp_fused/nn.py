"""Layers: residual blocks that take one strong-stability-preserving Runge-Kutta step.

A block's residual branch is pre-activation, F(u) = conv2(act(norm2(conv1(act(norm1(u)))))), and shared by all stages
of the step. Between two convolutions a block runs one fused op (``ssp_fused.functional``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _chain, _checks, _fusion, reference, schemes
from ._backends import select
from ._backends.reference import BACKEND as _REFERENCE
from ._chain import Builder, Row, Term
from ._checks import activation_index
from .functional import BLOCK_OPS, Coefficients
from .schemes import ShuOsher

__all__ = ["AdaptiveSSPBlock", "PreActDownsample", "SSPBlock", "SSPIntegrator", "SSPStack"]

NORMS = ("batch", "group", "instance")


def make_norm(
    norm: str,
    channels: int,
    *,
    num_groups: int | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A normalization module by name: "batch", "group" (``num_groups`` default min(32, channels)) or "instance"."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}")
    if num_groups is not None and norm != "group":
        raise ValueError(f"num_groups must be None for norm {norm!r}, got {num_groups}")
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps=eps, momentum=momentum, device=device, dtype=dtype)
    groups = channels if norm == "instance" else num_groups or min(32, channels)
    return nn.GroupNorm(groups, channels, eps=eps, device=device, dtype=dtype)


class _PreActivation(nn.Module):
    """norm1, conv1, norm2, conv2 of a pre-activation residual branch."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: str,
        num_groups: int | None,
        activation: str,
        bias: bool,
        eps: float,
        momentum: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        activation_index(activation)
        self.activation = activation
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norms = {"num_groups": num_groups, "eps": eps, "momentum": momentum, **place}
        self.norm1 = make_norm(norm, in_channels, **norms)
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride=stride, padding=1, bias=bias, **place
        )
        self.norm2 = make_norm(norm, out_channels, **norms)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias, **place)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for ``x``."""
        if select(BLOCK_OPS, (x,)) is _REFERENCE or self._bypasses():
            return self._plain(x)
        return self._fused(x)

    def _bypasses(self) -> bool:
        """Whether the fused block would leave out something that a call of its modules would do."""
        return False

    def _plain(self, x: Tensor) -> Tensor:
        """The block, module by module."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Tensor:
        """The block, with one op between two convolutions."""
        return _run_chain([self], x) if self._chainable(x) else self._piecewise(x)

    def _piecewise(self, x: Tensor) -> Tensor:
        """The block, op by op, its submodules called as they are where that is not what an op would do."""
        raise NotImplementedError

    def _chainable(self, x: Tensor) -> bool:
        """Whether the block can be part of a chain."""
        norms, convs = [self.norm1, self.norm2], [self.conv1, self.conv2]
        return x.dim() == 4 and _fusion.chainable(norms, convs)

    def _joins(self, x: Tensor) -> bool:
        """Whether a chain may run the block without calling it."""
        called_as_built = type(self).forward is _PreActivation.forward
        if not called_as_built or _fusion.additions(self) is not None or self._bypasses():
            return False
        return self._chainable(x)

    def _add_to(self, chain: Builder) -> None:
        """Append the block to a chain."""
        raise NotImplementedError

    def _modules_of_chain(self) -> tuple[Any, ...]:
        return self.norm1, self.conv1, self.norm2, self.conv2, self._activation

    @property
    def _activation(self) -> str:
        return self.activation

    def _act(self, y: Tensor) -> Tensor:
        return reference.torch_activation(y, activation_index(self._activation))

    def _branch(self, u: Tensor) -> Tensor:
        """F(u), module by module."""
        z = self._act(self.norm1(u))
        return self.conv2(self._act(self.norm2(self.conv1(z))))

    def _first(
        self,
        terms: Sequence[Tensor],
        coefficients: Coefficients | None = None,
        channel_bias: Tensor | None = None,
        *,
        updates: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """A stage u and z = act(norm1(u)), as ``_fusion.norm_act``."""
        return _fusion.norm_act(
            self.norm1, self._activation, terms, coefficients, channel_bias, updates=updates
        )

    def _slope(self, z: Tensor, *, updates: int = 1) -> tuple[Tensor, Tensor | None]:
        """F(u) from z = act(norm1(u)), and the bias that it still lacks."""
        inner, inner_bias = _fusion.convolve(self.conv1, z)
        _, z = _fusion.norm_act(
            self.norm2, self._activation, [inner], channel_bias=inner_bias, updates=updates
        )
        return _fusion.convolve(self.conv2, z)


class SSPBlock(_PreActivation):
    """One step of a Runge-Kutta scheme in Shu-Osher form, its right-hand side a pre-activation residual branch.

    u_0 = x;  u_i = sum_{k<i} ( alpha_ik u_k + beta_ik h F(u_k) );  the block returns u_s. Source: B. Kim et al.,
    "Robust Neural Networks Inspired by Strong Stability Preserving Runge-Kutta Methods", ECCV 2020.

    Input and output: ``[N, channels, H, W]``. ``state_dict`` holds torch's own norm1, conv1, norm2, conv2. Batch
    statistics are updated once per evaluation of F, in stage order; each norm's own ``training`` governs it.

    Args:
        channels: Number of channels.
        scheme: A name in ``ssp_fused.schemes`` or a :class:`~ssp_fused.schemes.ShuOsher`.
        norm: "batch", "group" or "instance".
        num_groups: For "group"; default min(32, channels).
        activation: "relu", "leaky_relu", "silu" or "identity".
        bias: Whether the convolutions have biases.
        step_size: h.
        eps: Of the norms.
        momentum: Of batch norm's running statistics; None averages all batches.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An unknown scheme, norm or activation; groups that do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        scheme: str | ShuOsher = "ssp33",
        *,
        norm: str = "batch",
        num_groups: int | None = None,
        activation: str = "relu",
        bias: bool = True,
        step_size: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        scheme = schemes.get(scheme)
        super().__init__(
            channels,
            channels,
            norm=norm,
            num_groups=num_groups,
            activation=activation,
            bias=bias,
            eps=eps,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.scheme = scheme
        self.step_size = step_size

    def _plain(self, x: Tensor) -> Tensor:
        return reference.ssp_step(x, self._branch, self.scheme, self.step_size)

    def _add_to(self, chain: Builder) -> None:
        rows = zip(self.scheme.alpha, self.scheme.beta, strict=True)
        chain.add(*self._modules_of_chain(), tuple(_row(a, b, self.step_size) for a, b in rows))

    def _piecewise(self, x: Tensor) -> Tensor:
        stages, slopes = [x], []
        bias: Tensor | None = None
        _, z = self._first([x])
        for alpha, beta in zip(self.scheme.alpha, self.scheme.beta, strict=True):
            slope, bias = self._slope(z)
            slopes.append(slope)
            beta = [b * self.step_size for b in beta]
            stage = _stage(stages, slopes, alpha, beta, bias)
            if len(slopes) == self.scheme.stages:
                return _fusion.combine(*stage)
            u, z = self._first(*stage)
            stages.append(u)
        raise AssertionError("a scheme has at least one stage")

    def extra_repr(self) -> str:
        """Scheme, activation and step size."""
        return f"{self.scheme.name}, activation={self._activation}, step_size={self.step_size}"


def _row(alpha: Sequence[float], beta: Sequence[float], step_size: float) -> Row:
    """sum_k ( alpha_k u_k + beta_k h F(u_k) ), without its zeros."""
    stages = [Term(False, k, float(a)) for k, a in enumerate(alpha) if a != 0]
    return (*stages, *(Term(True, k, float(b * step_size)) for k, b in enumerate(beta) if b != 0))


def _stage(
    stages: Sequence[Tensor],
    slopes: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
    bias: Tensor | None,
) -> tuple[list[Tensor], list[float], Tensor | None]:
    """Operands, coefficients and channel bias of sum_k ( alpha_k u_k + beta_k F(u_k) ), without its zeros.

    Every slope lacks the same bias, which therefore comes in once, (sum_k beta_k) times.
    """
    operands = [*zip(alpha, stages, strict=True), *zip(beta, slopes, strict=True)]
    operands = [(c, t) for c, t in operands if c != 0]
    total = sum(beta)
    if bias is not None and total != 1:
        bias = bias * total
    return [t for _, t in operands], [c for c, _ in operands], bias


class AdaptiveSSPBlock(_PreActivation):
    """SSP-adap: a two-stage step with two learned scalars, a = sigmoid(a21) and b = sigmoid(b10).

    u1 = x + b F(x);  u2 = (1-a) x + (1 - 1/(2b) - ab) F(x) + a u1 + 1/(2b) F(u1). Substituting u1, ``a21`` cancels:
    it is kept as published checkpoints have it, with a gradient of exactly zero. F(x) is computed once; running
    statistics are updated for it twice, since the published network evaluates it twice. Source: equations (13) to
    (15) of B. Kim et al., ECCV 2020.

    Args:
        channels: Number of channels; input and output are ``[N, channels, H, W]``.
        a21: Initial value of the scalar Parameter ``a21``.
        b10: Initial value of the scalar Parameter ``b10``.
        learn_a21: Whether ``a21`` requires a gradient.
        learn_b10: Whether ``b10`` requires a gradient.
        norm: As in :class:`SSPBlock`, like all that follow.
        num_groups: For norm "group".
        activation: Name of the activation.
        bias: Whether the convolutions have biases.
        step_size: h.
        eps: Of the norms.
        momentum: Of batch norm's running statistics.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: As :class:`SSPBlock`.
    """

    def __init__(
        self,
        channels: int,
        *,
        a21: float = 0.25,
        b10: float = 1.0,
        learn_a21: bool = True,
        learn_b10: bool = True,
        norm: str = "batch",
        num_groups: int | None = None,
        activation: str = "relu",
        bias: bool = True,
        step_size: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels,
            channels,
            norm=norm,
            num_groups=num_groups,
            activation=activation,
            bias=bias,
            eps=eps,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.step_size = step_size
        self.a21 = nn.Parameter(
            torch.tensor(float(a21), device=device, dtype=dtype), requires_grad=learn_a21
        )
        self.b10 = nn.Parameter(
            torch.tensor(float(b10), device=device, dtype=dtype), requires_grad=learn_b10
        )

    def _plain(self, x: Tensor) -> Tensor:
        return reference.adaptive_step(x, self._branch, self.a21, self.b10, self.step_size)

    def _add_to(self, chain: Builder) -> None:
        first, last = self._rows()
        rows = (_row((1.0,), (1.0,), 1.0), _row((1.0, 0.0), (1.0, 1.0), 1.0))
        chain.add(
            *self._modules_of_chain(), rows, coefficients=torch.cat([first, last]), repeated=True
        )

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The coefficients over (x, F(x)) and over (x, F(x), F(u1))."""
        first, last = reference.adaptive_coefficients(self.a21, self.b10)
        if self.step_size != 1:
            first = torch.cat([first[:1], self.step_size * first[1:]])
            last = torch.cat([last[:1], self.step_size * last[1:]])
        return first, last

    def _piecewise(self, x: Tensor) -> Tensor:
        first, last = self._rows()
        _, z = self._first([x], updates=2)
        slope, bias = self._slope(z, updates=2)
        _, z = self._first([x, slope], first, _scaled(bias, first[1]))
        later, bias = self._slope(z)
        return _fusion.combine([x, slope, later], last, _scaled(bias, last[1] + last[2]))

    def extra_repr(self) -> str:
        """Activation and step size."""
        return f"activation={self._activation}, step_size={self.step_size}"


def _scaled(bias: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if bias is None else bias * factor


class PreActDownsample(_PreActivation):
    """The subsampling residual block between two groups of an SSP network.

    With z = act(norm1(x)): F = conv2(act(norm2(conv1(z)))) with conv1 strided, added to
    norm(conv1x1(z)), the shortcut ``downsample``. Its first norm's running statistics are updated twice, since the
    published network evaluates it for the shortcut and for the branch.

    Args:
        in_channels: Channels of the input ``[N, in_channels, H, W]``.
        out_channels: Channels of the output ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
        stride: Of the first 3x3 convolution and of the shortcut.
        norm: As in :class:`SSPBlock`, like all that follow.
        num_groups: For norm "group".
        activation: Name of the activation.
        bias: Whether the 3x3 convolutions have biases; the shortcut has none.
        eps: Of the norms.
        momentum: Of batch norm's running statistics.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: As :class:`SSPBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 2,
        norm: str = "batch",
        num_groups: int | None = None,
        activation: str = "relu",
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        norms: dict[str, Any] = {
            "norm": norm,
            "num_groups": num_groups,
            "eps": eps,
            "momentum": momentum,
            "device": device,
            "dtype": dtype,
        }
        super().__init__(
            in_channels, out_channels, stride=stride, activation=activation, bias=bias, **norms
        )
        self.downsample = nn.Sequential(
            nn.Conv2d(
                in_channels, out_channels, 1, stride=stride, bias=False, device=device, dtype=dtype
            ),
            make_norm(channels=out_channels, **norms),
        )

    def _plain(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(self._act(self.norm1(x)))
        return shortcut + self._branch(x)

    def _chainable(self, x: Tensor) -> bool:
        parts = _fusion.shortcut_parts(self.downsample)
        if parts is None or not super()._chainable(x):
            return False
        conv, norm = parts
        return _fusion.chainable([norm], [conv])

    def _add_to(self, chain: Builder) -> None:
        rows = (_row((0.0,), (1.0,), 1.0),)
        chain.add(*self._modules_of_chain(), rows, shortcut=self.downsample)

    def _piecewise(self, x: Tensor) -> Tensor:
        _, z = self._first([x], updates=2)
        shortcut = _fusion.shortcut(self.downsample, z)
        branch, bias = self._slope(z)
        return _fusion.combine([shortcut, branch], [1.0, 1.0], bias)

    def extra_repr(self) -> str:
        """Activation."""
        return f"activation={self._activation}"


class SSPStack(nn.Sequential):
    """A chain of blocks (:class:`SSPBlock`, :class:`AdaptiveSSPBlock`, :class:`PreActDownsample`), run in order.

    Blocks that stand side by side are one autograd node: the last stage of one and the first norm of the next are one
    op. Any other module, and a block with hooks, is called as it is, between two chains.

    Attributes:
        recompute: Whether backward computes the convolutions' inputs again (True, less memory) or they are kept.
        blocks_per_node: How many blocks an autograd node has at most; None for no limit. One node hands out the
            gradients of all its parameters at its end; DistributedDataParallel over gloo was as fast either way.
        tile: How many samples go through the blocks together where nothing couples samples (group norm, or batch norm
            in evaluation mode, and no parameter requires a gradient); "cache" for as many as the device's last-level
            cache holds; None for the whole batch at once, which no tile was faster than on the two CPUs tried.
    """

    recompute: bool = True
    blocks_per_node: int | None = None
    tile: int | str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """All modules, one after another."""
        if self.tile != _chain.CACHE:
            _checks.positive_or_none("tile", self.tile)
        _checks.positive_or_none("blocks_per_node", self.blocks_per_node)
        if select(BLOCK_OPS, (x,)) is _REFERENCE:
            return super().forward(x)
        chain: list[_PreActivation] = []
        for module in self:
            joins = isinstance(module, _PreActivation) and module._joins(x)
            if chain and (not joins or len(chain) == self.blocks_per_node):
                x, chain = self._run(chain, x), []
            if joins:
                chain.append(module)
            else:
                x = module(x)
        return self._run(chain, x) if chain else x

    def _run(self, chain: Sequence[_PreActivation], x: Tensor) -> Tensor:
        return _run_chain(chain, x, recompute=self.recompute, tile=self.tile)


def _run_chain(
    blocks: Sequence[_PreActivation],
    x: Tensor,
    *,
    recompute: bool = True,
    tile: int | str | None = None,
) -> Tensor:
    _checks.terms([x], (1.0,))
    chain = Builder(x)
    for block in blocks:
        block._add_to(chain)
    backend = select(BLOCK_OPS, (x,))
    return _chain.run(chain, backend, x, recompute=recompute, tile=tile)


class SSPIntegrator(nn.Module):
    """One step of a scheme around any residual branch; the stages are fused, the branch is called as it is.

    Args:
        residual: F; maps ``[N, C, *]`` to the same shape, and is called once per stage.
        scheme: As in :class:`SSPBlock`.
        step_size: h.

    Raises:
        ValueError: An unknown scheme.
    """

    def __init__(
        self, residual: nn.Module, scheme: str | ShuOsher = "ssp33", *, step_size: float = 1.0
    ) -> None:
        super().__init__()
        self.residual = residual
        self.scheme = schemes.get(scheme)
        self.step_size = step_size

    def forward(self, x: Tensor) -> Tensor:
        """One step from ``x``."""
        stages, slopes = [x], []
        for alpha, beta in zip(self.scheme.alpha, self.scheme.beta, strict=True):
            slopes.append(self.residual(stages[-1]))
            beta = [b * self.step_size for b in beta]
            operands: tuple[list[Tensor], Coefficients, None] = _stage(
                stages, slopes, alpha, beta, None
            )
            stages.append(_fusion.combine(*operands))
        return stages[-1]

    def extra_repr(self) -> str:
        """Scheme and step size."""
        return f"{self.scheme.name}, step_size={self.step_size}"
