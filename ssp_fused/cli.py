"""The command line: `ssp-fused info | train | evaluate | growth | curve | history | convert | reproduce`.

Whatever goes wrong ends in one line on stderr and exit code 2 (Ctrl-C: 130). On several GPUs or
machines: `torchrun ... -m ssp_fused.cli train ...` (and `evaluate`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
    checkpoint_curve,
    checkpoint_growth,
    convert_checkpoint,
    evaluate_checkpoint,
    fit,
    reproduce,
    resume,
    run_history,
)
from .adversarial.comparison_figure import FIGURE, draw_comparison
from .adversarial.comparison_table import markdown
from .adversarial.devices import checked_device
from .adversarial.distributed import Ranks, joined
from .adversarial.figures import (
    Panel,
    check_figure,
    curve_panels,
    draw_panels,
    growth_panels,
    history_panels,
    run_labels,
)
from .adversarial.files import check_writable, write_json
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
    given = {n: v for n, v in vars(options).items() if n in ("transfer", "masking_images")}
    with joined(getattr(options, "device", None)) as ranks:
        report = evaluate_checkpoint(
            options.checkpoint, options.attack, _settings(options), **given
        )
    if not ranks.is_first or _deliver(report, out, options):
        return
    print(f"{_subject(report)}: {report['images']} test images of {report['data']}")
    print(_attack_line(report))
    print(f"{'':<24}{'accuracy':>9}   95% interval")
    for name, share in report["accuracy"].items():
        low, high = report["confidence_95"][name]
        served = report["attacks"].get(name)
        by = f"   {served['library']} {served['version']}" if served else ""
        print(f"{name:<24}{share:>9.1%}   {low:.1%} to {high:.1%}{by}")
    for name, served in report["attacks"].items():
        for message, count in served["warnings"].items():
            print(f"{name} warned {count}x: {message}")
    for name, pairs in (report["transfer"] or {}).items():
        for pair, share in pairs["accuracy"].items():
            print(f"{name}: {pair} {share:.1%}, {pairs['differs'][pair]} images differ")
    if report["masking"] is not None:
        _show_masking(report["masking"])


def _show_masking(masking: dict[str, Any]) -> None:
    found = "signs of it" if masking["suspicious"] else "no sign"
    print(f"gradient masking: {found} on {masking['images']} images")
    for name, check in masking["checks"].items():
        print(f"  {name:<12} {check['verdict']:<11} {check['seen']}")


def _growth(options: argparse.Namespace) -> None:
    measure = partial(
        checkpoint_growth,
        attack=options.attack,
        settings=_settings(options),
        lipschitz="lipschitz" in options,
    )
    for label, report in _reported(options, measure, growth_panels):
        print(f"{label}: {_subject(report)}, {report['images']} test images of {report['data']}")
        print(f"{report['attack']}; {_attack_line(report)}")
        _print_growth(report)


def _print_growth(report: dict[str, Any]) -> None:
    norms = report.get("jacobian_norms")
    columns = ["p = 1", "p = 2", "max, 1", "max, 2", *(["|J|", "max |J|"] if norms else [])]
    print(f"{'group':<10}" + "".join(f"{column:>9}" for column in columns))
    for name, values in report["growth"].items():
        numbers = [values["l1"], values["l2"]]
        numbers += [values["quantiles"][p]["max"] for p in ("l1", "l2")]
        numbers += [norms[name][mark] for mark in ("median", "max")] if norms else []
        print(f"{name:<10}" + "".join(f"{number:>9.3f}" for number in numbers))


def _curve(options: argparse.Namespace) -> None:
    measure = partial(
        checkpoint_curve,
        radii=options.radii,
        attack=options.attack,
        settings=_settings(options),
    )
    for label, report in _reported(options, measure, curve_panels):
        print(f"{label}: {_subject(report)}, {report['images']} test images of {report['data']}")
        print(
            f"{report['attack']}, {report['norm']}, seed {report['seed']}; {report['device']}, "
            f"backend {report['backend']}"
        )
        print(f"{'eps':<10}{'accuracy':>9}")
        for point in report["points"]:
            print(f"{point['eps']:<10.4g}{point['accuracy']:>9.1%}")


def _history(options: argparse.Namespace) -> None:
    for label, report in _reported(options, run_history, history_panels):
        print(f"{label}: {report['metrics']}")
        print(f"{'epoch':>5}{'lr':>10}{'loss':>8}{'train':>8}{'clean':>8}{'robust':>8}")
        for epoch in report["epochs"]:
            shares = [epoch["train_accuracy"], epoch["val_clean"]]
            shares += [epoch["val_robust"]] if "val_robust" in epoch else []
            print(
                f"{epoch['epoch']:>5}{epoch['lr']:>10.3g}{epoch['train_loss']:>8.3f}"
                + "".join(f"{share:>8.1%}" for share in shares)
            )


def _reported(
    options: argparse.Namespace,
    measure: Callable[[Path], dict[str, Any]],
    panels: Callable[[Sequence[dict[str, Any]]], list[Panel]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure each run, draw and write what was asked for; what is to be printed, by label."""
    out = _checked_out(options)
    figure = getattr(options, "figure", None)
    if figure is not None:
        check_writable(figure, "--figure")
        check_figure(figure)
    reports = [measure(path) for path in options.runs]
    if figure is not None:
        draw_panels(figure, panels(reports))
    if not _deliver({"runs": reports}, out, options):
        yield from zip(run_labels(reports), reports, strict=True)


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
    "curve": _curve,
    "history": _history,
    "convert": _convert,
    "reproduce": _reproduce,
}

if __name__ == "__main__":
    sys.exit(main())
