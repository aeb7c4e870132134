"""Replayed walks through a chain: the bits of the walks themselves, and only where these would do the same again."""

import gc
import threading
import weakref

import pytest
import torch
from accuracy import generator
from chains import Witness, make, needs_cpu_backend, randomize

import ssp_fused
from ssp_fused import _chain
from ssp_fused._chain import replay

pytestmark = needs_cpu_backend
SHAPE = (3, 8, 7, 6)
CHAINS = (
    ("ssp33",) * 2,
    ("ssp22", "downsample", "adaptive", "ssp54"),
    ("downsample", "midpoint"),
    ("ssp104",),
)
MODES = ("train", "eval", "frozen", "no_grad", "inference")


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


@pytest.fixture
def walks(monkeypatch):
    """A list that grows with every walk: "forward" or "backward"."""
    taken = []

    def counting(kind, name):
        class Counted(kind):
            def run(self, *args):
                taken.append(name)
                return super().run(*args)

        return Counted

    monkeypatch.setattr(_chain, "Forward", counting(_chain.Forward, "forward"))
    monkeypatch.setattr(_chain, "Backward", counting(_chain.Backward, "backward"))
    return taken


def stack_of(kinds, mode="train", seed=0, **options):
    stack = randomize(make(kinds, SHAPE[1], **{"dtype": torch.float32, **options}), seed)
    return stack.train(mode == "train").requires_grad_(mode in ("train", "eval"))


def one_pass(stack, seed, mode="train", x=None):
    """The result, every gradient that is to be had, and the buffers after it; values by the seed."""
    if x is None:
        x = torch.randn(SHAPE, generator=generator(seed))
    grad = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(
        mode, torch.enable_grad
    )
    with grad():
        x = x.detach().clone().requires_grad_(mode in ("train", "eval", "frozen"))
        y = stack(x)
        gradients = ()
        if y.requires_grad:
            dy = torch.randn(y.shape, generator=generator(seed, 1)).to(y.dtype)
            gradients = torch.autograd.grad(y, [x, *filter(requires_grad, stack.parameters())], dy)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in stack.buffers())]


def requires_grad(tensor):
    return tensor.requires_grad


def never(monkeypatch):
    """No walk is replayed from now on."""
    monkeypatch.setattr(replay, "_unwatched", lambda: False)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", CHAINS, ids=str)
def test_a_replay_has_the_bits_of_the_walk(kinds, mode, norm, layout, walks, monkeypatch):
    """In every pass all values are others: of x, of its cotangent, of parameters and of running statistics."""

    def passes():
        stack = stack_of(kinds, mode, norm=norm)
        for seed in range(5):
            x = torch.randn(SHAPE, generator=generator(seed)).contiguous(memory_format=layout)
            yield one_pass(randomize(stack, seed), seed, mode, x)

    replayed = list(passes())
    taken = walks[:]
    never(monkeypatch)
    for found, expected in zip(replayed, passes(), strict=True):
        assert_same(found, expected)
    directions = ["forward", "backward"] if mode in ("train", "eval", "frozen") else ["forward"]
    assert taken == directions * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, walks, monkeypatch):
    stack = stack_of(CHAINS[1], "frozen", dtype=dtype)
    replayed = [one_pass(stack, seed, "frozen", drawn(seed, dtype)) for seed in range(5)]
    assert walks == ["forward", "backward"] * 3
    never(monkeypatch)
    for seed, found in enumerate(replayed):
        assert_same(found, one_pass(stack, seed, "frozen", drawn(seed, dtype)))


def drawn(seed, dtype):
    return torch.randn(SHAPE, generator=generator(seed), dtype=torch.float64).to(dtype)


def tied(stack):
    stack[1].conv1.weight = stack[0].conv1.weight


