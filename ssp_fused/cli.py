"""The command line: `ssp-fused info | train | evaluate | growth | convert | reproduce`.

Whatever goes wrong ends in one line on stderr and exit code 2 (Ctrl-C: 130). On several GPUs or
machines: `torchrun ... -m ssp_fused.cli train ...`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, _extension, available_backends
from ._allocator import keep_freed_memory
from ._arguments import make_parser
from .adversarial import (
    Comparison,
    EvaluationSettings,
    PublishedNetwork,
    TrainConfig,
    checkpoint_growth,
    convert_checkpoint,
    evaluate_checkpoint,
    fit,
    reproduce,
    resume,
)
from .adversarial.comparison_figure import FIGURE, draw_comparison
from .adversarial.comparison_table import markdown
from .adversarial.devices import checked_device
from .adversarial.distributed import Ranks, joined
from .adversarial.files import check_writable, write_json
from .adversarial.growth import check_figure, draw_growth, run_labels
from .adversarial.methods import description

_RESUMABLE = ("data_dir", "device", "backend")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands behind the program's name; those of the process if None.

    Returns:
        The exit code: 0, 2 after an error, 130 after Ctrl-C.
    """

    def run() -> None:
        options = make_parser().parse_args(arguments)
        keep_freed_memory()
        _COMMANDS[options.command](options)

    return guarded(run)


