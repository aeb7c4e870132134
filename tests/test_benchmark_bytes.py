"""Bytes: the formulas of what an op must read and write, and what is kept for backward."""

import pytest
import torch
from benchmark_cases import measured, needs_cpu_kernels, small_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import contenders, memory, results, traffic
from benchmarks.cases import DIRECTIONS, INPUT_GRADIENT
from ssp_fused import schemes


def test_byte_formulas():
    t = traffic.Traffic(activation=1000, itemsize=2)
    assert t.mask() == 62  # a sixteenth, in whole bytes
    assert t.copy() == 2000
    assert t.stage_combine(3) == 4000
    assert [t.stage_moments(2, write_u=w) for w in (False, True)] == [2000, 3000]
    assert [t.stage_norm_act(2, write_u=w) for w in (False, True)] == [3000, 4000]
    assert t.stage_norm_act(1, write_u=False, mask=True) == 2062
    assert t.stage_batch_norm_act(2, write_u=True) == 4000
    assert t.stage_batch_norm_act(2, write_u=True, rereads=1) == 5000
    assert t.stage_group_norm_act(1, write_u=False, rereads=1) == 3000
    assert [t.norm_act_backward_reduce(write_z=w) for w in (False, True)] == [2000, 3000]
    assert [t.norm_act_backward(e) for e in (0, 2)] == [3000, 5000]
    assert t.norm_act_backward(1, mask=True) == 3062
    reduce_then_apply = t.norm_act_backward_reduce(write_z=True) + t.norm_act_backward(1)
    assert t.batch_norm_act_backward(1, write_z=True, rereads=1) == reduce_then_apply
    assert t.batch_norm_act_backward(1, write_z=True) == reduce_then_apply - 2000
    assert t.group_norm_act_backward(0, write_z=False) == 3000
    assert (t.channel_sum(), t.stage_dots(2), t.linf_step()) == (1000, 3000, 4000)
    assert (t.l2_step(), t.l2_step(rereads=1)) == (4000, 7000)


def test_bytes_of_a_chain_by_hand():
    """euler: x -> z | conv -> z | conv, x -> u; then dy; dz, u -> du, z | dz, u, dy -> du, z."""
    t = traffic.Traffic(activation=32, itemsize=4)
    euler = schemes.get("euler")
    assert traffic.train_step(euler, 1, t) == 32 * ((2 + 2 + 3) + 1 + 4 + 5)
    # x -> z, mask | conv -> z, mask | conv, x -> u; dz, mask -> du | dz, mask, dy -> du
    assert traffic.input_gradient_step(euler, 1, t) == 32 * (2 + 2 + 3 + 2 + 3) + 4 * 1


class Observed(TorchDispatchMode):
    """Bytes of the activations and masks that go in and out of the fused ops."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name().startswith("ssp_fused::"):
            for t in tree_leaves((args, kwargs, out)):
                if isinstance(t, torch.Tensor) and (
                    t.numel() == self.elements or t.dtype == torch.uint8
                ):
                    self.bytes += t.numel() * t.element_size()
        return out


@needs_cpu_kernels
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scheme", ["ssp22", "ssp33", "ssp54", "midpoint"])
def test_bytes_of_a_chain_are_those_its_ops_are_given(scheme, direction):
    case = small_case(direction, dtype="float32", scheme=scheme, count=2, shape=(2, 8, 4, 4))
    work = contenders.contenders(case, ["fused-cpu"])[0].build()
    inputs = work.inputs(0)
    with Observed(2 * 8 * 4 * 4) as seen:
        work.run(*inputs)
    assert seen.bytes == case.logical_bytes()


def test_kept_bytes_by_hand():
    """exp keeps its result, a linear layer its input and weight, a product both factors: each storage once."""
    x = torch.randn(4, 8, requires_grad=True)
    linear = torch.nn.Linear(8, 8)

    def forward():
        e = x.exp()
        return linear(e) * x * e.view(8, 4).view(4, 8)

    kept = memory.kept_for_backward(forward, linear.parameters(), [x])
    # activations: e (once, through its view too), the linear layer's output, and that times x
    assert kept == memory.Kept(3 * 4 * 8 * 4, 8 * 8 * 4, 4 * 8 * 4)


def test_kept_bytes_of_what_is_dropped_are_counted_too():
    """Each call's storage may take the address of the one before."""
    x = torch.randn(64, 64, requires_grad=True)

    def forward():
        for _ in range(3):
            x.exp()

    assert memory.kept_for_backward(forward, [], [x]).activations == 3 * 64 * 64 * 4


@needs_cpu_kernels
def test_kept_bytes_of_an_attack_step_are_masks():
    case = small_case(INPUT_GRADIENT, dtype="float32", shape=(2, 8, 4, 4))
    rows = measured(case, contenders.contenders(case, ["eager", "fused-cpu"]))
    elements = 2 * 8 * 4 * 4
    fused = rows["fused-cpu"].kept_bytes
    # 4 activations of one bit an element, and vectors over channels: fewer than 16.
    assert 4 * elements // 8 <= fused < 4 * elements // 8 + 16 * 8 * 4
    # For each F both norms' inputs and both activations' results; the first norm's input is x.
    assert rows["eager"].kept_bytes == (2 * 4 - 1) * 4 * elements
    assert rows["eager"].kept_input_bytes == 4 * elements


@needs_cpu_kernels
def test_the_memory_benchmark_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "BATCH", 2)
    assert memory.main(["--out", str(tmp_path)]) == 0
    rows = {r.key[1:]: r for r, _ in results.read(tmp_path / "memory.csv")}
    assert len(rows) == 2 * 2 * 2
    printed = capsys.readouterr().out
    for row in rows.values():
        assert row.case in printed and f"{row.kept_bytes / 1e6:.3f}" in printed
    chain = (
        4 * 2 * 16 * 32 * 32
    )  # bytes of an activation in three ssp33 blocks, which evaluate F nine times
    fused = {r.direction: r.kept_bytes for r in rows.values() if r.contender == memory.FUSED}
    case = next(r.case for r in rows.values() if "blocks" in r.case)
    kept = lambda contender, direction: rows[case, direction, "cpu", contender].kept_bytes  # noqa: E731
    vectors = 9 * 2 * 8 * 16 * 4
    assert 9 * 2 * chain - chain <= kept(memory.FUSED, "train") < 9 * 2 * chain + vectors
    assert (
        9 * 2 * chain // 32 <= kept(memory.FUSED, "input-gradient") < 9 * 2 * chain // 32 + vectors
    )
    assert fused["train"] > 20 * fused["input-gradient"]
    assert kept("eager", "train") == pytest.approx((9 * 4 - 1) * chain, rel=0.01)
