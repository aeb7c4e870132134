"""Settings of training runs that follow from the data set."""

from __future__ import annotations

from dataclasses import dataclass

from ..data import FOLDER_PREFIX


@dataclass(frozen=True)
class DataDefaults:
    """Settings that follow from the data set where the caller leaves them open.

    Attributes:
        network: key of `NETWORKS`.
        blocks, width: size of the network.
        eps, step_size, steps: the l-infinity training attack, in units of pixels in [0, 1].
        augment: of `ssp_fused.data.AUGMENTATIONS`.
        side: height and width of the images, unless the caller has them resized.
    """

    network: str
    blocks: int
    width: int
    eps: float
    step_size: float
    steps: int
    augment: str
    side: int


def _coloured(network: str, eps: int, step_size: int, steps: int, side: int) -> DataDefaults:
    return DataDefaults(network, 6, 16, eps / 255, step_size / 255, steps, "crop-flip", side)


# eps and step size are the published ones of MNIST, Fashion-MNIST, CIFAR-10 and Tiny ImageNet.
DEFAULTS = {
    "digits": DataDefaults("cifar", 2, 16, 0.15, 0.04, 7, "none", 8),
    "mnist": DataDefaults("mnist", 3, 64, 0.3, 0.05, 7, "none", 28),
    "fashion-mnist": DataDefaults("mnist", 3, 64, 0.1, 0.02, 7, "none", 28),
    "cifar10": _coloured("cifar", 8, 2, 7, side=32),
    "cifar100": _coloured("cifar", 8, 2, 7, side=32),
    "tiny-imagenet": _coloured("tiny_imagenet", 4, 1, 5, side=64),
}
_FOLDER_DEFAULTS = _coloured("cifar", 8, 2, 7, side=32)


def data_defaults(data: str) -> DataDefaults:
    """The defaults of a data set, by its name or as "folder:PATH".

    Raises:
        ValueError: an unknown name.
    """
    if data.startswith(FOLDER_PREFIX):
        return _FOLDER_DEFAULTS
    if data not in DEFAULTS:
        known = ", ".join((*DEFAULTS, f"{FOLDER_PREFIX}PATH"))
        raise ValueError(f"unknown data set {data!r}; known: {known}")
    return DEFAULTS[data]
