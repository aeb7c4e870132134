"""SyncBatchNorm: unequal ranks over gloo give what one process gives with the whole batch."""

import published
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ssp_fused
from ssp_fused.nn import SSPBlock

pytestmark = pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None or not dist.is_available(),
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)


def hooked():
    """A block that is no part of a chain: its ops are called one by one."""
    block = SSPBlock(5, "ssp22")
    block.conv1.register_forward_hook(lambda *_: None)
    return block


BLOCKS = {
    "own": lambda: SSPBlock(5, "ssp22"),
    "hooked": hooked,
    "published": lambda: published.SSPBlock2(5, 5),
}


def block_and_batch(kind):
    torch.manual_seed(3)
    block = BLOCKS[kind]().double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block, torch.randn(6, 5, 4, 4, dtype=torch.float64)


def outcome(block, x):
    x = x.requires_grad_()
    y = block(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def worker(rank, kind, split, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(split)
    )
    block, batch = block_and_batch(kind)
    # Converting it is no business of other ranks: each tries it on a copy with plain norms.
    block = ssp_fused.convert(torch.nn.SyncBatchNorm.convert_sync_batchnorm(block))
    y, dx = outcome(block, batch.split(split)[rank].clone())
    gradients = [p.grad for p in block.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    if rank == 0:
        torch.save((y, dx, gradients, dict(block.named_buffers())), folder / "result")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "split"),
    [("own", (3, 3)), ("own", (5, 1)), ("own", (6, 0)), ("hooked", (4, 2)), ("published", (4, 2))],
    ids=str,
)
def test_two_ranks_equal_one(kind, split, tmp_path):
    mp.spawn(worker, args=(kind, split, tmp_path), nprocs=len(split))
    y, dx, gradients, buffers = torch.load(tmp_path / "result", weights_only=True)
    block, batch = block_and_batch(kind)
    expected_y, expected_dx = outcome(block, batch)
    first = split[0]
    torch.testing.assert_close(y, expected_y[:first])
    torch.testing.assert_close(dx, expected_dx[:first])
    for (name, parameter), gradient in zip(block.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(
            gradient, parameter.grad, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(buffers, dict(block.named_buffers()))
