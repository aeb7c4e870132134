"""Checkpoints of the published code into ours, and ours into theirs: files, and what is checked.

The published code is github matbambbang/sspnet; its files hold {"state_dict": ..., "args": the command
line's Namespace}.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from .._backends import use_backend
from ..nn import SSPStack
from .ascent import model_mode
from .checkpoint import (
    checkpoint_path,
    load_checkpoint,
    missing_keys,
    read_tensors,
    save_checkpoint,
)
from .defaults import data_defaults
from .devices import chosen_backend
from .files import check_writable
from .networks import NETWORKS, build_network

# Name of the data set in the published code, and here.
DATASETS = {
    "cifar10": "cifar10",
    "mnist": "mnist",
    "fmnist": "fashion-mnist",
    "tinyimagenet": "tiny-imagenet",
}
_DATASET_OF_NETWORK = {"cifar": "cifar10", "mnist": "mnist", "tiny_imagenet": "tinyimagenet"}
_MODELS = {scheme: model for model, scheme in models.PUBLISHED_SCHEMES.items()}
# The published letters of norms.
_NORMS = {"b": ("batch", None), "g": ("group", None), "l": ("group", 1), "i": ("instance", None)}
_BATCH = 8
# Of the largest logit; far above rounding in fp32, far below what a wrong coefficient does.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class PublishedNetwork:
    """What the tensors of a published checkpoint do not say; None: what its "args" say, if there.

    Attributes:
        dataset: key of `DATASETS`; "cifar10" if None.
        model: "res", "midrk2", "ssp2", "ssp3", "ark", or one per group, comma-separated; "ssp2" if
            neither given nor in the file.
        norm: "batch", "group" or "instance"; batch or group are read off the tensors if None.
        num_groups: of a group norm; min(32, channels) if None.
    """

    dataset: str | None = None
    model: str | None = None
    norm: str | None = None
    num_groups: int | None = None

    def given(self) -> list[str]:
        """The names of what is given."""
        return [name for name, value in vars(self).items() if value is not None]


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    published: PublishedNetwork | None = None,
    *,
    force: bool = False,
    device: str = "cpu",
    backend: str | None = None,
) -> dict[str, Any]:
    """Write a published checkpoint as one of ours, or one of ours as a published one.

    Which it is, is read off the file. Before anything is written, the tensors are converted back and
    compared bit for bit, and the network's logits under the chosen backend are compared with those
    of plain PyTorch on a random batch.

    Args:
        source: a published checkpoint or its bare state_dict; or a run folder or checkpoint of ours.
        target: the file to write.
        published: of a published source, what its tensors do not say.
        force: replace `target` if it exists.
        device: where to compare logits.
        backend: implementation of the layers to compare.

    Returns:
        "direction", "network" (in words), "normalization" (mean and std inside the network, which
        a published file does not hold), "tensors" (how many), "difference" and "largest_logit".

    Raises:
        FileNotFoundError: no such source, or no folder for the target.
        ValueError: the target exists; the source is damaged or neither of the two; a network without
            counterpart; a check that fails.
    """
    published = published or PublishedNetwork()
    source, target = Path(source), Path(target)
    check_writable(target, "target")
    if target.exists() and not force:
        raise ValueError(f"target: {target} exists (--force replaces it)")
    path = checkpoint_path(source)
    contents = read_tensors(path, allowed=[argparse.Namespace])
    if missing_keys(contents):
        report, state, network = _from_published(path, contents, published)
    else:
        report, state, network = _to_published(path, published)
    report |= _compare_logits(network, report.pop("shape"), device, backend)
    save_checkpoint(target, state)
    return report


def _from_published(
    path: Path, contents: Any, published: PublishedNetwork
) -> tuple[dict[str, Any], dict[str, Any], nn.Module]:
    tensors, published = _read_published(path, contents, published)
    dataset = published.dataset
    try:
        bare = models.from_sspnet(
            tensors,
            dataset=dataset,
            model=_published_model(published.model),
            norm=published.norm,
            num_groups=published.num_groups,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    _check_float32(path, tensors)
    _check_round_trip(tensors, models.to_sspnet(bare))
    data = DATASETS[dataset]
    spec = _spec(bare, data_defaults(data).network, dataset, published)
    network = build_network(spec)
    network.load_state_dict(bare.state_dict())
    state = {
        "model": network.state_dict(),
        "network": spec,
        "config": _config(spec, data, published.model),
        "epoch": None,
        "metrics": {},
        "converted_from": path.name,
    }
    report = {
        "direction": "published to ssp_fused",
        "network": f"{dataset} {published.model}, {spec['arguments']['norm']} norm",
        "normalization": models.PUBLISHED_NORMALIZATION[dataset],
        "tensors": len(tensors),
        "shape": _image_shape(spec, data, None),
    }
    return report, state, network


def _to_published(
    path: Path, published: PublishedNetwork
) -> tuple[dict[str, Any], dict[str, Any], nn.Module]:
    if published.given():
        raise ValueError(
            f"{', '.join(published.given())} must be left out: {path} is a checkpoint of ssp_fused "
            "and says what it is"
        )
    network, config, state = load_checkpoint(path)
    spec = state["network"]
    arguments = spec["arguments"]
    dataset = _DATASET_OF_NETWORK[spec["network"]]
    tensors = models.to_sspnet(network)
    names = [_MODELS[scheme] for scheme in arguments["scheme"]]
    again = models.from_sspnet(
        tensors,
        dataset=dataset,
        model=names,
        norm=arguments["norm"],
        num_groups=arguments.get("num_groups"),
    )
    _check_round_trip(network.state_dict(), again.state_dict())
    report = {
        "direction": "ssp_fused to published",
        "network": f"{dataset} {'+'.join(names)}, {arguments['norm']} norm",
        "normalization": (arguments["mean"], arguments["std"]),
        "tensors": len(tensors),
        "shape": _image_shape(spec, config.data, config.image_size),
    }
    return report, {"state_dict": tensors}, network


def _read_published(
    path: Path, contents: Any, published: PublishedNetwork
) -> tuple[dict[str, Tensor], PublishedNetwork]:
    """The tensors of a published file, and what it says or is said of it."""
    tensors = contents
    stated: dict[str, Any] = {}
    if isinstance(contents, Mapping) and "state_dict" in contents:
        tensors = contents["state_dict"]
        stated = _stated(contents.get("args"))
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{path}: neither a published checkpoint nor one of ssp_fused")
    for name, value in stated.items():
        if getattr(published, name) not in (None, value):
            raise ValueError(
                f"{name} must be as in {path}, which says {value!r}; got "
                f"{getattr(published, name)!r}"
            )
    published = replace(published, **stated)
    return dict(tensors), replace(
        published, dataset=published.dataset or "cifar10", model=published.model or "ssp2"
    )


def _stated(arguments: Any) -> dict[str, Any]:
    """What the published command line's arguments say of the network."""
    if not isinstance(arguments, argparse.Namespace):
        return {}
    stated: dict[str, Any] = {}
    model, letter = getattr(arguments, "model", None), getattr(arguments, "norm", None)
    if isinstance(model, str) and model in models.PUBLISHED_SCHEMES:
        stated["model"] = model
    if isinstance(letter, str) and letter in _NORMS:
        stated["norm"], num_groups = _NORMS[letter]
        if num_groups is not None:
            stated["num_groups"] = num_groups
    return stated


