"""The judge of the benchmarks: who is refused, and that nobody who is right is."""

import pytest
import torch
from benchmark_cases import measured, needs_cpu_kernels, small_case

from benchmarks import contenders, harness, judge
from benchmarks.cases import CONTIGUOUS, DIRECTIONS, DTYPES, INPUT_GRADIENT, Case
from benchmarks.plain import RecordedSigns, plain_stack
from ssp_fused.nn import SSPBlock, SSPStack


class Faulty(torch.nn.Module):
    """A right network's output, altered."""

    def __init__(self, case, alter):
        super().__init__()
        self.inner = plain_stack(case.shape[1], case.scheme, case.blocks).to(DTYPES[case.dtype])
        self.alter = alter

    def forward(self, x):
        return self.alter(self.inner, x)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * (1 + 1e-12)


def moved_statistics(network, x):
    y = network(x)
    network[0].norm2.running_mean.data.add_(1e-12)
    return y


FAULTS = {
    "none": (lambda network, x: network(x), None),
    "y": (lambda network, x: network(x) * (1 + 1e-12), " y: "),
    "NaN": (lambda network, x: network(x) + float("nan"), " y: "),
    "dx": (lambda network, x: network(ScaledGradient.apply(x)), " dx: "),
    "running_mean": (moved_statistics, "norm2.running_mean: "),
}


def entrant(case, alter, *, tells_signs):
    """A contender that alters a right network's work, and its signs are known or not."""

    def build():
        faulty = Faulty(case, alter)
        network = contenders.placed(faulty.inner, case, CONTIGUOUS)
        recorder = RecordedSigns if tells_signs else None
        rule = judge.Judge(case)
        return contenders.network_work("altered", case, rule, network, faulty, CONTIGUOUS, recorder)

    return harness.Contender("altered", build)


@pytest.mark.parametrize("tells_signs", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_contender_is_refused(direction, fault, tells_signs):
    alter, named = FAULTS[fault]
    case = small_case(direction)
    row = measured(case, [entrant(case, alter, tells_signs=tells_signs)])["altered"]
    if named is None:
        assert row.status == "ok" and row.median_ms > 0
        assert row.checked == (judge.OWN_SIGNS if tells_signs else judge.AWAY_FROM_KINKS)
    else:
        assert row.status.startswith("wrong: altered") and named in row.status
        assert "exceeds" in row.status
        assert row.median_ms is None and row.repeats is None and row.over_eager is None


@needs_cpu_kernels
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_fused_layer_is_refused_and_the_others_are_timed(direction, monkeypatch):
    wrong = lambda channels, scheme: SSPBlock(channels, scheme, step_size=1 + 1e-5)  # noqa: E731
    monkeypatch.setattr(contenders, "SSPBlock", wrong)
    case = small_case(direction, dtype="float32")
    rows = measured(case, contenders.contenders(case, ["eager", "fused-cpu"]))
    assert rows["fused-cpu"].status.startswith("wrong: fused-cpu y: error")
    assert rows["fused-cpu"].median_ms is None
    assert rows["eager"].status == "ok" and rows["eager"].over_eager == 1


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_fused_layers_are_right_and_tell_their_signs(direction, dtype):
    case = small_case(direction, dtype=dtype, scheme="ssp33", count=2)
    row = measured(case, contenders.contenders(case, ["fused-cpu"]))["fused-cpu"]
    assert (row.status, row.checked) == ("ok", judge.OWN_SIGNS)


@needs_cpu_kernels
def test_an_exact_zero_is_right_though_autograd_finds_noise():
    case = small_case(scheme="ssp54", count=3, shape=(4, 8, 8, 8))
    rule = judge.Judge(case)
    noise = rule._eager_results(0, "planes", False)["d 2.conv1.bias"]
    (truth,) = rule._truth.values()
    assert 0 < noise.abs().max() < 1e-13 and not truth["d 2.conv1.bias"].any()
    assert contenders.contenders(case, ["fused-cpu"])[0].build().check() == judge.OWN_SIGNS


def test_a_missing_tensor_is_an_error():
    case = small_case()
    rule = judge.Judge(case)
    whole = contenders.contenders(case, ["eager"])[0]

    def without_bias(seed, away):
        found = dict(rule._eager_results(seed, "planes", True))
        del found["d 0.conv2.bias"]
        return found

    assert whole.build().check() == judge.OWN_SIGNS
    with pytest.raises(AssertionError, match=r"has no d 0\.conv2\.bias"):
        rule.check("partial", without_bias)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_away_from_kinks_have_the_same_signs_in_every_dtype(dtype, direction):
    case = small_case(direction, dtype=dtype, scheme="ssp33", count=3, shape=(4, 8, 8, 8))
    signs = []
    for used in (dtype, "float64"):
        network = plain_stack(8, "ssp33", 3).to(DTYPES[used])
        case.prepare(network, case.state(1, away_from_kinks=True))
        with RecordedSigns(network) as recorded:
            judge.step(network, *case.inputs(1, DTYPES[used], CONTIGUOUS))
        signs.append(recorded.signs)
    assert len(signs[0]) == case.activations == 18
    assert all(torch.equal(a, b) for a, b in zip(*signs, strict=True))
    assert {bool(s.any()) and not bool(s.all()) for s in signs[0]} == {True}


def test_values_that_come_near_a_kink_are_noticed(monkeypatch):
    case = small_case()
    near = case.state(0)
    monkeypatch.setattr(Case, "state", lambda self, seed, **_: near)
    with pytest.raises(RuntimeError, match="came within"):
        judge.Judge(case)._eager_results(0, "planes", True)


@needs_cpu_kernels
def test_signs_that_do_not_fit_are_not_used(monkeypatch):
    """Tiles of a batch tell them one tile after another."""
    monkeypatch.setattr(SSPStack, "tile", 1)
    case = small_case(INPUT_GRADIENT, dtype="float32")
    row = measured(case, contenders.contenders(case, ["fused-cpu"]))["fused-cpu"]
    assert (row.status, row.checked) == ("ok", judge.AWAY_FROM_KINKS)
