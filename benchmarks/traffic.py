"""Logical bytes: what an op must read and write, by one formula an op, whoever computes it.

T is the bytes of one activation. Bytes are counted per launch: an op that takes a second launch reads its operands a
second time (``rereads``). Per-channel vectors are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ssp_fused.schemes import ShuOsher


@dataclass(frozen=True)
class Traffic:
    """The formulas, for activations of one size.

    Attributes:
        activation: T, bytes of one activation.
        itemsize: bytes of one element.
    """

    activation: int
    itemsize: int

    def mask(self) -> int:
        """One bit an element: T / 8 / itemsize."""
        return self.activation // (8 * self.itemsize)

    def copy(self) -> int:
        """T read, T written."""
        return 2 * self.activation

    def stage_combine(self, terms: int) -> int:
        """Each term read, u written."""
        return (terms + 1) * self.activation

    def stage_moments(self, terms: int, *, write_u: bool) -> int:
        """Each term read, u written where it is wanted."""
        return (terms + write_u) * self.activation

    def stage_norm_act(self, terms: int, *, write_u: bool, mask: bool = False) -> int:
        """Each term read; z, and u and the mask where wanted, written."""
        return (terms + 1 + write_u) * self.activation + mask * self.mask()

    def stage_batch_norm_act(self, terms: int, *, write_u: bool, rereads: int = 0) -> int:
        """As ``stage_norm_act``, and T for each further launch, which reads u again."""
        return self.stage_norm_act(terms, write_u=write_u) + rereads * self.activation

    stage_group_norm_act = stage_batch_norm_act

    def norm_act_backward_reduce(self, *, write_z: bool) -> int:
        """dz and u read; z written where it is wanted."""
        return (2 + write_z) * self.activation

    def norm_act_backward(self, extras: int, *, mask: bool = False) -> int:
        """dz, the extras, and u (or its mask) read; du written."""
        operand = self.mask() if mask else self.activation
        return (2 + extras) * self.activation + operand

    def batch_norm_act_backward(self, extras: int, *, write_z: bool, rereads: int = 0) -> int:
        """dz, u and the extras read; du, and z where wanted, written; 2T for each further launch."""
        return self.norm_act_backward(extras) + (write_z + 2 * rereads) * self.activation

    group_norm_act_backward = batch_norm_act_backward

    def channel_sum(self) -> int:
        """T read."""
        return self.activation

    def stage_dots(self, terms: int) -> int:
        """g and each term read."""
        return (1 + terms) * self.activation

    def linf_step(self) -> int:
        """x_adv, its gradient and x read; x_adv written."""
        return 4 * self.activation

    def l2_step(self, *, rereads: int = 0) -> int:
        """As ``linf_step``, and 3T for each further launch."""
        return (4 + 3 * rereads) * self.activation


def train_step(scheme: ShuOsher, blocks: int, traffic: Traffic) -> int:
    """Bytes between the convolutions of a chain's forward and backward, with batch statistics, one launch an op."""
    total = traffic.channel_sum()
    for first in _evaluations(scheme, blocks):
        total += traffic.stage_batch_norm_act(first.terms, write_u=first.terms > 1)
        total += traffic.stage_batch_norm_act(1, write_u=False)
        total += _gradient_sum(first, traffic)
        total += traffic.batch_norm_act_backward(0, write_z=True)
        total += traffic.batch_norm_act_backward(first.stage_uses, write_z=True)
    return total + traffic.stage_combine(_terms(scheme, scheme.stages - 1))


def input_gradient_step(scheme: ShuOsher, blocks: int, traffic: Traffic) -> int:
    """The same, with fixed statistics and frozen parameters: one bit an element is kept for backward."""
    total = 0
    for first in _evaluations(scheme, blocks):
        write_u = first.terms > 1 and first.stage_uses > 0
        total += traffic.stage_norm_act(first.terms, write_u=write_u, mask=True)
        total += traffic.stage_norm_act(1, write_u=False, mask=True)
        total += _gradient_sum(first, traffic)
        total += traffic.norm_act_backward(0, mask=True)
        total += traffic.norm_act_backward(first.stage_uses, mask=True)
    return total + traffic.stage_combine(_terms(scheme, scheme.stages - 1))


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation of F: terms of its stage u, and how many later stages use u and F(u)."""

    terms: int
    stage_uses: int
    slope_uses: int


def _evaluations(scheme: ShuOsher, blocks: int) -> Iterator[_Evaluation]:
    for block in range(blocks):
        for i in range(scheme.stages):
            if i > 0:
                terms = _terms(scheme, i - 1)
            else:
                terms = 1 if block == 0 else _terms(scheme, scheme.stages - 1)
            stage_uses = sum(row[i] != 0 for row in scheme.alpha[i:])
            slope_uses = sum(row[i] != 0 for row in scheme.beta[i:])
            yield _Evaluation(terms, stage_uses, slope_uses)


def _terms(scheme: ShuOsher, row: int) -> int:
    """Operands of a row: non-zero coefficients."""
    return sum(c != 0 for c in (*scheme.alpha[row], *scheme.beta[row]))


def _gradient_sum(evaluation: _Evaluation, traffic: Traffic) -> int:
    """Where several stages use F(u), their gradients are summed up before its transpose; one is a factor."""
    uses = evaluation.slope_uses
    return traffic.stage_combine(uses) if uses > 1 else 0
