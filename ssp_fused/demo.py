"""A first look: `python -m ssp_fused.demo [--out DIR]`.

Adversarially trains two SSP networks and their ResNet twin on the embedded digits, compares their
test accuracy under attack, and times the fused layers against the reference ones. A few minutes
on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import available_backends, cli, data, models, use_backend
from ._allocator import keep_freed_memory
from .adversarial import TrainConfig, evaluate, fgsm, fit, load_checkpoint, pgd
from .adversarial.checkpoint import BEST, LAST
from .adversarial.devices import checked_device
from .adversarial.figures import Panel, check_figure, draw_panels
from .adversarial.run import CONFIG, EVALUATION_BATCH, METRICS

RESULTS = "demo.json"
NETWORKS = {"res": "ResNet twin", "ssp2": "SSP-2", "ssp3": "SSP-3"}
EVALUATIONS_OF_F = {"res": 1, "ssp2": 2, "ssp3": 3}

EPS = 0.15
EPS_CURVE = (0.05, 0.10, 0.15, 0.20)
# Of PGD-20: long enough to cross the ball several times.
_STEP_PER_EPS = 0.04 / 0.15

_SPEED_IMAGE = (3, 32, 32)
_SPEED_BATCH = 32
_SPEED_REPEATS = 7


def train_networks(out: Path, epochs: int, device: str) -> dict[str, list[dict[str, Any]]]:
    """PGD-train each network into its own run folder.

    Returns:
        The metrics of every epoch, by network.
    """
    history = {}
    for name, title in NETWORKS.items():
        print(f"\n{title} ({EVALUATIONS_OF_F[name]} evaluations of F per block)", flush=True)
        folder = out / name
        for file in (CONFIG, METRICS, BEST, LAST):
            (folder / file).unlink(missing_ok=True)
        config = TrainConfig(
            data="digits",
            model=name,
            blocks=1,
            eps=EPS,
            epochs=epochs,
            batch_size=64,
            schedule="onecycle",
            device=device,
            out=str(folder),
        )
        history[name] = fit(config)["epochs"]
    return history


def test_accuracy(out: Path, device: str) -> dict[str, dict[str, float]]:
    """Test accuracy of each network's best epoch: clean, FGSM at EPS, PGD-20 at each of EPS_CURVE.

    Returns:
        By network, shares under "clean", "fgsm" and "pgd20 EPS" for each eps.
    """
    test = data.load("digits").test.to(device)
    results = {}
    for name in NETWORKS:
        model, _, _ = load_checkpoint(out / name / BEST, device)
        generator = torch.Generator(device).manual_seed(0)
        attacks: dict[str, Any] = {"fgsm": partial(fgsm, eps=EPS)}
        for eps in EPS_CURVE:
            attacks[f"pgd20 {eps}"] = partial(
                pgd, eps=eps, step_size=eps * _STEP_PER_EPS, steps=20, generator=generator
            )
        results[name] = evaluate(model, test.batches(EVALUATION_BATCH), attacks)
    return results


def speed(device: str) -> dict[str, tuple[float, float]]:
    """Images per second of fused and reference layers, on a CIFAR-sized SSP-2 network.

    One training step is forward, backward and an SGD update; one attack step is forward, input
    gradient and the PGD step. Medians of repeats in alternating order.

    Returns:
        By kind of step: images per second of "auto" and of "reference".
    """
    torch.manual_seed(0)
    model = models.sspnet_cifar("ssp22", 2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x = torch.rand(_SPEED_BATCH, *_SPEED_IMAGE, device=device)
    y = torch.randint(10, (_SPEED_BATCH,), device=device)

    def training_step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def attack_step() -> Tensor:
        return pgd(model, x, y, eps=8 / 255, step_size=2 / 255, steps=1)

    return {
        "training step": _compare(training_step, device),
        "attack step": _compare(attack_step, device),
    }


def _compare(step: Callable[[], Any], device: str) -> tuple[float, float]:
    seconds: dict[str, list[float]] = {"auto": [], "reference": []}
    # The first repeat warms up and is not counted.
    for repeat in range(_SPEED_REPEATS + 1):
        names = list(seconds) if repeat % 2 else list(seconds)[::-1]
        for name in names:
            with use_backend(name):
                start = time.perf_counter()
                step()
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize(device)
                elapsed = time.perf_counter() - start
            if repeat:
                seconds[name].append(elapsed)
    fused, reference = (
        _SPEED_BATCH / statistics.median(seconds[name]) for name in ("auto", "reference")
    )
    return fused, reference


def draw(
    path: Path,
    history: dict[str, list[dict[str, Any]]],
    accuracy: dict[str, dict[str, float]],
) -> bool:
    """Write the figure: test accuracy over eps, validation accuracy over epochs.

    Returns:
        False where matplotlib is not installed; nothing is written then.
    """
    try:
        check_figure(path)
    except ImportError:
        return False
    curves, epochs = {}, {}
    for name, title in NETWORKS.items():
        values = accuracy[name]
        shares = [values["clean"], *(values[f"pgd20 {eps}"] for eps in EPS_CURVE)]
        curves[title] = list(zip((0, *EPS_CURVE), (100 * share for share in shares), strict=True))
        epochs[title] = [(epoch["epoch"], 100 * epoch["val_robust"]) for epoch in history[name]]
    radius = "eps (l-infinity, pixels in [0, 1])"
    validation = f"Validation accuracy under PGD-7, eps {EPS}"
    panels = [
        Panel("Test accuracy under PGD-20", radius, "accuracy (%)", curves, top=100),
        Panel(validation, "epoch", "accuracy (%)", epochs, top=100),
    ]
    draw_panels(path, panels)
    return True


def _networks(out: Path, accuracy: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row a network: its name, size and shares of right answers."""
    rows = []
    for name, title in NETWORKS.items():
        model, _, _ = load_checkpoint(out / name / BEST)
        values = accuracy[name]
        rows.append(
            {
                "network": title,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "evaluations": EVALUATIONS_OF_F[name],
                "clean": values["clean"],
                "fgsm": values["fgsm"],
                "pgd20": values[f"pgd20 {EPS}"],
            }
        )
    return rows


