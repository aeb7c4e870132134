"""Losses, epochs, whole runs and their files."""

import errno
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssp_fused import data, models
from ssp_fused.adversarial import (
    TrainConfig,
    checkpoint,
    clean_loss,
    evaluate,
    fgsm,
    fit,
    load_checkpoint,
    named_attacks,
    pgd,
    pgd_loss,
    save_checkpoint,
    train_epoch,
)
from ssp_fused.adversarial import run as run_module
from ssp_fused.adversarial.networks import build_network, network_spec

ATTACK = {"eps": 0.1, "step_size": 0.05, "steps": 2}


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return models.sspnet_cifar("ssp22", 1, width=4, in_channels=1)


def batch(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return next(data.load("digits").train.batches(count))


def config(out: Path, **changes) -> TrainConfig:
    small = {"blocks": 1, "width": 4, "epochs": 2, "batch_size": 32, "limit": 256, "steps": 2}
    return TrainConfig(**{"device": "cpu", "out": str(out), **small, **changes})


def test_losses_are_cross_entropy_on_what_they_say() -> None:
    model = small_network().train()
    x, y = batch()
    twin = small_network().train()
    loss, logits = clean_loss(model, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(twin(x), y))
    assert not logits.requires_grad

    model, twin = small_network().train(), small_network().train()
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    loss, logits = pgd_loss(model, x, y, generator=generators[0], **ATTACK)
    x_adv = pgd(twin, x, y, generator=generators[1], **ATTACK)
    expected = twin(x_adv)
    torch.testing.assert_close(logits, expected.detach())
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))
    # Running statistics saw the attacked batch, and nothing of the attack.
    assert model.block1[0].norm1.num_batches_tracked == 2
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model = small_network().train()
    pgd_loss(model, x, y, bn_mode="train", **ATTACK)
    assert model.block1[0].norm1.num_batches_tracked == 2 * (1 + ATTACK["steps"])


def test_train_epoch_is_the_plain_loop() -> None:
    batches = list(data.load("digits").train.take(100).batches(40))
    model, twin = small_network(), small_network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []
    result = train_epoch(
        model.eval(),
        batches,
        optimizer,
        clean_loss,
        scheduler=scheduler,
        on_batch=lambda images, totals: seen.append((images, totals.images)),
    )
    loss_sum = hits = 0
    for index, (x, y) in enumerate(batches):
        plain = torch.optim.SGD(twin.parameters(), lr=0.05 * 0.5**index)
        plain.zero_grad()
        logits = twin(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        plain.step()
        loss_sum += loss.item() * len(y)
        hits += (logits.argmax(1) == y).sum().item()
    for trained, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(trained, expected)
    assert result.loss == pytest.approx(loss_sum / 100, rel=1e-5)
    assert result.accuracy == pytest.approx(hits / 100)
    assert result.images == 100 and result.seconds > 0
    assert seen == [(40, 40), (40, 80), (20, 100)]
    with pytest.raises(ValueError, match="no batch"):
        train_epoch(model, [], optimizer, clean_loss)


def test_evaluate_counts_in_eval_mode_and_restores_modes() -> None:
    model = small_network().train()
    model.block2[0].norm1.eval()
    modes = [module.training for module in model.modules()]
    batches = list(data.load("digits").val.batches(70))
    buffers = [b.clone() for b in model.buffers()]
    result = evaluate(model, batches, named_attacks(["fgsm", "pgd-20"], eps=0.1, step_size=0.03))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert list(result) == ["clean", "fgsm", "pgd-20", "worst"]
    model.eval()
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        clean = (model(x).argmax(1) == y).float().mean().item()
        attacked = (model(fgsm(model, x, y, eps=0.1)).argmax(1) == y).float().mean().item()
    assert result["clean"] == pytest.approx(clean)
    assert result["fgsm"] == pytest.approx(attacked)
    with pytest.raises(ValueError, match="no batch"):
        evaluate(model, [])

    def broken(*_):
        raise ArithmeticError

    model.train()
    with pytest.raises(ArithmeticError):
        evaluate(model, batches, {"broken": broken})
    assert all(module.training for module in model.modules())


def test_a_run_and_its_files(tmp_path: Path) -> None:
    splits = data.load("digits")
    # Nothing may be chosen on the test set: a run does without it.
    result = fit(config(tmp_path / "run", epochs=3), replace(splits, test=None), progress=False)
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt",
        "config.json",
        "last.pt",
        "metrics.jsonl",
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result["epochs"] and [line["epoch"] for line in lines] == [1, 2, 3]
    assert result["best"]["val_robust"] == max(line["val_robust"] for line in lines)
    assert result["last"] == lines[-1]
    assert lines[0]["lr"] == 0.1 > lines[1]["lr"] > lines[2]["lr"]
    assert all(0 <= line["val_robust"] <= line["val_clean"] <= 1 for line in lines)
    saved = TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert saved == config(folder, epochs=3).resolved()
    model, loaded, state = load_checkpoint(folder / "best.pt")
    assert loaded == saved and state["metrics"] == result["best"]
    assert not model.training
    clean = evaluate(model, splits.val.take(100).batches(500))["clean"]
    assert clean == pytest.approx(result["best"]["val_clean"])
    with pytest.raises(ValueError, match=r"already holds a training run.*--resume"):
        fit(config(folder), progress=False)


@pytest.mark.parametrize("method", ["pgd", "none"])
def test_the_best_epoch_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    judged = "val_clean" if method == "none" else "val_robust"
    scores = iter([0.2, 0.5, 0.5, 0.4])

    def scripted(*_) -> dict[str, float]:
        # The other measure gets better throughout, and must not count.
        other = {"val_clean": 0.9, "val_robust": 0.9}
        return {**other, judged: next(scores)}

    monkeypatch.setattr(run_module, "_validate", scripted)
    result = fit(config(tmp_path, method=method, epochs=4, limit=64), progress=False)
    assert result["best"]["epoch"] == 2 and result["last"]["epoch"] == 4
    assert load_checkpoint(tmp_path / "best.pt")[2]["epoch"] == 2
    assert load_checkpoint(tmp_path / "last.pt")[2]["epoch"] == 4


def test_every_epoch_and_seed_has_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts = {}
    original = run_module.train_epoch

    def spy(model, batches, *arguments, **options):
        batches = list(batches)
        firsts.setdefault(label, []).append(torch.cat([x for x, _ in batches]))
        return original(model, batches, *arguments, **options)

    monkeypatch.setattr(run_module, "train_epoch", spy)
    for label, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(config(tmp_path / label, seed=seed, limit=64), progress=False)
    for first, second in zip(firsts["a"], firsts["b"], strict=True):
        assert torch.equal(first, second)
    orders = [*firsts["a"], *firsts["c"]]
    for index, order in enumerate(orders):
        assert not any(torch.equal(order, other) for other in orders[:index])


def test_augmentation_differs_from_epoch_to_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = data.ImageSet.batches

    def spy(self, batch_size: int, **options):
        seen.append(options)
        return original(self, batch_size, **options)

    monkeypatch.setattr(data.ImageSet, "batches", spy)
    fit(config(tmp_path, augment="crop", limit=64), progress=False)
    training = [options for options in seen if "augment" in options]
    assert [options["augment"] for options in training] == ["crop", "crop"]
    assert all(options["drop_last"] and options["start"] == 0 for options in training)
    seeds = {options[name] for options in training for name in ("augment_seed", "shuffle_seed")}
    assert len(seeds) == 4


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "last.pt")[0].state_dict()


