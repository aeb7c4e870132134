"""Training and evaluation by several processes over gloo: as by one; and what happens when one dies or stops."""

import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ssp_fused
from ssp_fused import cli, data
from ssp_fused.adversarial import (
    EvaluationSettings,
    Ranks,
    TrainConfig,
    evaluate_checkpoint,
    fit,
    load_checkpoint,
    pgd_loss,
    train_epoch,
)
from ssp_fused.adversarial import run as run_module
from ssp_fused.adversarial.networks import network_spec
from ssp_fused.adversarial.state import TrainingState
from ssp_fused.adversarial.training import RunningTotals

pytestmark = pytest.mark.skipif(
    not dist.is_available() or ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)

STEPS, BATCH = 20, 16
# Where random starts would differ, and rounding must not decide signs: fp64, from the image itself.
ATTACKED = {"method": "pgd", "steps": 2}
CASES = {
    "sync_bn": {"method": "none", "sync_bn": True},
    "sync_bn, attacked": {**ATTACKED, "sync_bn": True},
    "group norms, attacked, in parts": {**ATTACKED, "norm": "group", "accumulate": 2},
}


def step_losses(changes: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss over all processes of each of some steps, and the network that they leave."""
    ranks = Ranks.current()
    attacked = changes["method"] == "pgd"
    torch.set_default_dtype(torch.float64 if attacked else torch.float32)
    splits = data.load("digits")
    config = TrainConfig(blocks=1, width=8, device="cpu", lr=0.05, **changes).resolved()
    state = TrainingState(config, network_spec(config, splits), STEPS, ranks)
    train = splits.train.take(STEPS * BATCH)
    batches = train.batches(BATCH, shuffle_seed=1, part=ranks.part)
    loss = partial(pgd_loss, **config.attack(), random_start=False) if attacked else state.loss
    sums = [0.0]

    def note(_: int, totals: RunningTotals) -> None:
        sums.append(totals.over(ranks).state_dict()["sums"][0].item())

    train_epoch(
        state.parallel,
        ((x.to(torch.get_default_dtype()), y) for x, y in batches),
        state.optimizer,
        loss,
        scheduler=state.scheduler,
        accumulate=config.accumulate,
        on_batch=note,
    )
    means = [(after - before) / BATCH for before, after in itertools.pairwise(sums)]
    return means, dict(state.model.state_dict())


def worker(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    found = {name: step_losses(changes) for name, changes in CASES.items()}
    if rank == 0:
        torch.save(found, folder / "found")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(2, folder), nprocs=2)
    return torch.load(folder / "found", weights_only=True)


@pytest.fixture
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_default_dtype")
def test_two_processes_train_as_one(of_two_processes: dict[str, Any], name: str) -> None:
    losses, network = of_two_processes[name]
    # The parts of the group norms' case are each of one quarter of a batch: of one process, four.
    alone = {**CASES[name], "accumulate": 2 * CASES[name].get("accumulate", 1)}
    expected, expected_network = step_losses(CASES[name] if "sync" in name else alone)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(network, expected_network, rtol=1e-3, atol=1e-4)


OPTIONS = (
    *("--blocks", "1", "--width", "4", "--steps", "1", "--epochs", "3", "--limit", "128"),
    *("--batch-size", "16", "--device", "cpu", "--sync-bn", "--save-every", "3"),
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "ssp_fused.cli", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(ssp_fused.__file__).parent.parent),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        },
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The launched processes."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def after_first_epoch(launcher: subprocess.Popen, act: Callable[[], None]) -> tuple[str, str]:
    """Both outputs of a run on which something acts when its first epoch has ended."""
    out = ""
    for line in launcher.stdout:
        out += line
        if line.startswith("epoch 1/"):
            act()
            break
    rest, errors = launcher.communicate(timeout=120)
    return out + rest, errors


def position(folder: Path) -> tuple[int, int]:
    state = torch.load(folder / "last.pt", weights_only=True)
    return state["epoch"], state["training"]["totals"]["batches"]


def test_a_killed_process_ends_the_run_and_another_number_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    launcher = torchrun("train", *OPTIONS, "--epochs", "50", "--out", str(folder))
    out, errors = after_first_epoch(
        launcher, lambda: os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    )
    assert launcher.returncode != 0
    assert out.count("epoch 1/50") == 1 and "2 processes" in out
    told = [line for line in errors.splitlines() if line.startswith("ssp-fused")]
    assert len(told) == 1, errors
    assert re.match(
        r"ssp-fused \(rank 0\): error: another of the 2 processes is gone in epoch \d+; to go on "
        rf"from the last saved state: ssp-fused train --resume {re.escape(str(folder))} \(",
        told[0],
    )
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".part")]
    epochs, batches = position(folder)
    assert epochs >= 1 and batches in (0, 3, 6)
    load_checkpoint(folder / "best.pt")
    shorten(folder, epochs + 1)
    torch.set_num_threads(1)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert f"going on with epoch {epochs + 1} after batch {batches} of 8" in capsys.readouterr().out
    assert position(folder) == (epochs + 1, 0)


def shorten(folder: Path, epochs: int) -> None:
    """Have the run end after so many epochs."""
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "epochs": epochs}))
    state = torch.load(folder / "last.pt", weights_only=True)
    state["config"]["epochs"] = epochs
    torch.save(state, folder / "last.pt")


def test_ctrl_c_stops_all_processes_after_the_same_batch_and_two_go_on(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    launcher = torchrun("train", *OPTIONS, "--out", str(folder))
    # To one of them alone: the other one learns of it.
    _, errors = after_first_epoch(launcher, lambda: os.kill(ranks_of(launcher)[1], signal.SIGINT))
    told = {line for line in errors.splitlines() if line.startswith("ssp-fused")}
    epochs, batches = position(folder)
    assert told == {
        f"ssp-fused (rank {rank}): interrupted: stopped in epoch {epochs + 1} after batch {batches} of "
        f"8, state saved; to go on: ssp-fused train --resume {folder}"
        for rank in (0, 1)
    }
    for options in (("--resume", str(folder)), (*OPTIONS, "--out", str(whole))):
        launcher = torchrun("train", *options)
        out, errors = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, errors
        assert out.count("best epoch") == 1 and "ssp-fused" not in errors
    found, expected = (
        torch.load(run / "last.pt", weights_only=True)["model"] for run in (folder, whole)
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_two_processes_evaluate_as_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run = tmp_path / "run"
    fit(TrainConfig(blocks=1, width=4, steps=1, epochs=1, limit=128, device="cpu", out=str(run)))
    attacks = ["pgd-2x2", *(["apgd-ce"] if importlib.util.find_spec("pyautoattack") else [])]
    settings = EvaluationSettings(limit=36, batch_size=8, device="cpu", seed=5)
    alone = evaluate_checkpoint(run, attacks, settings, transfer=True, masking_images=12)
    options = ("--limit", "36", "--batch-size", "8", "--device", "cpu", "--seed", "5")
    more = ("--transfer", "--masking-images", "12", "--attack", ",".join(attacks))
    launcher = torchrun("evaluate", str(run), *options, *more, "--out", str(tmp_path / "two.json"))
    out, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    assert out.count("gradient masking") == 1
    together = json.loads((tmp_path / "two.json").read_text())
    assert (alone.pop("processes"), together.pop("processes")) == (1, 2)
    assert together == alone


def test_what_processes_cannot_share_is_named() -> None:
    config = TrainConfig(device="cpu")
    with pytest.raises(ValueError, match="divide among 3 processes, got batches of 32 images"):
        run_module._check_processes(config, 32, Ranks(0, 3))
    with pytest.raises(ValueError, match="device must be cpu or cuda with several processes"):
        run_module._check_processes(TrainConfig(device="cuda:1"), 33, Ranks(0, 3))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_of_batches_are_the_batches(count: int) -> None:
    images = data.load("digits").train.take(50)
    options = {"shuffle_seed": 3, "augment": "crop-flip", "augment_seed": 4}
    whole = list(images.batches(24, **options))
    parts = [list(images.batches(24, **options, part=(i, count))) for i in range(count)]
    for index, (x, y) in enumerate(whole):
        sizes = [len(part[index][1]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([part[index][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[index][1] for part in parts]), y)
    with pytest.raises(ValueError, match=r"part must be \(index, count\)"):
        images.batches(24, part=(count, count))
