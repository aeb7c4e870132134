"""``SSPIntegrator``: any residual branch, called as it is, once a stage; the stages are fused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ssp_fused
from ssp_fused import reference, schemes
from ssp_fused.nn import SSPIntegrator


class Attention(nn.Module):
    """Pre-norm self-attention on tokens [N, T, D]."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        z = self.norm(x)
        return self.attention(z, z, z, need_weights=False)[0]


class ConvNeXt(nn.Module):
    """Depthwise convolution, LayerNorm over channels, two pointwise layers; [N, C, H, W]."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.mlp = mlp()

    def forward(self, x):
        z = self.depthwise(x).movedim(1, -1)
        return self.mlp(self.norm(z)).movedim(-1, 1)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


BRANCHES = {
    "attention": (Attention, (2, 5, 8)),
    "mlp": (mlp, (3, 8)),
    "tokens": (mlp, (2, 5, 8)),
    "convnext": (ConvNeXt, (2, 8, 6, 5)),
}


def results(step, x):
    x = x.clone().requires_grad_()
    y = step(x)
    y.square().sum().backward()
    gradients = [p.grad for p in step.parameters()] if isinstance(step, nn.Module) else []
    return [y.detach(), x.grad, *gradients]


@pytest.mark.parametrize("scheme", schemes.names())
@pytest.mark.parametrize("kind", BRANCHES)
def test_any_branch(kind, scheme):
    make, shape = BRANCHES[kind]
    branch, x = make().double(), torch.randn(shape, dtype=torch.float64)
    calls = []
    branch.register_forward_hook(lambda *_: calls.append(1))
    step = SSPIntegrator(branch, scheme, step_size=0.5)
    found = results(step, x)
    assert len(calls) == schemes.get(scheme).stages
    twin = copy.deepcopy(branch)
    twin.zero_grad()
    expected = results(lambda x: reference.ssp_step(x, twin, schemes.get(scheme), 0.5), x)
    torch.testing.assert_close(found, expected + [p.grad for p in twin.parameters()])


def test_the_stages_are_fused():
    if ssp_fused.available_backends()["cpu"] is not None:
        pytest.skip(ssp_fused.available_backends()["cpu"])
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch(), ssp_fused.use_backend("cpu"):
        SSPIntegrator(nn.Linear(4, 4), "ssp33")(torch.randn(3, 4))
    assert called.count("ssp_fused::stage_combine") == 3
    assert not [name for name in called if name in ("aten::mul.Tensor", "aten::add.Tensor")]


def test_modes_and_autocast_are_the_branchs_own():
    branch = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8))
    step, x = SSPIntegrator(branch, "ssp22"), torch.randn(4, 8)
    torch.manual_seed(1)
    y = step(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, reference.ssp_step(x, branch, schemes.get("ssp22"), 1.0))
    step.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = step(x)
        expected = reference.ssp_step(x, branch, schemes.get("ssp22"), 1.0)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shape.*\(3, 5\).*\(3, 4\)|shape.*\(3, 4\).*\(3, 5\)"):
        SSPIntegrator(nn.Linear(4, 5), "ssp22")(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"unknown scheme 'rk4'.*ssp33"):
        SSPIntegrator(nn.Linear(4, 4), "rk4")