def test_seeds_decide_a_run(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        # What was drawn before must not matter.
        torch.rand(seed)
        fit(config(tmp_path / name, seed=seed, epochs=1), progress=False)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_clean_training_learns_and_is_judged_on_clean_images(tmp_path: Path) -> None:
    run = config(
        tmp_path, method="none", width=16, epochs=3, limit=None, schedule="onecycle", batch_size=64
    )
    result = fit(run, progress=False)
    assert "val_robust" not in result["best"]
    assert result["best"]["val_clean"] == max(e["val_clean"] for e in result["epochs"]) > 0.9


def test_a_diverged_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"epoch 1 is (nan|inf)"):
        fit(config(tmp_path, lr=1e30, method="none"), progress=False)
    assert not (tmp_path / "best.pt").exists()


@pytest.mark.parametrize(
    ("method", "bn_mode", "trained", "told"),
    [
        ("pgd", "eval", 0.7, True),
        ("pgd", "eval", 0.5, False),
        ("pgd", "train", 0.7, False),
        ("none", "eval", 0.7, False),
    ],
)
def test_a_gap_between_the_modes_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    bn_mode: str,
    trained: float,
    told: bool,
) -> None:
    real = run_module._metrics
    seen = {"train_accuracy": trained, "val_clean": 0.4}
    monkeypatch.setattr(run_module, "_metrics", lambda *args: {**real(*args), **seen})
    fit(config(tmp_path, epochs=1, method=method, bn_mode=bn_mode), progress=False)
    assert ("--bn-mode train attacks the latter" in caplog.text) is told


def test_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(config(tmp_path, epochs=1))
    out = capsys.readouterr().out
    assert "limited to 256 training and 100 validation images" in out
    assert "epoch 1/1: loss" in out and "robust" in out and "img/s (best)" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "cifar"}, "data set 'cifar'; known: digits.*folder:PATH"),
        ({"augment": "flip"}, "augment 'flip'; known: none, crop, crop-flip"),
        ({"network": "wide"}, "network 'wide'; known: cifar, mnist, tiny_imagenet"),
        ({"network": "mnist"}, "at least 10x10 pixels, those of digits are 8x8"),
        ({"network": "mnist", "model": "ssp22,ssp22,ssp22"}, "scheme must be one name or 1"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"image_size": 16}, "image_size: only for"),
        ({"download": True}, "download: there is nothing"),
        ({"method": "awp"}, "method 'awp'; known: none, pgd, trades, mart, fgsm-rs, n-fgsm, free"),
        ({"schedule": "step"}, "schedule 'step'"),
        ({"norm": "layer"}, "norm 'layer'; known: batch, group, instance"),
        ({"model": "vgg"}, "model 'vgg'; known: res"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"epochs": -1}, "epochs"),
        ({"limit": 0}, "limit"),
        ({"eps": -0.1}, "eps must not be negative"),
        ({"step_size": float("nan")}, "step_size"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "meta"}, "device must be cpu or cuda"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(config(tmp_path / "run", **change), progress=False)
    assert not (tmp_path / "run").exists()


