"""The contenders of the block benchmark: what each computes, and why one cannot run."""

import pytest
import torch
from benchmark_cases import measured, small_case
from torch.utils._python_dispatch import TorchDispatchMode

import ssp_fused
from benchmarks import contenders, harness
from benchmarks.cases import DIRECTIONS
from benchmarks.plain import plain_stack
from ssp_fused import schemes
from ssp_fused.nn import SSPBlock, SSPStack


def test_what_cannot_run_is_listed_with_its_reason():
    def broken():
        raise ZeroDivisionError("by nothing\nat all")

    case = small_case()
    rows = measured(
        case,
        [
            *contenders.contenders(case, compiling=False),
            harness.Contender("broken", broken),
        ],
    )
    assert set(rows) == {*contenders.NAMES, "broken"}
    assert rows["broken"].status == "cannot run: ZeroDivisionError: by nothing"
    reason = ssp_fused.available_backends()["triton"] or "it serves cuda tensors, got cpu"
    assert rows["fused-triton"].status == f"cannot run: {reason}"
    assert rows["compile-default"].status == "cannot run: torch.compile was left out"
    assert rows["apex"].status.startswith("cannot run: ")
    for name in ("eager", "eager (control)", "eager-channels-last", "convolutions", "copy"):
        assert rows[name].status == "ok", rows[name]
    assert rows["convolutions"].checked == rows["copy"].checked == ""
    assert {row.bytes for row in rows.values()} == {case.logical_bytes()}
    with pytest.raises(ValueError, match=r"unknown contender egaer; known: eager, .*copy"):
        contenders.contenders(case, ["egaer"])


@pytest.mark.parametrize("scheme", schemes.names())
def test_the_plain_stack_is_the_reference(scheme):
    plain = plain_stack(3, scheme, 2).double()
    stack = SSPStack(*(SSPBlock(3, scheme, dtype=torch.float64) for _ in range(2)))
    assert plain.state_dict().keys() == stack.state_dict().keys()
    stack.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with ssp_fused.use_backend("reference"):
        torch.testing.assert_close(plain(x), stack(x), rtol=1e-12, atol=1e-12)


def test_the_plain_stack_makes_no_needless_pass():
    """ssp33: x + F; then twice u + F, a product, a sum."""

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith(("aten::add.", "aten::mul.")):
                seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen = []
    network = plain_stack(3, "ssp33", 1).eval()
    with Passes():
        network(torch.randn(2, 3, 4, 5))
    assert len(seen) == 1 + 3 + 3


def test_convolutions_are_the_chains_own():
    """As many calls, of the same shapes, as the plain stack makes, forward and backward."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().removeprefix("aten::")
            if name in ("convolution", "convolution_backward"):
                wanted = args[-1][:2] if name == "convolution_backward" else None  # all but bias
                seen.append((name, args[0].shape, args[1].shape, wanted))
            return func(*args, **(kwargs or {}))

    for direction in DIRECTIONS:
        counts = []
        for name in ("convolutions", "eager"):
            case = small_case(direction, scheme="ssp33", count=2)
            work = contenders.contenders(case, [name])[0].build()
            seen = []
            inputs = work.inputs(0)
            with Calls():
                work.run(*inputs)
            counts.append(sorted(map(str, seen)))
        assert counts[0] == counts[1] and len(counts[0]) == 2 * 12
