"""The blocks: a step of a scheme, SSP-adap's step, and the subsampling block between two groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _fusion, reference, schemes
from .._chain import Builder
from ..schemes import ShuOsher
from .norms import make_norm
from .pre_activation import PreActivation
from .rows import chain_row, stage_operands


class SSPBlock(PreActivation):
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
        tableau = zip(self.scheme.alpha, self.scheme.beta, strict=True)
        rows = tuple(chain_row(alpha, beta, self.step_size) for alpha, beta in tableau)
        chain.add(*self._modules_of_chain(), rows)

    def _piecewise(self, x: Tensor) -> Tensor:
        stages, slopes = [x], []
        bias: Tensor | None = None
        _, z = self._first([x])
        for alpha, beta in zip(self.scheme.alpha, self.scheme.beta, strict=True):
            slope, bias = self._slope(z)
            slopes.append(slope)
            stage = stage_operands(stages, slopes, alpha, beta, self.step_size, bias)
            if len(slopes) == self.scheme.stages:
                return _fusion.combine(*stage)
            u, z = self._first(*stage)
            stages.append(u)
        raise AssertionError("a scheme has at least one stage")

    def extra_repr(self) -> str:
        """Scheme, activation and step size."""
        return f"{self.scheme.name}, activation={self._activation}, step_size={self.step_size}"


class AdaptiveSSPBlock(PreActivation):
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
        rows = (chain_row((1.0,), (1.0,), 1.0), chain_row((1.0, 0.0), (1.0, 1.0), 1.0))
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


class PreActDownsample(PreActivation):
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
        rows = (chain_row((0.0,), (1.0,), 1.0),)
        chain.add(*self._modules_of_chain(), rows, shortcut=self.downsample)

    def _piecewise(self, x: Tensor) -> Tensor:
        _, z = self._first([x], updates=2)
        shortcut = _fusion.shortcut(self.downsample, z)
        branch, bias = self._slope(z)
        return _fusion.combine([shortcut, branch], [1.0, 1.0], bias)

    def extra_repr(self) -> str:
        """Activation."""
        return f"activation={self._activation}"
