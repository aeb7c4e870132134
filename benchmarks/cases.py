"""Cases of the block benchmarks: what is computed, on which values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssp_fused import schemes
from tests.accuracy import lay_out

from . import traffic
from .plain import plain_stack

TRAIN, INPUT_GRADIENT = "train", "input-gradient"
DIRECTIONS = (TRAIN, INPUT_GRADIENT)
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
LAYOUTS = {CONTIGUOUS: "planes", CHANNELS_LAST: "rows"}
LAYOUT_OF = {name: layout for layout, name in LAYOUTS.items()}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A chain of blocks and one step through it.

    Attributes:
        shape: ``[N, C, H, W]`` of input and output.
        dtype: A key of :data:`DTYPES`.
        layout: A key of :data:`LAYOUTS`.
        direction: "train": forward, and gradients of the input and all parameters, with batch statistics.
            "input-gradient": the input's alone, parameters frozen, running statistics, as an attack does.
    """

    scheme: str
    shape: tuple[int, int, int, int]
    blocks: int
    dtype: str
    layout: str
    direction: str
    device: torch.device

    @property
    def name(self) -> str:
        """All but the direction and the device, which have columns of their own."""
        shape = "x".join(map(str, self.shape))
        return f"{self.scheme} x{self.blocks} {shape} {self.dtype} {self.layout}"

    @property
    def training(self) -> bool:
        return self.direction == TRAIN

    @property
    def activations(self) -> int:
        """How many activation functions a forward pass applies."""
        return 2 * schemes.get(self.scheme).stages * self.blocks

    def logical_bytes(self) -> int:
        """Of everything but the convolutions (``traffic``)."""
        elements = torch.Size(self.shape).numel()
        itemsize = DTYPES[self.dtype].itemsize
        formula = traffic.train_step if self.training else traffic.input_gradient_step
        sizes = traffic.Traffic(elements * itemsize, itemsize)
        return formula(schemes.get(self.scheme), self.blocks, sizes)

    def inputs(self, seed: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
        """x (requiring a gradient) and the gradient of the output; the same values for one seed."""
        generator = torch.Generator().manual_seed(seed)
        values = (torch.randn(self.shape, generator=generator) for _ in range(2))
        x, dy = (
            lay_out(v.to(DTYPES[self.dtype]).to(self.device, dtype), LAYOUTS[layout])
            for v in values
        )
        return x.requires_grad_(), dy

    def state(self, seed: int, *, away_from_kinks: bool = False) -> State:
        """Values of parameters and buffers, in the case's dtype.

        Args:
            seed: Of the values.
            away_from_kinks: Norms with scales so small, and shifts so large, that no activation's input is near zero:
                every run has the same signs, and contenders that do not tell theirs can be judged.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = plain_stack(self.shape[1], self.scheme, self.blocks)
            for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
                if away_from_kinks:
                    nn.init.constant_(norm.weight, 0.03)
                    norm.bias.data = 2 * torch.randint(2, norm.bias.shape).float() - 1
                else:
                    nn.init.uniform_(norm.weight, 0.5, 1.5)
                    nn.init.normal_(norm.bias, std=0.1)
                    nn.init.normal_(norm.running_mean, std=0.1)
                    nn.init.uniform_(norm.running_var, 0.5, 1.5)
        return network.to(DTYPES[self.dtype]).state_dict()

    def prepare(self, network: nn.Module, state: State) -> nn.Module:
        """Load the values, and set modes and which gradients are wanted.

        Raises:
            RuntimeError: A parameter of the network is not in ``state``.
        """
        missing = network.load_state_dict(state, strict=False).missing_keys
        absent = [name for name, _ in network.named_parameters() if name in missing]
        if absent:
            raise RuntimeError(f"parameters must be those of a plain stack, got {absent}")
        return network.train(self.training).requires_grad_(self.training)
