"""Converted models behave as modules do: hooks, replaced submodules, copies, pickles, functional calls, compilation."""

import copy
import pickle

import published
import pytest
import torch
from converted import DATASETS, PreAct, assert_same_function, generic
from torch import nn
from torch.nn.utils import parametrizations

import ssp_fused
from ssp_fused import _log
from ssp_fused.nn import PreActDownsample, SSPBlock, SSPStack


def test_hooks_of_the_block_go_on_working():
    block, called = published.SSPBlock2(8, 8), []
    handle = block.register_forward_hook(lambda *_: called.append("hook"))
    converted = ssp_fused.convert(block)
    x = torch.randn(2, 8, 5, 5)
    converted(x)
    with ssp_fused.use_backend("reference"):
        converted(x)
    assert called == ["hook", "hook"]
    handle.remove()
    converted(x)
    assert called == ["hook", "hook"]


@pytest.mark.parametrize("where", ["block", "block.relu", "block.residual", "block.residual.1"])
def test_what_the_fused_block_would_bypass_is_not_bypassed(where, caplog, monkeypatch):
    monkeypatch.setattr(_log, "_said", set())
    block = generic(published.SSPBlock2(8, 8))
    block.get_submodule(where).register_forward_hook(lambda _m, _x, y: y * 1.5)
    converted = ssp_fused.convert(copy.deepcopy(block))
    assert_same_function(converted, block)
    (record,) = caplog.records
    assert record.message.startswith("a SSPBlock2 is run as it is, unfused: block")
    assert record.message.endswith(": it has hooks")


@pytest.mark.parametrize("where", ["n1", "conv1", "n2", "conv2"])
def test_submodules_are_read_through_their_attributes(where):
    """Hooks on them, replacements and parametrizations take effect, as in the original."""
    original = generic(published.ResBlock(8, 8))
    original.get_submodule(where).register_forward_hook(lambda _m, _x, y: y * 1.5)
    assert_same_function(ssp_fused.convert(copy.deepcopy(original)), original)
    original = generic(published.ResBlock(8, 8))
    converted = ssp_fused.convert(copy.deepcopy(original))
    for module in (original, converted):
        setattr(module, where, nn.Sequential(module.get_submodule(where)))
        if "conv" in where:
            conv = module.residual[2 if where == "conv1" else 5]
            parametrizations.weight_norm(conv)
    assert_same_function(converted, original)


def test_a_replaced_norm_of_the_shortcut_is_seen(caplog, monkeypatch):
    monkeypatch.setattr(_log, "_said", set())
    down = published.shortcut(8, 16, "b")
    original = generic(published.ResBlock(8, 16, stride=2, downsample=down))
    converted = ssp_fused.convert(copy.deepcopy(original))
    for module in (original, converted):
        module.n1 = nn.GroupNorm(2, 8).double()
    assert_same_function(converted, original)
    message = "a ResBlock is run as it is, unfused: n1 was replaced"
    assert [record.message for record in caplog.records] == [message]


def test_synchronized_norms():
    """convert_sync_batchnorm gives each alias a norm of its own, on the same tensors."""
    down = published.shortcut(8, 16, "b")
    original = generic(published.ResBlock(8, 16, stride=2, downsample=down))
    for first, second in (
        (nn.SyncBatchNorm.convert_sync_batchnorm, ssp_fused.convert),
        (ssp_fused.convert, nn.SyncBatchNorm.convert_sync_batchnorm),
    ):
        converted = second(first(copy.deepcopy(original)))
        assert isinstance(converted, PreActDownsample)
        assert isinstance(converted.norm1, nn.SyncBatchNorm)
        assert converted._would_bypass() is None
        assert_same_function(converted, original)


def test_methods_and_attributes_of_the_original_class():
    class Own(PreAct):
        expansion = 1

        def initialize(self):
            nn.init.zeros_(self.bn1.weight)

    converted = ssp_fused.convert(Own())
    assert isinstance(converted, SSPBlock) and converted.expansion == 1
    converted.initialize()
    assert not converted.norm1.weight.any()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = converted.nothing


@pytest.mark.parametrize("dataset", ["cifar10", "mnist"])
def test_copies_and_pickles(dataset):
    model = ssp_fused.convert(generic(published.network(dataset, "ark")))
    x = torch.randn(2, *DATASETS[dataset], dtype=torch.float64)
    expected = model.eval()(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        assert len(list(twin.parameters())) == len(list(model.parameters()))


def test_functional_call():
    """Torch 2.13 leaves a module that has two names with the call's tensors: one model a call."""
    networks = [generic(published.network("mnist", "ssp2")).eval() for _ in range(2)]
    ssp_fused.convert(networks[1])
    x = torch.randn(2, *DATASETS["mnist"], dtype=torch.float64)
    state = {name: value * 0.5 for name, value in networks[0].named_parameters()}
    torch.testing.assert_close(*(torch.func.functional_call(m, state, (x,)) for m in networks))


def test_frozen_norms_stay_frozen():
    original = generic(published.SSPBlock3(8, 8))
    converted = ssp_fused.convert(copy.deepcopy(original))
    for module in (original, converted):
        module.train().block.n2.eval()
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(converted(x), original(x))
    torch.testing.assert_close(converted.state_dict(), original.state_dict())
    assert converted.block.n1.num_batches_tracked == original.block.n1.num_batches_tracked


def test_compiles_without_a_graph_break():
    down = published.shortcut(8, 16, "b")
    blocks = (
        published.ArkBlock(8, 8),
        published.SSPBlock2(8, 8),
        published.ResBlock(8, 16, stride=2, downsample=down),
    )
    model = ssp_fused.convert(generic(nn.Sequential(*blocks)))
    assert isinstance(model, SSPStack)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    assert torch.equal(compiled(x), model(x))
