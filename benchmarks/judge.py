"""Whether a contender computes what it should: the accuracy rule of the tests, at the very shape that is timed.

Outputs, all gradients and running statistics, against the chain in fp64. A sign that differs at a ReLU's kink is no
error of a kernel: contenders that tell the signs of their activations are compared with an fp64 run that takes its
gradients by them; the others on values that stay away from kinks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import accuracy

from .cases import CONTIGUOUS, DTYPES, LAYOUT_OF, Case
from .plain import RecordedSigns, plain_stack, truth_stack

# Names starting with "mask" are not compared (accuracy.judged): the signs, and what a cached truth is found by.
SIGNS, TRUTH_KEY = "masks", "mask_truth_key"
OWN_SIGNS, AWAY_FROM_KINKS = "own signs", "away from kinks"
# Rounding in 16 bits moves an activation's input of size 1 by less.
_SMALLEST_GAP = 0.1

Results = dict[str, Any]


def named_results(network: nn.Module, outputs: tuple[Tensor, ...]) -> Results:
    """What a step on ``network`` returned (y, dx, gradients of the parameters), and its floating-point buffers.

    Copies: the next step may reuse the memory.
    """
    names = [f"d {n}" for n, p in network.named_parameters() if p.requires_grad]
    results = dict(zip(("y", "dx", *names), outputs, strict=True))
    results |= {n: b for n, b in network.named_buffers() if b.is_floating_point()}
    return {name: value.detach().clone() for name, value in results.items()}


def step(network: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx, and gradients of all parameters that require one."""
    y = network(x)
    wanted = [x, *(p for p in network.parameters() if p.requires_grad)]
    return (y, *torch.autograd.grad(y, wanted, dy))


class Judge:
    """The rule for all contenders of one case, which share the runs of eager and of the truth."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._eager: dict[tuple, Results] = {}
        self._truth: dict[tuple, Results] = {}

    def check(self, name: str, results: Callable[[int, bool], Results]) -> str:
        """Apply the rule.

        Args:
            name: Of the contender, for the message.
            results: From a seed, and whether the values shall be away from kinks, to named results; with the signs of
                the activations under :data:`SIGNS` if the contender tells them.

        Returns:
            How it was checked.

        Raises:
            AssertionError: A tensor is missing, or further from the truth than allowed.
        """
        away = SIGNS not in results(accuracy.SEEDS[0], False)

        def contender(seed: int) -> Results:
            found = results(seed, away)
            lacking = set(self._eager_results(seed, "planes", away)) - set(found) - {TRUTH_KEY}
            assert away or len(found[SIGNS]) == self._case.activations, "signs are missing"
            assert not lacking, f"{name}: has no {', '.join(sorted(lacking))}"
            return found | ({TRUTH_KEY: (seed, "away")} if away else {})

        accuracy.check(
            contender,
            lambda seed, layout: self._eager_results(seed, layout, away),
            lambda seed, values: self._truth_for(seed, values, away),
            name,
        )
        return AWAY_FROM_KINKS if away else OWN_SIGNS

    def _eager_results(self, seed: int, layout: str, away: bool) -> Results:
        key = (seed, layout, away)
        if key not in self._eager:
            case = self._case
            network = plain_stack(case.shape[1], case.scheme, case.blocks)
            network = network.to(case.device, DTYPES[case.dtype])
            case.prepare(network, case.state(seed, away_from_kinks=away))
            inputs = case.inputs(seed, DTYPES[case.dtype], LAYOUT_OF[layout])
            with RecordedSigns(network) as recorded:
                found = named_results(network, step(network, *inputs))
            found[TRUTH_KEY] = (seed, "away") if away else key
            self._truth_for(seed, found | {SIGNS: recorded.signs}, away)
            self._eager[key] = found
        return self._eager[key]

    def _truth_for(self, seed: int, values: Results, away: bool) -> Results:
        key = values.get(TRUTH_KEY)
        if key in self._truth:
            return self._truth[key]
        case = self._case
        signs = None if away else values[SIGNS]
        network, act = truth_stack(case.shape[1], case.scheme, case.blocks, signs)
        case.prepare(network.to(case.device), case.state(seed, away_from_kinks=away))
        found = named_results(network, step(network, *case.inputs(seed, torch.float64, CONTIGUOUS)))
        if case.training:  # batch statistics take any shift out again: autograd's value is noise
            for block in range(case.blocks):
                found[f"d {block}.conv1.bias"].zero_()
        if away and act.nearest < _SMALLEST_GAP:
            raise RuntimeError(f"values meant to be away from kinks came within {act.nearest:.3g}")
        if key is not None:
            self._truth[key] = found
        return found
