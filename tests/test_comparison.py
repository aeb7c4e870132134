"""The comparison of networks: its protocol, its networks, what it is refused with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssp_fused import cli, models
from ssp_fused.adversarial import Comparison
from ssp_fused.adversarial.comparison_table import statistic, summary
from ssp_fused.nn import AdaptiveSSPBlock, SSPBlock


def test_statistic() -> None:
    found = statistic([0.2, 0.4, 0.9])
    assert found["mean"] == pytest.approx(0.5)
    assert found["deviation"] == pytest.approx((0.26 / 2) ** 0.5)
    assert statistic([0.7]) == {"mean": 0.7, "deviation": None, "values": [0.7]}


def test_the_protocol_is_the_default(tmp_path: Path) -> None:
    protocol = Comparison("cifar10", out=str(tmp_path), device="cpu")
    assert protocol.reductions() == {}
    assert "Departs" not in " ".join(summary(protocol)["caption"])
    cells = list(protocol.cells())
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert len({cell.folder for cell in cells}) == len(cells) == 3 * 3 * 5
    config = protocol.training(cells[5])
    assert (config.data, config.blocks, config.width, config.epochs) == ("cifar10", 6, 16, 200)
    assert (config.lr, config.momentum, config.weight_decay) == (0.1, 0.9, 5e-4)
    assert (config.batch_size, config.milestones) == (128, (80, 140, 180))
    assert (config.method, config.bn_mode) == ("pgd", "train")
    assert (config.eps, config.step_size, config.steps) == (8 / 255, 2 / 255, 7)


@pytest.mark.parametrize(
    ("table", "chosen", "expected"),
    [
        ("cifar10", ("ssp2", "ark"), {("res", 12): 36}),
        ("cifar10", ("res", "ssp3", "midrk2"), {("res", 12): 36, ("res", 18): 54}),
        ("fmnist", ("ssp3", "ark"), {("res", 6): 6, ("res", 9): 9}),
        ("mnist", ("res",), {}),
    ],
)
def test_resnets_at_equal_evaluations(
    table: str, chosen: tuple[str, ...], expected: dict[tuple[str, int], int]
) -> None:
    plain = Comparison(table, models=chosen)
    added = replace(plain, equal_evaluations=True).networks()[len(chosen) :]
    assert {(network.model, network.blocks): network.evaluations for network in added} == expected
    assert [network.model for network in plain.networks()] == list(chosen)


@pytest.mark.parametrize("model", ["res", "midrk2", "ssp2", "ssp3", "ark"])
def test_evaluations_of_f_are_counted(model: str) -> None:
    (network,) = Comparison("cifar10", models=(model,), blocks=2).networks()
    built = models.sspnet_cifar(models.resolve_scheme(model, 3), 2, width=4).eval()
    calls = []
    for block in built.modules():
        if isinstance(block, (SSPBlock, AdaptiveSSPBlock)):
            block.conv2.register_forward_hook(lambda *_: calls.append(1))
    built(torch.rand(1, 3, 8, 8))
    assert len(calls) == network.evaluations


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--table"),
        ("--table svhn", "--table: invalid choice: 'svhn'"),
        ("--table mnist --models res,vit", "models must be of res, midrk2"),
        ("--table mnist --methods free", "methods must be of none, pgd, trades, got free"),
        ("--table mnist --seeds 1,1", "seeds must be one or more, each once"),
        ("--table mnist --seeds one", "--seeds"),
        ("--table mnist --blocks 0", "blocks must be at least 1"),
        ("--table mnist --epochs 0", "epochs must be at least 1"),
        ("--table mnist --test-images 0", "test_images must be at least 1"),
        ("--table mnist --autoattack-images -1", "autoattack_images must not be negative"),
        ("--table mnist --data cifar10", "data must be folder:PATH or left out"),
        ("--table mnist --jobs 0", "jobs must be at least 1"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: str, message: str
) -> None:
    assert cli.main(["reproduce", *words.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()
