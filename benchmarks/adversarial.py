"""A step of PGD adversarial training of the CIFAR network: `python -m benchmarks.adversarial [--quick] [--out DIR]`.

Contenders: "published", the loop of the published code (plain layers, weight gradients in the attack, training mode);
"eager", plain layers, input gradients only, evaluation mode; the same under torch.compile; the fused layers with the
package's own loss. Peak memory is that of a PGD-10 step on a CPU, of the timed step on a GPU. Writes adversarial.csv
into the folder, prints a table and images per second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

import ssp_fused
from ssp_fused.adversarial.ascent import attack_mode
from ssp_fused.models import sspnet_cifar
from tests import accuracy

from . import arguments, results
from .cases import CHANNELS_LAST, CONTIGUOUS, LAYOUT_OF, LAYOUTS
from .harness import CannotRunError, Contender, Task, Work
from .memory import Kept, kept_for_backward
from .peak import peak_cpu_bytes
from .results import CONTROL, EAGER
from .training_steps import (
    Attack,
    PlainNet,
    Trainer,
    frozen_loss,
    fused_loss,
    published_loss,
)

PUBLISHED = "published"
_COMPILED = {"compile-default": None, "compile-reduce-overhead": "reduce-overhead"}
_FUSED = {"fused-cpu": "cpu", "fused-triton": "cuda", "fused-cuda": "cuda"}
_GRAPH = "-graph"
NAMES = (
    PUBLISHED,
    EAGER,
    CONTROL,
    *_COMPILED,
    *_FUSED,
    *(f"{name}{_GRAPH}" for name, device in _FUSED.items() if device == "cuda"),
)
# Steps take seconds on a CPU: with these, the command takes minutes.
REPEATS, WARMUP = 10, 1
MEMORY_STEPS = 10
_AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A step of training that all contenders take, from the same weights and images."""

    scheme: str
    blocks: int
    batch: int
    side: int
    layout: str
    amp: str
    device: torch.device
    attack: Attack

    @property
    def name(self) -> str:
        shape = f"{self.batch}x3x{self.side}x{self.side}"
        return f"{self.scheme} x{self.blocks} {shape} amp-{self.amp} {self.layout}"

    def inputs(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(self.batch, 3, self.side, self.side, generator=generator)
        y = torch.randint(10, (self.batch,), generator=generator)
        return self.placed(x), y.to(self.device)

    def placed(self, value: Tensor | nn.Module) -> Tensor | nn.Module:
        channels_last = self.layout == CHANNELS_LAST
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return value.to(self.device, memory_format=layout)

    def network(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The network with the values of all contenders."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            values = sspnet_cifar(self.scheme, self.blocks).state_dict()
        network = build()
        network.load_state_dict(values)
        return self.placed(network)

    def plain(self) -> nn.Module:
        return self.network(lambda: PlainNet(self.scheme, self.blocks))

    def fused(self) -> nn.Module:
        return self.network(lambda: sspnet_cifar(self.scheme, self.blocks))


class Judge:
    """Two checks: logits in both modes against fp64, and on CPUs a whole step in fp64."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._plain = cache(self._logits_of_plain)

    def logits(self, network: nn.Module, around: Callable[[], AbstractContextManager]) -> str:
        """At the batch that is timed, by the tests' rule of accuracy."""

        def contender(seed: int) -> accuracy.Values:
            with around(), self._autocast():
                return _logits(network, self._case.inputs(seed)[0])

        accuracy.check(
            contender,
            lambda seed, layout: self._plain(seed, torch.float32, LAYOUT_OF[layout]),
            lambda seed, _: self._plain(seed, torch.float64, CONTIGUOUS),
            "logits",
        )
        return "logits"

    def _logits_of_plain(self, seed: int, dtype: torch.dtype, layout: str) -> accuracy.Values:
        case = replace(self._case, layout=layout)
        network = case.plain().to(dtype)
        x = case.inputs(seed)[0].to(dtype)
        with self._autocast() if dtype == torch.float32 else nullcontext():
            return _logits(network, x)

    def _autocast(self) -> AbstractContextManager:
        dtype = _AMP[self._case.amp]
        return torch.autocast(self._case.device.type, dtype, enabled=dtype is not None)

    def step(self, trainer: Trainer, bn_mode: str) -> str:
        """Gradients and running statistics of a step on a few images, against plain layers under ``pgd_loss``."""
        small = replace(self._case, batch=4)
        x, y = small.inputs(0)

        def loss(network: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
            settings = {"eps": attack.eps, "step_size": attack.step_size, "steps": attack.steps}
            network.train()
            return ssp_fused.adversarial.pgd_loss(network, x, y, **settings, bn_mode=bn_mode).loss

        truth = Trainer(small.plain().double(), loss)
        for each in (truth, trainer):
            torch.manual_seed(0)
            with ssp_fused.use_backend("auto"):
                each(x.double(), y, self._case.attack)
        torch.testing.assert_close(_outcome(trainer.network), _outcome(truth.network))
        return "logits, fp64 step"


def _outcome(network: nn.Module) -> dict[str, Tensor]:
    gradients = {f"d {name}": p.grad for name, p in network.named_parameters()}
    return gradients | dict(network.named_buffers())


def _logits(network: nn.Module, x: Tensor) -> accuracy.Values:
    """In both modes; running statistics stay what they were."""
    found = {}
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with torch.no_grad():
        for mode in (False, True):
            logits = network.train(mode)(x)
            found["train" if mode else "eval"] = logits.clone()
        for buffer, value in before:
            buffer.copy_(value)
    return found


def contenders(case: Case, names: Sequence[str], *, compiling: bool) -> list[Contender]:
    """Those of a case, by name."""
    if compiling and not _COMPILED.keys().isdisjoint(names):
        torch._dynamo.reset()
    judge = Judge(case)
    return [Contender(name, partial(_build, name, case, judge, compiling)) for name in names]


def _build(name: str, case: Case, judge: Judge, compiling: bool) -> Work:
    amp = _AMP[case.amp]
    if name in _COMPILED:
        mode = _COMPILED[name]
        if not compiling:
            raise CannotRunError("torch.compile was left out")
        if mode is not None and case.device.type != "cuda":
            raise CannotRunError(f"mode {mode!r} needs a cuda device, got {case.device}")
        network = case.plain()
        network.compile(mode=mode)
        trainer = Trainer(network, frozen_loss, amp)
        return _work(case, trainer, partial(judge.logits, network, nullcontext), nullcontext)
    backend = name.removesuffix(_GRAPH).removeprefix("fused-")
    around: Callable[[], AbstractContextManager] = nullcontext
    loss, build, bn_mode = frozen_loss, case.plain, "eval"
    if name == PUBLISHED:
        loss, bn_mode = published_loss, "train"
    elif name.removesuffix(_GRAPH) in _FUSED:
        reason = ssp_fused.available_backends()[backend]
        if reason is not None:
            raise CannotRunError(reason)
        if _FUSED[name.removesuffix(_GRAPH)] != case.device.type:
            raise CannotRunError(f"it serves another device, got {case.device}")
        loss, build = partial(fused_loss, graph=name.endswith(_GRAPH)), case.fused
        around = partial(ssp_fused.use_backend, backend)
    network = build()

    def check() -> str:
        how = judge.logits(network, around)
        on_cpu = case.device.type == "cpu"
        return judge.step(Trainer(build().double(), loss), bn_mode) if on_cpu else how

    return _work(case, Trainer(network, loss, amp), check, around, frozen=name != PUBLISHED)


def _work(
    case: Case,
    trainer: Trainer,
    check: Callable[[], str],
    around: Callable[[], AbstractContextManager],
    *,
    frozen: bool = True,
) -> Work:
    def run(x: Tensor, y: Tensor, attack: Attack = case.attack) -> None:
        with around():
            trainer(x, y, attack)

    def kept() -> Kept:
        """In a step of the attack."""
        network = trainer.network
        x = case.inputs(0)[0].requires_grad_()
        mode = attack_mode(network, "eval") if frozen else nullcontext(network.train())
        owners = [*network.parameters(), *network.buffers()]
        with around(), mode:
            return kept_for_backward(lambda: network(x), owners, [x])

    def peak() -> int:
        longer = replace(case.attack, steps=MEMORY_STEPS)
        inputs = case.inputs(0)
        run(*inputs, replace(case.attack, steps=1))
        return peak_cpu_bytes(lambda: run(*inputs, longer))

    return Work(run, case.inputs, check, kept, peak if case.device.type == "cpu" else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 2 after a wrong contender, else 0.

    Args:
        argv: What stands behind the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adversarial", description=__doc__.splitlines()[0]
    )
    arguments.add_shared(parser, NAMES, least=REPEATS)
    parser.add_argument("--scheme", default="ssp22", choices=ssp_fused.schemes.names())
    parser.add_argument("--blocks", type=arguments.positive, default=2, help="in each group")
    parser.add_argument("--batch-size", type=arguments.positive, help="default: 128")
    parser.add_argument("--steps", type=arguments.positive, default=7, help="of the attack")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[CONTIGUOUS])
    parser.add_argument("--amp", choices=_AMP, default="none", help="autocast; default: none")
    options = parser.parse_args(argv)
    code = arguments.run(
        "adversarial", parser, options, _tasks(options), least=REPEATS, warmup=WARMUP, loops=True
    )
    if not options.compare:
        print("\n".join(_images_per_second(options)))
    return code


def _tasks(options: argparse.Namespace) -> Iterator[Task]:
    attack = Attack(steps=2 if options.quick else options.steps)
    batch = options.batch_size or (4 if options.quick else 128)
    for layout in options.layouts:
        case = Case(
            scheme=options.scheme,
            blocks=1 if options.quick else options.blocks,
            batch=batch,
            side=16 if options.quick else 32,
            layout=layout,
            amp=options.amp,
            device=torch.device(options.device),
            attack=attack,
        )
        yield Task(
            benchmark="adversarial",
            case=case.name,
            direction=f"pgd-{attack.steps} training",
            device=case.device,
            bytes=None,
            contenders=contenders(case, options.contenders, compiling=not options.quick),
        )


def _images_per_second(options: argparse.Namespace) -> Iterator[str]:
    """A line per contender that was timed: speed, and that over the published loop's."""
    rows = [row for row, _ in results.read(options.out / "adversarial.csv")]
    published = {row.group: row for row in rows if row.contender == PUBLISHED}
    for row in rows:
        if row.median_ms is None:
            continue
        images = int(row.case.split()[2].split("x")[0])
        line = f"{row.case}: {row.contender}: {1e3 * images / row.median_ms:.1f} images/s"
        base = published.get(row.group)
        if base is not None and base.median_ms:
            line += f", {base.median_ms / row.median_ms:.2f} times {PUBLISHED}"
        if row.peak_bytes is not None:
            line += f"; peak of memory {row.peak_bytes / 2**20:.0f} MiB"
        yield line


if __name__ == "__main__":
    raise SystemExit(main())
