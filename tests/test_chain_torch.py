"""Stacks of blocks living with the rest of PyTorch: compilers, autocast, checkpointing, processes, copies."""

import copy
import io
import pickle

import published
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accuracy import generator
from chains import (
    ODD,
    assert_same,
    cotangent,
    gradients,
    judge,
    make,
    needs_cpu_backend,
    randomize,
    results,
    twins,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import ssp_fused
from ssp_fused.models import sspnet_cifar
from ssp_fused.nn import SSPStack

pytestmark = needs_cpu_backend

KINDS = ("ssp22", "downsample", "adaptive")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed, 10), dtype=torch.float64).to(dtype)


def step(stack, forward, x):
    """Output, buffers and those gradients that are wanted."""
    stack.zero_grad()
    return results(stack, x.clone(), forward)


@pytest.mark.parametrize(
    ("mode", "batches"), [("train", (3, 4, 6)), ("eval", (3, 3)), ("frozen", (3, 4))], ids=str
)
def test_compiles_without_a_graph_break(mode, batches):
    """Bit for bit what runs uncompiled; also for a batch of another size, then of any size."""
    torch._dynamo.reset()
    stack, other = twins(KINDS, training=mode == "train")
    for module in (stack, other):
        module.requires_grad_(mode != "frozen")
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for batch in batches:
        x = normal(batch, *ODD[1:], seed=batch)
        assert_same(step(other, compiled, x), step(stack, stack, x), f"batch of {batch}:")


def test_compiles_by_inductor():
    """A training step, with the input's gradient."""
    torch._dynamo.reset()
    stack, other = twins(("euler", "euler"), dtype=torch.float32)
    compiled = torch.compile(other, fullgraph=True)
    x = normal(*ODD, dtype=torch.float32)
    values, expected = step(other, compiled, x), step(stack, stack, x)
    assert_same(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, mode):
    """The rule, against module by module under autocast; dtypes of results as there."""
    for kinds in (("ssp33",) * 3, KINDS):
        judge(
            kinds,
            ODD,
            training=mode == "train",
            frozen=mode == "frozen",
            scale=0.1,
            autocast=dtype,
        )


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_under_autocast(dtype, norm, mode):
    """As module by module, for an input in fp32, in autocast's dtype and in fp64."""
    for given in (torch.float32, dtype, torch.float64):
        wide = torch.float64 if given == torch.float64 else torch.float32
        fused, plain = twins(KINDS, training=mode == "train", dtype=wide, norm=norm)
        dtypes = []
        for stack, backend in ((fused, "cpu"), (plain, "reference")):
            stack.requires_grad_(mode != "frozen")
            with ssp_fused.use_backend(backend), torch.autocast("cpu", dtype=dtype):
                x = normal(*ODD, dtype=given).requires_grad_()
                y = stack(x)
            y.sum().backward()
            grads = [p.grad.dtype for p in stack.parameters() if p.requires_grad]
            dtypes.append((y.dtype, x.grad.dtype, grads))
        assert dtypes[0] == dtypes[1], given


def test_autocast_of_a_network():
    """The stem hands the first stack an activation in the narrow dtype."""
    fused = sspnet_cifar("ssp22", 1)
    plain = copy.deepcopy(fused)
    x = normal(4, 3, 16, 16, dtype=torch.float32).sigmoid()
    outcomes = []
    for network, backend in ((fused, "cpu"), (plain, "reference")):
        with ssp_fused.use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(x)
        y.float().square().sum().backward()
        outcomes.append((y, [p.grad for p in network.parameters()]))
    (y, gradients), (expected, expected_gradients) = outcomes
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == wanted.dtype
        assert (gradient - wanted).norm() <= 0.1 * wanted.norm() + 0.02