CHANGES = {
    "train": lambda stack: stack.train(),
    "one norm trains": lambda stack: stack[1].norm2.train(),
    "all is learned": lambda stack: stack.requires_grad_(True),
    "one weight is learned": lambda stack: stack[0].conv2.weight.requires_grad_(True),
    "step size": lambda stack: setattr(stack[0], "step_size", 0.25),
    "tied weights": tied,
    "weights in rows": lambda stack: stack.to(memory_format=torch.channels_last),
    "eps": lambda stack: setattr(stack[1].norm1, "eps", 0.5),
    "recompute": lambda stack: setattr(stack.requires_grad_(True), "recompute", False),
    "activation": lambda stack: setattr(stack[0], "activation", "leaky_relu"),
    "tiles": lambda stack: setattr(stack, "tile", 1),
    "blocks of a node": lambda stack: setattr(stack, "blocks_per_node", 1),
    "fewer blocks": lambda stack: stack.pop(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_no_replay_of_what_was(change, walks, monkeypatch):
    def passes():
        stack = stack_of(("ssp22",) * 2, "frozen")
        mode = "frozen"
        for seed in range(4):
            yield one_pass(stack, seed, mode)
        del walks[:]
        CHANGES[change](stack)
        for seed in range(5):
            yield one_pass(stack, seed, mode)

    replayed = list(passes())
    assert walks
    never(monkeypatch)
    for found, expected in zip(replayed, passes(), strict=True):
        assert_same(found, expected)


def test_tied_weights_are_no_recording_for_others(walks, monkeypatch):
    """Tensors of the same shapes, one of which comes twice: it says nothing of two."""
    same, two = (stack_of(("ssp22",) * 2, "frozen", seed) for seed in range(2))
    tied(same)
    for seed in range(4):
        one_pass(same, seed, "frozen")
    found = one_pass(two, 9, "frozen")
    never(monkeypatch)
    assert_same(found, one_pass(two, 9, "frozen"))


def test_inputs_of_another_shape_and_layout(walks, monkeypatch):
    stack = stack_of(("ssp33",), "frozen")
    inputs = [
        torch.randn(4, 8, 7, 6),
        torch.randn(3, 8, 7, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 8, 6, 7).transpose(2, 3),
        torch.randn(0, 8, 7, 6),
    ]
    for seed in range(4):
        one_pass(stack, seed, "frozen")
    found = [one_pass(stack, 5, "frozen", x) for x in inputs]
    never(monkeypatch)
    for result, x in zip(found, inputs, strict=True):
        assert_same(result, one_pass(stack, 5, "frozen", x))


def test_inputs_of_which_nothing_is_kept(monkeypatch):
    """Without an activation there are no bits: nothing tells an input of 7 x 7 from one of 8 x 8, with stride 2."""
    stack = stack_of(("downsample",), "frozen", activation="identity")
    sizes = (8, 8, 8, 8, 7, 8, 7)

    def passes():
        for seed, size in enumerate(sizes):
            x = torch.randn(2, 8, size, size, generator=generator(seed))
            yield one_pass(stack, seed, "frozen", x)

    found = list(passes())
    never(monkeypatch)
    for results, expected in zip(found, passes(), strict=True):
        assert_same(results, expected)


def test_second_derivatives_after_a_recording(monkeypatch):
    stack = stack_of(("ssp22",), "frozen", dtype=torch.float64)
    for seed in range(4):
        one_pass(stack, seed, "frozen", drawn(seed, torch.float64))

    def second():
        x = drawn(7, torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
        return [dx.detach(), *torch.autograd.grad(dx.square().sum(), x)]

    found = second()
    never(monkeypatch)
    assert_same(found, second())


def test_a_cotangent_in_other_strides(walks, monkeypatch):
    """That of an average pooling is expanded, that of a sum a single number."""
    stack = stack_of(("ssp22", "downsample"), "frozen")

    def gradients():
        x = torch.randn(SHAPE, generator=generator(3)).requires_grad_()
        yield from torch.autograd.grad(stack(x).mean((2, 3)).square().sum(), x)
        yield from torch.autograd.grad(stack(x).sum(), x)

    for seed in range(4):
        one_pass(stack, seed, "frozen")
    found = [g for _ in range(4) for g in gradients()]
    never(monkeypatch)
    assert_same(found, [g for _ in range(4) for g in gradients()])


def test_who_watches_the_ops_sees_the_walk_s(walks):
    """A dispatch mode sees the same ops, whether or not there is a recording, and is not recorded itself."""
    stack = stack_of(("ssp22", "downsample"), "frozen")
    with Witness() as before:
        one_pass(stack, 0, "frozen")
    for seed in range(4):
        one_pass(stack, seed, "frozen")
    with Witness() as after:
        one_pass(stack, 0, "frozen")
    assert before.names == after.names
    assert walks == ["forward", "backward"] * 5


def test_without_gradients_and_with_them(monkeypatch):
    """Of an x that requires a gradient; nothing is kept for it where none is recorded."""
    stack = stack_of(("ssp22",) * 2, "frozen")
    x = torch.randn(SHAPE).requires_grad_()
    for _ in range(4):
        with torch.no_grad():
            stack(x)
    found = [one_pass(stack, seed, "frozen") for seed in range(5)]
    never(monkeypatch)
    for seed, results in enumerate(found):
        assert_same(results, one_pass(stack, seed, "frozen"))


def test_what_is_kept_follows_recompute():
    stack = stack_of(("ssp22",) * 2)
    x = torch.randn(SHAPE)

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()), lambda _: None
        ):
            stack(x)
        return sizes.count(x.numel())

    expected = {}
    for recompute in (True, False):
        stack.recompute = recompute
        expected[recompute] = kept()
        assert [kept() for _ in range(4)] == [expected[recompute]] * 4
    assert expected[False] > expected[True]


def test_batched_cotangents_are_left_to_the_walk(walks):
    """Theirs are tensors of a cotangent's shape that stand for several. The walk refuses them."""
    stack = stack_of(("ssp22",), "frozen")
    for seed in range(4):
        one_pass(stack, seed, "frozen")
    del walks[:]
    x = torch.randn(SHAPE, requires_grad=True)
    y, dy = stack(x), torch.ones(2, *SHAPE)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    assert walks == ["backward"]
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda each: torch.autograd.grad(y, x, each))(dy)
    assert walks == ["backward"] * 2


