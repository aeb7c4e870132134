"""Checkpoint files of the published code into ours, and back."""

import argparse
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from torch import Tensor, nn

from ssp_fused import cli, data, models
from ssp_fused._backends import select
from ssp_fused.adversarial import (
    PublishedNetwork,
    TrainConfig,
    conversion,
    convert_checkpoint,
    fit,
    load_checkpoint,
)
from ssp_fused.functional import BLOCK_OPS
from ssp_fused.nn import SSPBlock

SMALL = {"init_channel": 8}


def double(dataset: str, model: Any = "ssp2", norm: str = "b", **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return published.randomized(published.network(dataset, model, norm, **sizes), seed=1).eval()


def saved(path: Path, network: nn.Module, **extras: Any) -> Path:
    torch.save({"state_dict": network.state_dict(), **extras}, path)
    return path


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    ("dataset", "data", "shape", "eps", "step_size"),
    [
        ("cifar10", "cifar10", (3, 32, 32), 8 / 255, 2 / 255),
        ("mnist", "mnist", (1, 28, 28), 0.3, 0.05),
        ("fmnist", "fashion-mnist", (1, 28, 28), 0.1, 0.02),
        ("tinyimagenet", "tiny-imagenet", (3, 64, 64), 4 / 255, 1 / 255),
    ],
)
def test_there_and_back(
    tmp_path: Path, dataset: str, data: str, shape: tuple, eps: float, step_size: float
) -> None:
    theirs = double(dataset)
    source = saved(tmp_path / "theirs.pt", theirs, epoch=3)
    report = convert_checkpoint(source, tmp_path / "ours.pt", PublishedNetwork(dataset=dataset))
    assert report["direction"] == "published to ssp_fused"
    assert report["difference"] <= 1e-4 * report["largest_logit"]

    model, config, state = load_checkpoint(tmp_path / "ours.pt")
    assert (config.data, config.model, config.eps, config.step_size) == (
        data,
        "ssp2",
        eps,
        step_size,
    )
    assert state["epoch"] is None and state["metrics"] == {}
    x = torch.rand(2, *shape)
    mean, std = (torch.tensor(row).view(-1, 1, 1) for row in report["normalization"])
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs((x - mean) / std))

    report = convert_checkpoint(tmp_path / "ours.pt", tmp_path / "back.pt")
    assert report["direction"] == "ssp_fused to published"
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == ["state_dict"]
    assert_same_state(back["state_dict"], theirs.state_dict())
    double(dataset).load_state_dict(back["state_dict"], strict=True)