def test_autocast_ends_with_its_region():
    """A backward pass inside or outside the region: the same bits."""
    stack, _ = twins(KINDS, dtype=torch.float32)
    found = []
    for inside in (True, False):
        x = normal(*ODD, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = stack(x)
            wanted = (x, *stack.parameters())
            if inside:
                found.append(torch.autograd.grad(y, wanted, cotangent(y)))
        if not inside:
            found.append(torch.autograd.grad(y, wanted, cotangent(y)))
    assert all(map(torch.equal, *found))


def test_grad_scaler_skips_a_step_with_infinities():
    fused, plain = twins(("ssp33", "adaptive"), dtype=torch.float32, training=False)
    histories = []
    for stack, backend in ((fused, "cpu"), (plain, "reference")):
        optimizer = torch.optim.SGD(stack.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scales = []
        with ssp_fused.use_backend(backend):
            for k in range(3):
                before = copy.deepcopy(stack.state_dict())
                optimizer.zero_grad()
                x = normal(*ODD, seed=k, dtype=torch.float32)
                loss = stack(x).square().mean() * (float("inf") if k == 1 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
                moved = not torch.equal(before["0.conv1.weight"], stack[0].conv1.weight)
                assert moved == (k != 1)
        histories.append(scales)
    assert histories[0] == histories[1] == [2.0**10, 2.0**9, 2.0**9]
    assert_same(fused.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
def test_checkpoint(reentrant, head):
    """Gradients without it; running statistics as eager modules have them under it: two batches seen."""
    fused, plain = twins(KINDS)
    free, _ = twins(KINDS)
    after = torch.sigmoid if head else lambda y: y

    def checkpointed(stack):
        return lambda x: checkpoint(lambda x: after(stack(x)), x, use_reentrant=reentrant)

    def found(stack, forward):
        x = normal(*ODD).requires_grad_()
        y = forward(x)
        y.backward(cotangent(y))
        return {"x": x.grad} | {name: p.grad for name, p in stack.named_parameters()}

    values = found(fused, checkpointed(fused))
    assert_same(values, found(free, lambda x: after(free(x))))
    with ssp_fused.use_backend("reference"):
        expected = found(plain, checkpointed(plain))
    assert_same(values, expected, **CLOSE)
    assert_same(dict(fused.named_buffers()), dict(plain.named_buffers()), **CLOSE)


class Classifier(nn.Module):
    def __init__(self, trunk, channels):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(channels, 3)

    def forward(self, x):
        return self.head(self.trunk(x).mean((2, 3)))


def classifier(kind):
    if kind == "own":
        torch.manual_seed(0)
        return Classifier(randomize(make(KINDS), 0, scale=0.2), 6).double()
    network = published.network("cifar10", ("ssp2", "ark", "res"), init_channel=4, num_classes=3)
    return published.randomized(network, 0).double()


def train(kind, wrap, share):
    """Losses of three steps, and what the model has become."""
    model = classifier(kind)
    if kind == "published":
        model = ssp_fused.convert(model)
    model = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for k in range(3):
        x = normal(6, 5 if kind == "own" else 3, 8, 8, seed=k)[share]
        labels = torch.arange(6)[share] % 3
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return torch.stack(losses), gradients, model.state_dict()


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def wrap(model):
        # Wrapped first: on the CPU, DistributedDataParallel refuses torch's own SyncBatchNorm.
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return parallel

    found = {}
    for kind in ("own", "published"):
        losses, *rest = train(kind, wrap, slice(3 * rank, 3 * rank + 3))
        dist.all_reduce(losses)
        found[kind] = (losses / 2, *rest)
    if rank == 0:
        torch.save(found, folder / "result")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not available")
def test_distributed_data_parallel(tmp_path):
    """Two processes with half the batch each: losses, gradients, parameters and statistics of one with all of it."""
    mp.spawn(worker, args=(tmp_path,), nprocs=2)
    found = torch.load(tmp_path / "result", weights_only=True)
    for kind, (losses, *tables) in found.items():
        expected_losses, *expected = train(kind, lambda model: model, slice(None))
        torch.testing.assert_close(losses, expected_losses, **CLOSE)
        for table, values in zip(tables, expected, strict=True):
            bare = {name.removeprefix("module."): value for name, value in table.items()}
            assert_same(bare, dict(values), kind, **CLOSE)


def saved_and_loaded(stack):
    file = io.BytesIO()
    torch.save(stack, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(duplicate):
    """Also of a stack that has run, with options of its own."""
    stack, _ = twins(KINDS)
    stack.recompute = False
    stack(normal(*ODD)).sum().backward()
    other = duplicate(stack)
    assert other.recompute is False
    assert_same(step(other, other, normal(*ODD)), step(stack, stack, normal(*ODD)))


def test_functional_call():
    stack, _ = twins(KINDS)
    replaced = {name: (p * 1.5).detach().requires_grad_() for name, p in stack.named_parameters()}
    before = copy.deepcopy(stack.state_dict())
    buffers = copy.deepcopy(dict(stack.named_buffers()))

    def call(x):
        return torch.func.functional_call(stack, {**replaced, **buffers}, (x,))

    values = gradients(stack, normal(*ODD), call, only=replaced)
    assert_same(stack.state_dict(), before)
    stack.load_state_dict(replaced, strict=False)
    assert_same(values, gradients(stack, normal(*ODD)))
    assert_same(buffers, dict(stack.named_buffers()))


def test_transforms_are_refused():
    stack, _ = twins(KINDS)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: stack(x).sum())(normal(*ODD))


def test_state_dict_goes_both_ways():
    stack, _ = twins(KINDS)
    stack(normal(*ODD))
    for backends in (("cpu", "reference"), ("reference", "cpu")):
        with ssp_fused.use_backend(backends[0]):
            stack(normal(*ODD))
            expected = copy.deepcopy(stack).eval()(normal(*ODD))
        other = make(KINDS).eval()
        other.load_state_dict(stack.state_dict(), strict=True)
        with ssp_fused.use_backend(backends[1]):
            torch.testing.assert_close(other(normal(*ODD)), expected, **CLOSE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inference_mode(training):
    """The values of any other mode; training goes on afterwards."""
    stack, other = twins(KINDS, training=training)
    with torch.inference_mode():
        y = stack(normal(*ODD))
    assert y.is_inference()
    assert torch.equal(y, other(normal(*ODD)))
    assert_same(dict(stack.named_buffers()), dict(other.named_buffers()))
    stack.train()
    other.train()
    assert_same(step(stack, stack, normal(*ODD)), step(other, other, normal(*ODD)))


def test_averaged_model():
    stack, _ = twins(KINDS)
    average = AveragedModel(stack, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(stack)  # the first is a copy
    first = copy.deepcopy(stack.state_dict())
    stack(normal(*ODD)).sum().backward()
    torch.optim.SGD(stack.parameters(), lr=0.1).step()
    average.update_parameters(stack)
    expected = {
        name: value.lerp(stack.state_dict()[name], 0.1)
        for name, value in first.items()
        if value.is_floating_point()
    }
    averaged = average.module.state_dict()
    assert_same({name: averaged[name] for name in expected}, expected, **CLOSE)
    with ssp_fused.use_backend("reference"):
        values = copy.deepcopy(average).eval()(normal(*ODD))
    torch.testing.assert_close(average.eval()(normal(*ODD)), values, **CLOSE)


def test_double_precision_and_back():
    """Parameters converted in place are the ones that the next call reads."""
    stack = SSPStack(*make(KINDS, dtype=torch.float32))
    stack(normal(*ODD, dtype=torch.float32))
    y = stack.double()(normal(*ODD))
    assert y.dtype == torch.float64
    with ssp_fused.use_backend("reference"):
        torch.testing.assert_close(stack(normal(*ODD)), y, **CLOSE)
