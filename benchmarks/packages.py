"""Plain stacks whose norms are another package's fused ones, for a machine that has the package.

The packages are imported when a stack is built; what they compute is checked like every contender's.
"""

from __future__ import annotations

from torch import Tensor, nn

from .plain import plain_stack


def apex_stack(channels: int, scheme: str, blocks: int) -> nn.Sequential:
    """Norm and ReLU by apex's ``BatchNorm2d_NHWC`` (channels-last, 16 bits)."""
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    class NormAct(BatchNorm2d_NHWC):
        """Takes its tensors as [N, H, W, C]."""

        def forward(self, u: Tensor) -> Tensor:
            return super().forward(u.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    network = plain_stack(channels, scheme, blocks)
    for block in network:
        block.norm1, block.norm2 = (NormAct(channels, fuse_relu=True) for _ in range(2))
        block.act1, block.act2 = nn.Identity(), nn.Identity()
    return network


def inplace_abn_stack(channels: int, scheme: str, blocks: int) -> nn.Sequential:
    """norm2 by inplace_abn's ``InPlaceABN``, which overwrites conv1's output.

    norm1 stays as it is: its input is a stage that others need. InPlaceABN inverts its activation, which ReLU does not
    allow: ReLU follows as a module that does not work in place.
    """
    from inplace_abn import InPlaceABN

    network = plain_stack(channels, scheme, blocks)
    for block in network:
        block.norm2 = InPlaceABN(channels, activation="identity")
        block.act2 = nn.ReLU()
    return network
