"""SyncBatchNorm: unequal ranks over gloo give what one process gives with the whole batch."""

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


def block_and_batch():
    torch.manual_seed(3)
    block = SSPBlock(5, "ssp22").double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block, torch.randn(6, 5, 4, 4, dtype=torch.float64)


def outcome(block, x):
    x = x.requires_grad_()
    y = block(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def worker(rank, split, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=len(split))
    block, batch = block_and_batch()
    block = torch.nn.SyncBatchNorm.convert_sync_batchnorm(block)
    y, dx = outcome(block, batch.split(split)[rank].clone())
    gradients = [p.grad for p in block.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    if rank == 0:
        buffers = {n: b.numpy() for n, b in block.named_buffers()}
        queue.put((y.numpy(), dx.numpy(), [g.numpy() for g in gradients], buffers))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("split", [(3, 3), (5, 1), (6, 0)], ids=str)
def test_two_ranks_equal_one(split, tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = mp.spawn(
        worker, args=(split, tmp_path / "store", queue), nprocs=len(split), join=False
    )
    y, dx, gradients, buffers = queue.get()
    while not processes.join():
        pass
    block, batch = block_and_batch()
    expected_y, expected_dx = outcome(block, batch)
    first = split[0]
    torch.testing.assert_close(torch.from_numpy(y), expected_y[:first])
    torch.testing.assert_close(torch.from_numpy(dx), expected_dx[:first])
    for (name, parameter), gradient in zip(block.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(gradient), parameter.grad, msg=lambda m, name=name: f"{name}: {m}"
        )
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(torch.as_tensor(buffers[name]), buffer)
