"""The command line: `ssp-fused info | train | evaluate`.

Whatever goes wrong ends in one line on stderr and exit code 2 (Ctrl-C: 130).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, _extension, available_backends, data, models, schemes, use_backend
from .adversarial import TrainConfig, evaluate, fit, load_checkpoint, standard_attacks
from .adversarial.config import METHODS, SCHEDULES, checked_device
from .adversarial.run import BEST, EVALUATION_BATCH, LAST
from .nn import NORMS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands behind the program's name; those of the process if None.

    Returns:
        The exit code: 0, 2 after an error, 130 after Ctrl-C.
    """

    def run() -> None:
        options = _parser().parse_args(arguments)
        options.run(options)

    return guarded(run)


def guarded(run: Callable[[], None]) -> int:
    """Call `run`; an error becomes one line on stderr. Returns the exit code, as `main` does."""
    try:
        run()
    except KeyboardInterrupt:
        print("ssp-fused: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a command line shows no traceback
        print(f"ssp-fused: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if not text:
        return type(error).__name__
    line = " ".join(text.split("\n")[0].split())
    expected = isinstance(error, (ValueError, OSError, RuntimeError, ArithmeticError, ImportError))
    return line if expected else f"{type(error).__name__}: {line}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _number(text: str) -> float:
    """A float; fractions like 8/255 too."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        return float(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ssp-fused", description="Robust training of SSP networks.")
    parser.add_argument("--version", action="version", version=f"ssp-fused {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    info = commands.add_parser("info", help="versions, backends, how the binaries were built")
    info.set_defaults(run=_info)

    # Only what was given reaches TrainConfig, which has the defaults.
    train = commands.add_parser("train", help="train a network", argument_default=argparse.SUPPRESS)
    train.set_defaults(run=_train)
    add = train.add_argument
    add("--data", help=f"{', '.join(data.names())} (default: digits)")
    add("--data-dir", metavar="DIR", help="folder of the data's files")
    add(
        "--model",
        "--scheme",
        help=f"a published network ({', '.join(models.PUBLISHED_SCHEMES)}; default: ssp2), a "
        f"scheme ({', '.join((*schemes.names(), models.ADAPTIVE))}), or schemes separated by "
        "commas, one per group of blocks",
    )
    add("--blocks", type=int, help="SSP blocks per group (default: by data set)")
    add("--width", type=int, help="channels of the first group (default: by data set)")
    add("--norm", help=f"{', '.join(NORMS)} (default: batch)")
    add("--method", help=f"{', '.join(METHODS)} (default: pgd)")
    add("--eps", type=_number, help="radius of the l-infinity attack, pixels in [0, 1]")
    add("--step-size", type=_number, help="length of an attack step")
    add("--steps", type=int, help="attack steps")
    add("--epochs", type=int, help="passes over the training images (default: 10)")
    add("--batch-size", type=int, help="images per step (default: 128)")
    add("--lr", type=_number, help="largest learning rate (default: 0.1)")
    add("--schedule", help=f"{', '.join(SCHEDULES)} (default: cosine)")
    add("--seed", type=int, help="of initialization, order and attacks (default: 0)")
    add("--limit", type=int, metavar="N", help="train on N images only")
    add("--out", metavar="DIR", help="run folder (default: runs/DATA-MODEL-METHOD-seedSEED)")
    _add_place(train)

    evaluation = commands.add_parser(
        "evaluate", help="accuracy of a run on test images: clean, FGSM, PGD-20"
    )
    evaluation.set_defaults(run=_evaluate)
    add = evaluation.add_argument
    add("run_dir", metavar="RUN_DIR", type=Path)
    add("--last", action="store_true", help="the last epoch, not the best on validation")
    add("--data-dir", metavar="DIR", help="folder of the data's files (default: the run's)")
    add("--eps", type=_number, help="radius of the attacks (default: the run's)")
    add("--step-size", type=_number, help="length of a PGD step (default: the run's)")
    add("--batch-size", type=int, default=EVALUATION_BATCH)
    add("--seed", type=int, default=0, help="of PGD's random start")
    add("--limit", type=int, metavar="N", help="the first N test images only")
    add("--json", action="store_true", help="print JSON instead of a table")
    _add_place(evaluation)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    names = ("auto", *available_backends())
    parser.add_argument("--backend", choices=names, help="implementation of the layers")


def _train(options: argparse.Namespace) -> None:
    values = {name: value for name, value in vars(options).items() if name != "run"}
    config = TrainConfig(**values).resolved()
    print(
        f"{config.model} on {config.data}, {config.blocks} blocks of width {config.width} per "
        f"group; {_method(config)}; {config.device}; {config.out}",
        flush=True,
    )
    result = fit(config)
    best = result["best"]
    robust = f", robust {best['val_robust']:.1%}" if "val_robust" in best else ""
    print(f"best epoch {best['epoch']}: validation clean {best['val_clean']:.1%}{robust}")
    print(f"test accuracy: ssp-fused evaluate {config.out}")


def _method(config: TrainConfig) -> str:
    if config.method == "none":
        return "clean training"
    return f"PGD-{config.steps} training, eps {config.eps:.4g}, step {config.step_size:.4g}"


def _evaluate(options: argparse.Namespace) -> None:
    device = checked_device(options.device)
    checkpoint = options.run_dir / (LAST if options.last else BEST)
    model, config, state = load_checkpoint(checkpoint, device)
    eps = config.eps if options.eps is None else options.eps
    step_size = config.step_size if options.step_size is None else options.step_size
    for name in ("batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    test = data.load(config.data, options.data_dir or config.data_dir).test
    if options.limit is not None:
        test = test.take(options.limit)
    generator = torch.Generator(device).manual_seed(options.seed)
    backend = options.backend or config.backend
    with use_backend(backend) if backend else nullcontext():
        accuracy = evaluate(
            model,
            test.to(device).batches(options.batch_size),
            standard_attacks(eps=eps, step_size=step_size, generator=generator),
        )
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "epoch": state["epoch"],
        "data": config.data,
        "images": len(test),
        "eps": eps,
        "step_size": step_size,
        "accuracy": accuracy,
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{checkpoint}, epoch {state['epoch']}: {len(test)} test images of {config.data}")
    print(f"l-infinity attacks, eps {eps:.4g}; PGD-20 with step {step_size:.4g}, random start")
    print(f"{'clean':>8}{'FGSM':>8}{'PGD-20':>8}")
    print("".join(f"{accuracy[name]:>8.1%}" for name in ("clean", "fgsm", "pgd20")))


def _info(_: argparse.Namespace) -> None:
    print(f"ssp-fused {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"system: {platform.platform()}, {torch.get_num_threads()} threads of torch")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        print(f"GPU {index}: {properties.name}, {memory:.0f} GiB, capability {capability}")
    if not torch.cuda.is_available():
        cuda = torch.version.cuda or "none in this build of torch"
        print(f"GPU: none visible (CUDA: {cuda})")
    print("backends:")
    for name, reason in available_backends().items():
        print(f"  {name:<10} {reason or 'usable'}")
    print(f"instruction set of the CPU kernels: {_extension.cpu_isa() or 'none'}")
    print("build:")
    for name, value in _extension.build_info().items():
        if name != "left_out":
            print(f"  {name:<10} {_plain(value)}")
    for name, reason in _extension.build_info()["left_out"].items():
        print(f"  left out: {name}: {reason}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
