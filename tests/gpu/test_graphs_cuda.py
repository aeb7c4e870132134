"""Attacks captured in CUDA graphs: the same images as without one."""

import pytest
import torch

from ssp_fused import models
from ssp_fused.adversarial import clear_graphs, pgd, trades_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
ATTACK = {"eps": 0.1, "step_size": 0.03, "steps": 3}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    clear_graphs()


def network():
    torch.manual_seed(0)
    return models.sspnet_cifar("ssp22", 1, width=8).cuda().train()


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(8, 3, 16, 16, generator=g).cuda(), torch.randint(10, (8,), generator=g).cuda()


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_replays_are_the_attack_itself(bn_mode, amp):
    model, twin = network(), network()
    for seed in range(3):
        found = []
        for net, graph in ((model, True), (twin, False)):
            generator = torch.Generator("cuda").manual_seed(seed)
            with torch.autocast("cuda", amp, enabled=amp is not None):
                x_adv = pgd(
                    net, *batch(seed), **ATTACK, bn_mode=bn_mode, graph=graph, generator=generator
                )
            found.append(x_adv)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(0.99)
        assert torch.equal(*found)
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


def test_trades_replays_its_attack():
    losses = []
    for graph in (True, False):
        generator = torch.Generator("cuda").manual_seed(0)
        losses.append(trades_loss(network(), *batch(0), **ATTACK, graph=graph, generator=generator))
    assert torch.equal(losses[0].loss, losses[1].loss)
