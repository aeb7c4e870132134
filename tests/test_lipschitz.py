"""Norms of Jacobians: against dense ones in fp64, against those known in closed form, and what is left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssp_fused import cli, data, models, use_backend
from ssp_fused.adversarial import (
    EvaluationSettings,
    TrainConfig,
    checkpoint_growth,
    fit,
    jacobian_norms,
)
from ssp_fused.nn import AdaptiveSSPBlock, PreActDownsample, SSPBlock, SSPStack

SHAPE = (3, 4, 4)


def stack() -> nn.Module:
    return SSPStack(SSPBlock(3, "ssp33"), SSPBlock(3, "euler"))


def group_norms() -> nn.Module:
    return SSPStack(SSPBlock(3, "ssp22", norm="group", num_groups=1, activation="silu"))


GROUPS: dict[str, Callable[[], nn.Module]] = {
    "chain": stack,
    "group norms, smooth": group_norms,
    "adaptive": lambda: SSPStack(AdaptiveSSPBlock(3)),
    "other shape": lambda: SSPStack(SSPBlock(3, "ssp22"), PreActDownsample(3, 5)),
    "plain torch": lambda: nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(inplace=True)),
}


def group(name: str) -> nn.Module:
    """With running statistics and weights that are not those of the start."""
    torch.manual_seed(5)
    module = GROUPS[name]().double()
    for values in (*module.parameters(), *module.buffers()):
        if values.is_floating_point() and values.dim() == 4:
            nn.init.normal_(values, std=0.3)
        elif values.is_floating_point():
            nn.init.uniform_(values, 0.5, 1.5)
    return module.eval()


def images(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)
    return list(zip(x.split(3), torch.zeros(count).split(3), strict=True))


def exact_norms(module: nn.Module, x: Tensor) -> list[float]:
    norms = []
    with use_backend("reference"):
        for sample in x:
            dense = torch.autograd.functional.jacobian(module, sample[None])
            norms.append(torch.linalg.svdvals(dense.reshape(-1, sample.numel()))[0].item())
    return norms


def of_samples(norms: list[float]) -> dict[str, float]:
    values = torch.tensor(norms, dtype=torch.float64)
    ends = {"median": values.quantile(0.5).item(), "p90": values.quantile(0.9).item()}
    return {**ends, "max": max(norms)}


@pytest.mark.parametrize("name", GROUPS)
def test_the_norm_is_that_of_the_dense_jacobian(name: str) -> None:
    model = nn.Sequential(group(name), nn.Flatten())
    batches = images(4)
    exact = exact_norms(model[0], torch.cat([x for x, _ in batches]))
    found = jacobian_norms(model, batches, groups=["0"], iterations=150)["0"]
    expected = {**of_samples(exact), "samples": 4, "iterations": 150}
    assert found == pytest.approx(expected, rel=1e-6)


def test_it_comes_from_below() -> None:
    model = nn.Sequential(group("chain"), nn.Flatten())
    batches = images(1)
    (exact,) = exact_norms(model[0], batches[0][0])
    steps = (1, 2, 4, 8, 16, 64)
    found = [jacobian_norms(model, batches, groups=["0"], iterations=k)["0"]["max"] for k in steps]
    assert found == sorted(found) and found[0] < 0.9 * exact < found[-1] <= exact * (1 + 1e-12)


class HalfSquare(nn.Module):
    """Its Jacobian is diagonal, with the input on it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x / 2


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(-2.0)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * x + 1


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def digits(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in data.load("digits").test.take(count).batches(count)]


def test_every_sample_has_its_own_jacobian() -> None:
    model = nn.Sequential(nn.Identity(), HalfSquare(), nn.Flatten())
    ((x, y),) = digits(130)
    x = x * torch.linspace(0.5, 2, len(x), dtype=x.dtype).view(-1, 1, 1, 1)
    found = jacobian_norms(model, [(x, y)], groups={"square": "1"}, iterations=400)
    expected = of_samples(x.flatten(1).amax(dim=1).tolist())
    assert found == {"square": pytest.approx({**expected, "samples": 130, "iterations": 400})}