def _published_model(name: str) -> str | list[str]:
    return [part.strip() for part in name.split(",")] if "," in name else name


def _spec(
    bare: nn.Module, network: str, dataset: str, published: PublishedNetwork
) -> dict[str, Any]:
    """What `build_network` needs to make the network, with its normalization inside."""
    stack = next(module for module in bare.modules() if isinstance(module, SSPStack))
    first = next(module for module in bare.modules() if isinstance(module, nn.Conv2d))
    last = [module for module in bare.modules() if isinstance(module, nn.Linear)][-1]
    tracked = any(isinstance(module, nn.BatchNorm2d) for module in bare.modules())
    mean, std = models.PUBLISHED_NORMALIZATION[dataset]
    if len(mean) != first.in_channels:
        raise ValueError(
            f"dataset {dataset!r} has images of {len(mean)} channels, the checkpoint's network "
            f"takes {first.in_channels}"
        )
    return {
        "network": network,
        "arguments": {
            "scheme": _schemes(published.model, NETWORKS[network].groups),
            "blocks": len(stack),
            "norm": published.norm or ("batch" if tracked else "group"),
            "num_groups": published.num_groups,
            "width": first.out_channels,
            "num_classes": last.out_features,
            "in_channels": first.in_channels,
            "mean": list(mean),
            "std": list(std),
        },
    }


def _schemes(model: str, groups: int) -> list[str]:
    names = _published_model(model)
    if isinstance(names, str):
        return list(models.resolve_scheme(names, groups))
    return [models.PUBLISHED_SCHEMES[name] for name in names]


def _config(spec: dict[str, Any], data: str, model: str) -> dict[str, Any]:
    """The settings that are known; how the network was trained is not."""
    arguments = spec["arguments"]
    return {
        "data": data,
        "network": spec["network"],
        "model": ",".join(arguments["scheme"]) if "," in model else model,
        "blocks": arguments["blocks"],
        "width": arguments["width"],
        "norm": arguments["norm"],
        "eps": data_defaults(data).eps,
        "step_size": data_defaults(data).step_size,
    }


def _image_shape(spec: dict[str, Any], data: str, image_size: int | None) -> tuple[int, int, int]:
    side = image_size or data_defaults(data).side
    return spec["arguments"]["in_channels"], side, side


def _check_float32(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Images are read in fp32: a network in another type would be another one once converted."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{path}: tensors must be torch.float32, {key!r} is {tensor.dtype}")


def _check_round_trip(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Every tensor must come back with its bits."""
    for key, tensor in expected.items():
        again = found.get(key.removeprefix("module."))
        if again is None or not _same_bits(tensor, again):
            raise ValueError(f"conversion failed: {key!r} does not come back as it was")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    # As bytes: NaN differs from itself, and -0 does not from 0.
    return torch.equal(*(t.cpu().flatten().view(torch.uint8) for t in (one, other)))


def _compare_logits(
    network: nn.Module, shape: tuple[int, int, int], device: str, backend: str | None
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(_BATCH, *shape, generator=generator).to(device)
    network = network.to(device)
    with model_mode(network, training=False), torch.no_grad():
        with chosen_backend(backend):
            logits = network(x)
        with use_backend("reference"):
            expected = network(x)
    difference = float((logits - expected).abs().max())
    largest = float(expected.abs().max())
    # Not "difference > ...": NaN must not pass.
    if not difference <= _TOLERANCE * largest:
        raise ValueError(
            f"conversion failed: the logits differ by {difference:.3g} from plain PyTorch's, whose "
            f"largest is {largest:.3g}"
        )
    return {"difference": difference, "largest_logit": largest}