def _print_accuracy(results: dict[str, Any]) -> None:
    images, error = results["images"], 100 * results["standard_error"]
    print(f"\nTest accuracy on {images} digits, eps {EPS} (l-infinity, pixels in [0, 1])\n")
    print(f"{'network':<14}{'parameters':>11}{'F/block':>9}{'clean':>9}{'FGSM':>9}{'PGD-20':>9}")
    for row in results["networks"]:
        print(
            f"{row['network']:<14}{row['parameters']:>11,}{row['evaluations']:>9}"
            + "".join(f"{row[share]:>9.1%}" for share in ("clean", "fgsm", "pgd20"))
        )
    print(
        f"\nEqual parameters, not equal work: an SSP block evaluates F two or three times. One "
        f"seed, and a\nstandard error of up to {error:.1f} points from {images} images: "
        "the demo shows that everything works and\nwhat is measured, not which network is better."
    )


def _print_speed(found: dict[str, tuple[float, float]], device: str) -> None:
    shape = "x".join(map(str, _SPEED_IMAGE))
    print(
        f"\nImages per second, {shape}, batch {_SPEED_BATCH}, SSP-2 with 2 blocks per group, "
        f"fp32, {device} ({torch.get_num_threads()} threads)\n"
    )
    print(f"{'':<16}{'fused':>9}{'reference':>11}{'ratio':>8}")
    for kind, (fused, reference) in found.items():
        print(f"{kind:<16}{fused:>9.1f}{reference:>11.1f}{fused / reference:>8.2f}")
    print("\nThe convolutions are the same library calls in both; only what lies between differs.")


def _fused_unavailable(device: str) -> str | None:
    """None if some fused backend serves the device, else why none does."""
    names = ("cpu",) if torch.device(device).type == "cpu" else ("cuda", "triton")
    reasons = {name: available_backends()[name] for name in names}
    if None in reasons.values():
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo.

    Args:
        arguments: what stands behind the program's name; those of the process if None.

    Raises:
        ValueError: a bad option.
    """
    parser = argparse.ArgumentParser(prog="python -m ssp_fused.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--epochs", type=int, default=6, help="default: 6")
    parser.add_argument("--device", help="default: a GPU if there is one")
    options = parser.parse_args(arguments)
    device = checked_device(options.device)
    keep_freed_memory()
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    history = train_networks(options.out, options.epochs, device)
    accuracy = test_accuracy(options.out, device)
    images = len(data.load("digits").test)
    results = {
        "images": images,
        "eps": EPS,
        "standard_error": (0.25 / images) ** 0.5,  # the largest, of a share of one half
        "networks": _networks(options.out, accuracy),
        "batch": _SPEED_BATCH,
        "repeats": _SPEED_REPEATS,
        "images_per_second": {},
    }
    _print_accuracy(results)
    reason = _fused_unavailable(device)
    if reason is None:
        results["images_per_second"] = speed(device)
        _print_speed(results["images_per_second"], device)
    else:
        print(f"\nNo fused layers to time: {reason}")
    (options.out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    figure = options.out / "demo.png"
    if draw(figure, history, accuracy):
        print(f"\nFigure: {figure}")
    else:
        print("\nNo figure: matplotlib is not installed (pip install matplotlib)")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
