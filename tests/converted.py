"""Converted models for tests: their blocks, and the comparison with what they were."""

import published
import torch
import torch.nn.functional as F
from torch import nn

from ssp_fused import _convert

DATASETS = {"cifar10": (3, 9, 9), "mnist": (1, 17, 17), "tinyimagenet": (3, 9, 9)}


def fused_blocks(model):
    return [module for module in model.modules() if isinstance(module, _convert.Converted)]


def generic(module, seed=0):
    """Parameters and statistics of which none hides an operation; in fp64."""
    return published.randomized(module.double(), seed)


def assert_same_function(converted, original, shape=(3, 8, 7, 5)):
    """Outputs, gradients and buffers, in training and in evaluation mode."""
    for training in (True, False):
        results = []
        for model in (converted.train(training), original.train(training)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            x.requires_grad_()
            model.zero_grad(set_to_none=False)
            y = model(x)
            y.square().sum().backward()
            named = model.named_parameters()
            gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
            results.append((y.detach(), x.grad, gradients, dict(model.named_buffers())))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


class PreAct(nn.Module):
    """A pre-activation block as image classifiers have it, with whatever names and habits."""

    def __init__(self, planes=8, out=None, *, names=("bn1", "bn2"), act=F.relu, drop=0.0, **extra):
        super().__init__()
        out = planes if out is None else out
        self.names, self.act, self.drop = names, act, drop
        setattr(self, names[0], extra.get("norm", nn.BatchNorm2d)(planes))
        self.conv1 = nn.Conv2d(planes, out, 3, stride=extra.get("stride", 1), padding=1, bias=False)
        setattr(self, names[1], nn.BatchNorm2d(out))
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.of_input = extra.get("of_input", False)
        if "shortcut" in extra:
            self.shortcut = extra["shortcut"]

    def _norms(self):
        return (getattr(self, name) for name in self.names)

    def forward(self, x):
        norm1, norm2 = self._norms()
        z = self.act(norm1(x))
        shortcut = self.shortcut(x if self.of_input else z) if hasattr(self, "shortcut") else x
        inner = F.dropout(self.act(norm2(self.conv1(z))), self.drop, self.training)
        return self.conv2(inner) + shortcut