@pytest.mark.parametrize("model", ["res", "midrk2", "ssp3", "ark", "res,ssp3,ark"])
@pytest.mark.parametrize(
    ("letter", "given"),
    [
        ("b", {}),
        ("g", {"norm": "group"}),
        ("l", {"num_groups": 1}),
        ("i", {"norm": "instance"}),
    ],
)
def test_every_model_and_norm(
    tmp_path: Path, model: str, letter: str, given: dict[str, Any]
) -> None:
    theirs = double("cifar10", model.split(",") if "," in model else model, letter)
    source = saved(tmp_path / "theirs.pt", theirs)
    about = PublishedNetwork(model=model, **given)
    report = convert_checkpoint(source, tmp_path / "ours.pt", about)
    network, _, _ = load_checkpoint(tmp_path / "ours.pt")
    mean, std = (torch.tensor(row).view(-1, 1, 1) for row in report["normalization"])
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs((x - mean) / std))
    convert_checkpoint(tmp_path / "ours.pt", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_state(back["state_dict"], theirs.state_dict())


def test_what_the_file_says_of_itself_is_heard(tmp_path: Path) -> None:
    theirs = double("cifar10", "ssp3", "l")
    stated = argparse.Namespace(model="ssp3", norm="l", device=torch.device("cpu"), lr=0.1)
    source = saved(tmp_path / "theirs.pt", theirs, args=stated)
    report = convert_checkpoint(source, tmp_path / "ours.pt")
    assert report["network"] == "cifar10 ssp3, group norm"
    norm = load_checkpoint(tmp_path / "ours.pt")[0].block1[0].norm1
    assert norm.num_groups == 1
    with pytest.raises(ValueError, match=r"model must be as in .*says 'ssp3'; got 'ssp2'"):
        convert_checkpoint(source, tmp_path / "other.pt", PublishedNetwork(model="ssp2"))


def test_a_bare_state_dict_of_a_wrapped_network(tmp_path: Path) -> None:
    theirs = double("cifar10")
    wrapped = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
    torch.save(wrapped, tmp_path / "theirs.pt")
    convert_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours.pt")
    convert_checkpoint(tmp_path / "ours.pt", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_state(back["state_dict"], theirs.state_dict())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversion") / "run"
    sizes = {"blocks": 2, "width": 4, "steps": 1, "epochs": 1, "limit": 64, "batch_size": 32}
    fit(TrainConfig(**sizes, model="ark", device="cpu", out=str(folder)), progress=False)
    return folder


def test_a_run_becomes_a_published_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "theirs.pt"
    assert cli.main(["convert", str(run), str(target), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "ssp_fused to published: cifar10 ark+res+ssp2, batch norm" in out
    assert "max|difference|" in out and "max|logit|" in out and "mean 0.305; std 0.376" in out
    theirs = published.network("cifar10", "ark", blocks=2, init_channel=4, in_channels=1)
    state = torch.load(target, weights_only=True)["state_dict"]
    theirs.load_state_dict(state, strict=True)
    ours, _, _ = load_checkpoint(run / "best.pt")
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ours.normalize(x)), ours(x))


def test_published_checkpoints_are_evaluated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = data.load("digits")
    wide = replace(digits.test, images=digits.test.images.repeat(1, 3, 1, 1))
    splits = replace(digits, train=wide, test=wide)
    monkeypatch.setattr(data, "load", lambda *_, **__: splits)
    saved(tmp_path / "theirs.pt", double("cifar10", "ssp3"))
    paths = [str(tmp_path / "theirs.pt"), str(tmp_path / "ours.pt")]
    assert cli.main(["convert", *paths, "--model", "ssp3", "--device", "cpu"]) == 0
    options = ["--limit", "8", "--device", "cpu"]
    assert cli.main(["evaluate", paths[1], "--attack", "sspnet-pgd-2", *options]) == 0
    assert cli.main(["growth", paths[1], "--attack", "pgd-2", *options]) == 0
    out = capsys.readouterr().out
    assert "8 test images of cifar10" in out and "eps 0.03137" in out and "block3" in out


class Hostile:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a checkpoint"),
        (lambda path: path.write_bytes(b"\x80\x02garbage"), "not a checkpoint"),
        (lambda path: path.write_bytes(pickle.dumps(Hostile())), "not a checkpoint"),
        (lambda path: torch.save({"state_dict": Hostile()}, path), "not a checkpoint"),
        (lambda path: torch.save({"args": argparse.ArgumentParser}, path), "not a checkpoint"),
        (lambda path: torch.save([1], path), "neither a published checkpoint nor one of ssp_fused"),
        (lambda path: torch.save({}, path), "neither a published checkpoint"),
        (lambda path: torch.save({"state_dict": {"conv.weight": 1}}, path), "must be a tensor"),
        (lambda path: torch.save({"conv.weight": torch.ones(1)}, path), "missing"),
        (lambda path: saved(path, double("mnist")), "missing"),
        (lambda path: saved(path, double("cifar10").double()), "must be torch.float32"),
        (lambda path: saved(path, double("cifar10", in_channels=1)), "images of 3 channels"),
        (lambda path: saved(path, not_a_number()), "logits differ by nan"),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, write: Callable[[Path], Any], message: str
) -> None:
    source = tmp_path / "bad.pt"
    write(source)
    assert cli.main(["convert", str(source), str(tmp_path / "out.pt"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ssp-fused: error: ") and error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def not_a_number() -> nn.Module:
    network = double("cifar10")
    network.fc.bias.data[0] = float("nan")
    return network


def test_what_is_there_is_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "theirs.pt"
    target.write_bytes(b"precious")
    assert cli.main(["convert", str(run), str(target)]) == 2
    assert "exists (--force replaces it)" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert cli.main(["convert", str(run), str(target), "--force"]) == 0
    assert "state_dict" in torch.load(target, weights_only=True)
    for bad in (tmp_path, tmp_path / "missing" / "theirs.pt"):
        assert cli.main(["convert", str(run), str(bad), "--force"]) == 2
        assert "target" in capsys.readouterr().err
    options = ["--model", "ssp3", "--num-groups", "1"]
    assert cli.main(["convert", str(run), str(tmp_path / "new.pt"), *options]) == 2
    assert "model, num_groups must be left out" in capsys.readouterr().err


def test_networks_without_counterpart_are_named(tmp_path: Path) -> None:
    sizes = {"blocks": 1, "width": 4, "steps": 1, "epochs": 1, "limit": 64, "batch_size": 32}
    folder = tmp_path / "run"
    fit(TrainConfig(**sizes, model="ssp43", device="cpu", out=str(folder)), progress=False)
    with pytest.raises(ValueError, match=r"block1\.0 .*'ssp43'"):
        convert_checkpoint(folder, tmp_path / "theirs.pt")
    assert not (tmp_path / "theirs.pt").exists()


def test_a_conversion_that_loses_something_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "theirs.pt", double("cifar10"))
    original = models.to_sspnet

    def losing(network: nn.Module) -> dict[str, Tensor]:
        state = dict(original(network))
        state["fc.bias"] = state["fc.bias"] + 1e-6
        return state

    with monkeypatch.context() as patch:
        patch.setattr(models, "to_sspnet", losing)
        with pytest.raises(ValueError, match=r"'fc\.bias' does not come back"):
            convert_checkpoint(source, tmp_path / "ours.pt")
    with monkeypatch.context() as patch:
        patch.setattr(SSPBlock, "forward", half_as_much(SSPBlock.forward))
        with pytest.raises(ValueError, match="logits differ by"):
            convert_checkpoint(source, tmp_path / "ours.pt")
    assert not (tmp_path / "ours.pt").exists()


def half_as_much(forward: Callable[[SSPBlock, Tensor], Tensor]) -> Callable:
    """A fault of the fused layers only."""

    def wrong(block: SSPBlock, x: Tensor) -> Tensor:
        y = forward(block, x)
        return y if select(BLOCK_OPS, (x,)).name == "reference" else 0.5 * y

    return wrong


def test_bits_are_compared() -> None:
    assert conversion._same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert not conversion._same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not conversion._same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not conversion._same_bits(torch.zeros(2), torch.zeros(1, 2))