def test_autocast_and_none_are_kept_apart(monkeypatch):
    stack = stack_of(("ssp22",) * 2, "frozen")

    def passes():
        for seed in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=seed % 2 == 0):
                yield one_pass(stack, seed, "frozen")

    found = list(passes())
    never(monkeypatch)
    for a, b in zip(found, passes(), strict=True):
        assert_same(a, b)


def test_a_recording_keeps_no_tensor():
    stack = stack_of(("ssp22", "downsample"), "frozen")
    x = torch.randn(SHAPE)
    for seed in range(5):
        one_pass(stack, seed, "frozen", x)
    assert any(isinstance(k, replay.Recording) for k in _chain._REPLAYS._kinds.values())
    alive = [weakref.ref(t) for t in (x, *stack.parameters(), *stack.buffers())]
    del stack, x
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_old_kinds_are_forgotten(monkeypatch):
    monkeypatch.setattr(replay, "KINDS", 4)
    stack = stack_of(("ssp22",), "frozen")
    for size in range(2, 9):
        for _ in range(4):
            one_pass(stack, 0, "frozen", torch.randn(size, 8, 5, 5))
    assert len(_chain._REPLAYS._kinds) == 4


def test_threads(monkeypatch):
    """Each records, or replays what another recorded, while others walk."""
    stack = stack_of(("ssp22", "downsample"), "frozen")
    found = {}

    def work(thread):
        found[thread] = [one_pass(stack, seed, "frozen") for seed in range(6)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    never(monkeypatch)
    expected = [one_pass(stack, seed, "frozen") for seed in range(6)]
    assert len(found) == 6
    for passes in found.values():
        for a, b in zip(passes, expected, strict=True):
            assert_same(a, b)


def test_a_tensor_from_nowhere_is_an_error():
    """A walk that reads what it was not given would be replayed with a value that has passed."""
    hidden = torch.ones(2)
    replays = replay.Replays()
    with torch.no_grad():
        for _ in range(2):
            replays.run("key", lambda tensors: ([tensors[0] + hidden], None), [torch.zeros(2)])
        with pytest.raises(KeyError):
            replays.run("key", lambda tensors: ([tensors[0] + hidden], None), [torch.zeros(2)])