def guarded(run: Callable[[], None]) -> int:
    """Call `run`; an error becomes one line on stderr. Returns the exit code, as `main` does."""
    try:
        run()
    except KeyboardInterrupt as interrupt:
        told = filter(None, (f"{_name()}: interrupted", str(interrupt)))
        print(": ".join(told), file=sys.stderr)
        return 130
    except Exception as error:  # a command line shows no traceback
        print(f"{_name()}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _name() -> str:
    """The program, and which of torchrun's processes it is."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return f"ssp-fused (rank {os.environ['RANK']})" if several else "ssp-fused"


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if not text:
        return type(error).__name__
    line = " ".join(text.split("\n")[0].split())
    expected = isinstance(error, (ValueError, OSError, RuntimeError, ArithmeticError, ImportError))
    return line if expected else f"{type(error).__name__}: {line}"


def _train(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if name != "command"}
    with joined(given.get("device")) as ranks:
        result = _resume(given) if "resume" in given else _fit(given, ranks)
    if ranks.is_first:
        _show_result(result)


def _fit(given: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    config = TrainConfig(**given).resolved()
    if ranks.is_first:
        processes = f", {ranks.size} processes" if ranks.size > 1 else ""
        print(
            f"{config.model} on {config.data}, {config.blocks} blocks of width {config.width} per "
            f"group; {description(config)}; {config.device}{processes}; {config.out}",
            flush=True,
        )
    return fit(config)


def _show_result(result: dict[str, Any]) -> None:
    best = result["best"]
    robust = f", robust {best['val_robust']:.1%}" if "val_robust" in best else ""
    print(f"best epoch {best['epoch']}: validation clean {best['val_clean']:.1%}{robust}")
    print(f"test accuracy: ssp-fused evaluate {result['out']}")


def _resume(given: dict[str, Any]) -> dict[str, Any]:
    folder = given.pop("resume")
    foreign = [f"--{name.replace('_', '-')}" for name in given if name not in _RESUMABLE]
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: not with --resume, a run keeps its settings")
    return resume(folder, **given)


def _settings(options: argparse.Namespace) -> EvaluationSettings:
    known = EvaluationSettings.__dataclass_fields__
    return EvaluationSettings(**{k: v for k, v in vars(options).items() if k in known})


def _evaluate(options: argparse.Namespace) -> None:
    out = _checked_out(options)
    report = evaluate_checkpoint(options.checkpoint, options.attack, _settings(options))
    if _deliver(report, out, options):
        return
    accuracy = report["accuracy"]
    print(f"{_subject(report)}: {report['images']} test images of {report['data']}")
    print(_attack_line(report))
    widths = [max(8, len(name) + 2) for name in accuracy]
    print("".join(f"{name:>{width}}" for name, width in zip(accuracy, widths, strict=True)))
    shares = zip(accuracy.values(), widths, strict=True)
    print("".join(f"{share:>{width}.1%}" for share, width in shares))


def _growth(options: argparse.Namespace) -> None:
    out = _checked_out(options)
    figure = getattr(options, "figure", None)
    if figure is not None:
        check_writable(figure, "--figure")
        check_figure(figure)
    settings = _settings(options)
    reports = [checkpoint_growth(path, options.attack, settings) for path in options.checkpoints]
    if figure is not None:
        draw_growth(figure, reports)
    if _deliver({"runs": reports}, out, options):
        return
    for label, report in zip(run_labels(reports), reports, strict=True):
        print(f"{label}: {_subject(report)}, {report['images']} test images of {report['data']}")
        print(f"{report['attack']}; {_attack_line(report)}")
        print(f"{'group':<10}{'p = 1':>9}{'p = 2':>9}")
        for name, values in report["growth"].items():
            print(f"{name:<10}{values['l1']:>9.3f}{values['l2']:>9.3f}")


def _convert(options: argparse.Namespace) -> None:
    known = PublishedNetwork.__dataclass_fields__
    given = vars(options)
    report = convert_checkpoint(
        options.source,
        options.target,
        PublishedNetwork(**{name: value for name, value in given.items() if name in known}),
        force="force" in given,
        device=checked_device(given.get("device")),
        backend=given.get("backend"),
    )
    mean, std = (", ".join(f"{value:.4g}" for value in row) for row in report["normalization"])
    print(f"{report['direction']}: {report['network']}, {report['tensors']} tensors, all come back")
    print(
        f"logits against plain PyTorch's: max|difference| {report['difference']:.3g}, "
        f"max|logit| {report['largest_logit']:.3g}"
    )
    print(f"normalization (not in published files): mean {mean}; std {std}")
    print(f"written: {options.target}")


def _reproduce(options: argparse.Namespace) -> None:
    known = Comparison.__dataclass_fields__
    comparison = Comparison(**{k: v for k, v in vars(options).items() if k in known})
    table = reproduce(comparison, jobs=getattr(options, "jobs", 1))
    print(f"\n{markdown(table)}\nin {comparison.folder}")
    if not table["rows"]:
        return
    try:
        draw_comparison(comparison.folder / FIGURE, table)
    except ImportError as error:
        print(f"no {FIGURE}: {error}")


def _subject(report: dict[str, Any]) -> str:
    text = report["checkpoint"]
    if report["epoch"] is not None:
        text += f", epoch {report['epoch']}"
    if report["batches_after_epoch"]:
        text += f" and {report['batches_after_epoch']} batches"
    return text


def _attack_line(report: dict[str, Any]) -> str:
    return (
        f"{report['norm']} attacks, eps {report['eps']:.4g}, PGD steps of "
        f"{report['step_size']:.4g}, seed {report['seed']}; {report['device']}, backend "
        f"{report['backend']}"
    )


def _checked_out(options: argparse.Namespace) -> Path | None:
    out = getattr(options, "out", None)
    if out is not None:
        check_writable(out, "--out")
    return out


def _deliver(report: dict[str, Any], out: Path | None, options: argparse.Namespace) -> bool:
    """Write the report where it was asked for; whether standard output has had it."""
    if out is not None:
        write_json(out, report)
    as_json = "json" in options
    if as_json:
        print(json.dumps(report, indent=2))
    return as_json


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


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "info": _info,
    "train": _train,
    "evaluate": _evaluate,
    "growth": _growth,
    "convert": _convert,
    "reproduce": _reproduce,
}

if __name__ == "__main__":
    sys.exit(main())
