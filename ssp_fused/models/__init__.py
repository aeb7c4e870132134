"""Networks built from SSP blocks, and the published ones' state_dicts, in and out."""

from .images import CIFAR_MEAN, CIFAR_STD, MNIST_MEAN, MNIST_STD, Normalize
from .names import ADAPTIVE, PUBLISHED_SCHEMES, Scheme, group_schemes, resolve_scheme
from .networks import (
    SSPNet,
    SSPNetMNIST,
    WideSSPNet,
    sspnet_cifar,
    sspnet_mnist,
    sspnet_tiny_imagenet,
    wide_sspnet,
)
from .published import PUBLISHED_NORMALIZATION, from_sspnet, to_sspnet

__all__ = [
    "ADAPTIVE",
    "CIFAR_MEAN",
    "CIFAR_STD",
    "MNIST_MEAN",
    "MNIST_STD",
    "PUBLISHED_NORMALIZATION",
    "PUBLISHED_SCHEMES",
    "Normalize",
    "SSPNet",
    "SSPNetMNIST",
    "Scheme",
    "WideSSPNet",
    "from_sspnet",
    "group_schemes",
    "resolve_scheme",
    "sspnet_cifar",
    "sspnet_mnist",
    "sspnet_tiny_imagenet",
    "to_sspnet",
    "wide_sspnet",
]