@pytest.mark.parametrize(("module", "norm"), [(Doubling(), 2), (Constant(), 0)])
def test_writing_in_place_and_zero_jacobians(module: nn.Module, norm: float) -> None:
    found = jacobian_norms(nn.Sequential(module, nn.Flatten()), digits(9), groups=["0"])
    expected = {**of_samples([norm] * 9), "samples": 9, "iterations": 20}
    assert found == {"0": pytest.approx(expected)}


def test_fused_layers_agree_with_plain_ones() -> None:
    model = models.sspnet_cifar("ssp22", 1, width=8, in_channels=1)
    batches = list(data.load("digits").test.take(20).batches(20))
    found = {}
    for backend in ("auto", "reference"):
        with use_backend(backend):
            found[backend] = jacobian_norms(model, batches)
    assert list(found["auto"]) == ["block1", "block2", "block3"]
    for name, values in found["auto"].items():
        assert values == pytest.approx(found["reference"][name], rel=1e-3)


def state_of(model: nn.Module) -> Any:
    return (
        [(p.clone(), p.requires_grad, p.grad) for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        [module.training for module in model.modules()],
        torch.get_rng_state(),
    )


def assert_untouched(model: nn.Module, before: Any) -> None:
    parameters, buffers, modes, rng = state_of(model)
    for found, expected in zip(parameters, before[0], strict=True):
        assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]
    assert all(map(torch.equal, buffers, before[1]))
    assert modes == before[2] and torch.equal(rng, before[3])


@pytest.mark.parametrize("bad", [None, Detached()])
def test_the_model_is_left_as_it_was(bad: nn.Module | None) -> None:
    model = models.sspnet_cifar("ssp22", 1, width=4, in_channels=1).double().train()
    model.block1[0].norm1.eval()
    model.conv.weight.requires_grad_(False)
    if bad is not None:
        model.block2 = SSPStack(bad)
        model.sub2 = PreActDownsample(8, 16).double()
    before = state_of(model)
    if bad is None:
        with torch.no_grad():
            jacobian_norms(model, digits(4), iterations=2)
    else:
        with pytest.raises(ValueError, match="'block2' must be differentiable"):
            jacobian_norms(model, digits(4), iterations=2)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"groups": ["nope"]}, "no module 'nope'"),
        ({"groups": []}, "groups must name a module"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    model = models.sspnet_cifar("ssp22", 1, width=4, in_channels=1)
    with pytest.raises(ValueError, match=message):
        jacobian_norms(model, digits(4), **options)
    with pytest.raises(ValueError, match="no batch"):
        jacobian_norms(model, [])


def test_the_growth_command_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, out = tmp_path / "run", tmp_path / "growth.json"
    sizes = {"blocks": 1, "width": 4, "steps": 1, "epochs": 1, "limit": 64, "batch_size": 32}
    fit(TrainConfig(**sizes, device="cpu", out=str(run)), progress=False)
    capsys.readouterr()
    options = ("--attack", "fgsm", "--limit", "30", "--device", "cpu", "--lipschitz")
    assert cli.main(["growth", str(run), *options, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    (report,) = json.loads(out.read_text())["runs"]
    settings = EvaluationSettings(limit=30, device="cpu")
    assert report == checkpoint_growth(run, "fgsm", settings, lipschitz=True)
    assert table.splitlines()[2].endswith(f"{'|J|':>9}{'max |J|':>9}")
    for line, (name, norms) in zip(
        table.splitlines()[3:], report["jacobian_norms"].items(), strict=True
    ):
        assert norms["samples"] == 30 and 0 < norms["median"] <= norms["max"]
        assert line.startswith(name)
        assert line.endswith(f"{norms['median']:>9.3f}{norms['max']:>9.3f}")
