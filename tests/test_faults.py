"""Seeded faults: an op made wrong on purpose must turn the accuracy tests red."""

import pytest
import test_blocks
import torch

import ssp_fused
from ssp_fused._backends import cpu

pytestmark = test_blocks.pytestmark

OPS = torch.ops.ssp_fused


class Faulty:
    """The CPU ops with one of them altered."""

    def __init__(self, name, alter):
        self.name, self.alter = name, alter

    def __getattr__(self, name):
        op = getattr(OPS, name)
        if name != self.name:
            return op
        altered = self.alter(op)
        if "out" in op.overloads():
            altered.out = self.alter(op.out)
        return altered


def wrong_coefficient(op):
    def stage(terms, coefficients, *rest):
        return op(terms, [c * (1 + 2e-6) for c in coefficients], *rest)

    return stage


def dropped_term(op):
    def stage(terms, coefficients, *rest):
        kept = max(1, len(terms) - 1)
        return op(terms[:kept], coefficients[:kept], *rest)

    return stage


def swapped_gamma(op):
    def backward(dz, scale, scale_tensor, u, mean, rstd, gamma, beta, *rest, **out):
        return op(dz, scale, scale_tensor, u, mean, rstd, gamma.flip(0), beta, *rest, **out)

    return backward


def dropped_extra(op):
    def backward(*arguments, **out):
        write_z = () if out else arguments[-1:]
        *head, _, _, tensor = arguments[: len(arguments) - len(write_z)]
        return op(*head, [], [], tensor, *write_z, **out)

    return backward


def biased_variance(op):
    def update(mean, var, tracked, means, variances, count, *rest):
        return op(mean, var, tracked, means, variances, count + 1e6, *rest)

    return update


def unsorted_statistics(op):
    def stage(*arguments):
        u, z, mean, rstd = op(*arguments)
        return u, z, mean.flip(1), rstd

    return stage


FAULTS = [
    ("stage_combine", wrong_coefficient, "batch"),
    ("stage_combine", dropped_term, "batch"),
    ("stage_batch_norm_act", dropped_term, "batch"),
    ("batch_norm_act_backward", swapped_gamma, "batch"),
    ("batch_norm_act_backward", dropped_extra, "batch"),
    ("group_norm_act_backward", dropped_extra, "group"),
    ("update_running_stats_", biased_variance, "batch"),
    ("stage_group_norm_act", unsorted_statistics, "group"),
]


@pytest.mark.parametrize(("op", "fault", "norm"), FAULTS, ids=lambda p: getattr(p, "__name__", p))
def test_fault_is_caught(op, fault, norm, monkeypatch):
    case = ("ssp33", (3, 6, 5, 4))
    with ssp_fused.use_backend("cpu"):
        test_blocks.judge(*case, norm=norm)
        faulty = type("FaultyBackend", (type(cpu.BACKEND),), {"ops": Faulty(op, fault)})
        monkeypatch.setattr(cpu.BACKEND, "__class__", faulty)
        with pytest.raises(AssertionError, match="exceeds"):
            test_blocks.judge(*case, norm=norm)