def test_defaults_follow_the_data() -> None:
    fashion = TrainConfig(data="fashion-mnist", model="ark").resolved()
    assert (fashion.eps, fashion.step_size, fashion.width) == (0.1, 0.02, 64)
    assert (fashion.network, fashion.augment) == ("mnist", "none")
    assert fashion.out == "runs/fashion-mnist-ark-pgd-seed0"
    assert TrainConfig(data="mnist", eps=0.2).resolved().eps == 0.2
    assert TrainConfig.from_dict(fashion.to_dict()) == fashion
    with pytest.raises(ValueError, match="colour"):
        TrainConfig.from_dict({"colour": "red"})


@pytest.mark.parametrize(
    ("name", "network", "attack"),
    [
        ("cifar10", "cifar", (8 / 255, 2 / 255, 7)),
        ("cifar100", "cifar", (8 / 255, 2 / 255, 7)),
        ("tiny-imagenet", "tiny_imagenet", (4 / 255, 1 / 255, 5)),
        ("folder:some/where", "cifar", (8 / 255, 2 / 255, 7)),
    ],
)
def test_defaults_of_coloured_images(name: str, network: str, attack: tuple) -> None:
    config = TrainConfig(data=name).resolved()
    assert (config.network, config.blocks, config.width) == (network, 6, 16)
    assert (config.eps, config.step_size, config.steps) == attack
    assert config.augment == "crop-flip"
    own = TrainConfig(data=name, augment="none", network="cifar").resolved()
    assert (own.augment, own.network) == ("none", "cifar")


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"data": "folder:/a/my pictures"}, "folder-my_pictures-ssp2-pgd-seed0"),
        ({"data": "folder:/a/b/"}, "folder-b-ssp2-pgd-seed0"),
        ({"data": "folder:/a/../"}, "folder--ssp2-pgd-seed0"),
        ({"model": "ssp22, adaptive,euler"}, "digits-ssp22+adaptive+euler-pgd-seed0"),
    ],
)
def test_run_folders_have_sane_names(settings: dict, folder: str) -> None:
    assert TrainConfig(**settings).resolved().out == f"runs/{folder}"


@pytest.mark.parametrize("network", ["cifar", "tiny_imagenet"])
def test_networks_are_made_again_from_their_specs(network: str) -> None:
    config = TrainConfig(model="ark", network=network).resolved()
    spec = network_spec(config, data.load("digits"))
    schemes = ["adaptive", "euler", "ssp22", "ssp22"]
    assert spec["arguments"]["scheme"] == schemes[: 3 if network == "cifar" else 4]
    assert json.loads(json.dumps(spec)) == spec
    assert isinstance(build_network(spec), models.SSPNet)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def failing(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", failing)
    with pytest.raises(type(error)):
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    # The new file takes the old one's name; the old one's bytes are never written over.
    old = path.read_bytes()
    with path.open("rb") as reader:
        save_checkpoint(path, {"epoch": 3})
        assert reader.read() == old
    assert torch.load(path, weights_only=True) == {"epoch": 3}


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    fit(config(tmp_path / "run", epochs=1, limit=64), progress=False)
    good = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    path = tmp_path / "bad.pt"
    with pytest.raises(FileNotFoundError, match=r"bad\.pt"):
        load_checkpoint(path)
    whole = (tmp_path / "run" / "best.pt").read_bytes()
    hostile = pickle.dumps({"model": Hostile()}, protocol=2)
    for contents in (b"", b"garbage", whole[: len(whole) // 2], hostile):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"bad\.pt: not a checkpoint"):
            load_checkpoint(path)
    torch.save({"epoch": 1}, path)
    with pytest.raises(ValueError, match="lacks model, network, config, metrics"):
        load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="lacks model"):
        load_checkpoint(path)
    state = dict(good["model"])
    state["foreign.weight"] = state.pop("fc.weight")
    torch.save({**good, "model": state}, path)
    with pytest.raises(ValueError, match=r'bad\.pt: .*"fc\.weight".*"foreign\.weight"'):
        load_checkpoint(path)
    wrong = {"network": "cifar", "arguments": {"depth": 3}}
    for key, value, message in (
        ("network", {"network": "vgg", "arguments": {}}, "network 'vgg'"),
        ("network", wrong, r"bad\.pt: .*'depth'"),
        ("network", [1], r"bad\.pt: "),
        ("model", [1], r"bad\.pt: .*dict-like"),
        ("config", {"colour": "red"}, r"bad\.pt: .*colour"),
    ):
        torch.save({**good, key: value}, path)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)
