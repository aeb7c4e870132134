"""When a captured attack is replayed and when it is captured anew: the cache, without a GPU."""

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import ssp_fused
from ssp_fused import models
from ssp_fused.adversarial import GraphCache, clear_graphs, graphs, pgd, pgd_loss, trades_loss

ATTACK = {"eps": 0.1, "step_size": 0.04, "steps": 2}


class Recording:
    """As a CUDA graph: replays on the memory that it was captured with, in the modes of then."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.function = function
        self.inputs = [tensor.clone() for tensor in inputs]
        self.replays = 0

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        self.replays += 1
        for own, given in zip(self.inputs, inputs, strict=True):
            assert (own.shape, own.stride(), own.dtype) == (
                given.shape,
                given.stride(),
                given.dtype,
            )
            own.copy_(given)
        return self.function(*self.inputs).clone()


class Recorder:
    """Makes recordings in place of CUDA graphs, and counts them."""

    def __init__(self) -> None:
        self.made: list[Recording] = []

    def __call__(
        self, model: nn.Module, function: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> Recording:
        self.made.append(Recording(function, inputs))
        return self.made[-1]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(graphs, "CACHE", GraphCache(recorder))
    return recorder


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.sspnet_cifar("ssp22", 1, width=8, in_channels=1).train()


def batch(count: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(count) % 10


def attacked(model: nn.Module, x: Tensor, y: Tensor, **changes) -> tuple[Tensor, Tensor]:
    """Replayed, and not, from the same start."""
    return tuple(
        pgd(
            model,
            x,
            y,
            **{**ATTACK, **changes},
            graph=graph,
            generator=torch.Generator().manual_seed(2),
        )
        for graph in (True, False)
    )


def test_one_capture_serves_other_images_labels_and_weights(recorder: Recorder) -> None:
    model = network()
    for seed in (1, 2, 3):
        x, y = batch(seed=seed)
        found, expected = attacked(model, x, y.roll(seed))
        assert torch.equal(found, expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
            model.block1[0].norm1.running_mean.add_(0.1)
    assert [recording.replays for recording in recorder.made] == [3]


def replace_parameter(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)


def replace_buffer(model: nn.Module) -> None:
    norm = model.block1[0].norm1
    norm.running_var = norm.running_var * 4


def replace_module(model: nn.Module) -> None:
    model.avg = nn.AdaptiveMaxPool2d(1)


def change_setting(model: nn.Module) -> None:
    model.block1[0].norm1.eps = 0.5


def add_hook(model: nn.Module) -> None:
    model.fc.register_forward_hook(lambda _module, _inputs, z: -z)


MODEL_CHANGES = [replace_parameter, replace_buffer, replace_module, change_setting, add_hook]


@pytest.mark.parametrize("change", MODEL_CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_captured_anew(recorder: Recorder, change: Callable) -> None:
    model = network()
    x, y = batch()
    attacked(model, x, y)
    change(model)
    found, expected = attacked(model, x, y)
    assert torch.equal(found, expected)
    assert len(recorder.made) == 2


def half_loss(logits: Tensor, y: Tensor) -> Tensor:
    return logits.square().sum(dim=1)


OTHER_ATTACKS = {
    "eps": {"eps": 0.05},
    "step": {"step_size": 0.01},
    "steps": {"steps": 3},
    "norm": {"norm": "l2"},
    "bounds": {"bounds": (-1, 1)},
    "loss": {"loss": "margin"},
    "callable": {"loss": half_loss},
    "mode": {"bn_mode": "train"},
    "restarts": {"restarts": 2},
    "fewer images": dict(zip("xy", batch(3), strict=True)),
    "larger images": {"x": batch()[0].repeat(1, 1, 2, 2)},
    "other strides": {"x": batch()[0].transpose(2, 3)},
}


@pytest.mark.parametrize("change", OTHER_ATTACKS.values(), ids=OTHER_ATTACKS)
def test_another_attack_is_captured_for_itself(recorder: Recorder, change: dict) -> None:
    model = network()
    plain = {"x": batch()[0], "y": batch()[1]}
    attacked(model, **plain)
    attacked(model, **{**plain, **change})
    assert len(recorder.made) == 2
    # Both are kept.
    attacked(model, **plain)
    assert len(recorder.made) == 2


def test_dtype_autocast_backend_and_numerics_are_parts_of_the_key(recorder: Recorder) -> None:
    model = network()
    x, y = batch()

    def run() -> int:
        pgd(model, x, y, **ATTACK, graph=True)
        return len(recorder.made)

    assert run() == 1
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert run() == (2 if dtype == torch.bfloat16 else 3)
    with ssp_fused.use_backend("reference"):
        assert run() == 4
    assert run() == 4
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert run() == 5
    finally:
        torch.set_float32_matmul_precision(before)
    model.double()
    x = x.double()
    assert run() == 6


def test_the_capture_used_least_recently_goes() -> None:
    recorder = Recorder()
    cache, model = GraphCache(recorder, size=2), network()

    def run(key: str) -> int:
        cache.run(model, torch.neg, (torch.ones(2),), key=key)
        return len(recorder.made)

    assert [run(key) for key in "abacab"] == [1, 2, 2, 3, 3, 4]
    other = network()
    cache.run(other, torch.neg, (torch.ones(2),), key="b")
    assert len(recorder.made) == 5 and run("b") == 5
    cache.clear()
    assert run("b") == 6


def test_captures_go_with_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(model: nn.Module, function: Callable, inputs: Sequence[Tensor]) -> Recording:
        # As a graph does, this one keeps neither function nor model.
        return Recording(lambda start, *_: start, inputs)

    cache = GraphCache(capture)
    monkeypatch.setattr(graphs, "CACHE", cache)
    model = network()
    pgd(model, *batch(), **ATTACK, graph=True)
    (captures,) = cache._entries.values()
    recording = weakref.ref(next(iter(captures.values())))
    del captures
    assert recording() is not None
    clear_graphs()
    gc.collect()
    assert recording() is None
    pgd(model, *batch(), **ATTACK, graph=True)
    model = weakref.ref(model)
    gc.collect()
    assert model() is None and not len(cache._entries)


def test_running_statistics_move_as_without_a_graph(recorder: Recorder) -> None:
    model, twin = network(), network()
    x, y = batch()
    for graph, net in ((True, model), (False, twin)):
        generator = torch.Generator().manual_seed(2)
        for _ in range(2):
            pgd(net, x, y, **ATTACK, bn_mode="train", graph=graph, generator=generator)
    for found, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_losses_replay_their_attacks(recorder: Recorder) -> None:
    for loss in (pgd_loss, trades_loss):
        recorder.made.clear()
        model, twin = network(), network()
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (model, twin)]
        for seed in range(3):
            results = []
            for graph, net, optimizer in (
                (True, model, optimizers[0]),
                (False, twin, optimizers[1]),
            ):
                generator = torch.Generator().manual_seed(seed)
                value, _ = loss(net, *batch(seed=seed), **ATTACK, graph=graph, generator=generator)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                results.append(value)
            assert torch.equal(*results)
        # The clean prediction that TRADES climbs away from is an input, not a new function.
        assert [recording.replays for recording in recorder.made] == [3]


def test_without_cuda_there_is_an_error_and_the_model_is_left_alone() -> None:
    model = network()
    with pytest.raises(ValueError, match="graph must go with images on a cuda device, got cpu"):
        pgd(model, *batch(), **ATTACK, graph=True)
    assert all(p.requires_grad for p in model.parameters()) and model.training
    with pytest.raises(ValueError, match="early_stop must go without graph"):
        pgd(model, *batch(), **ATTACK, graph=True, early_stop=True)
