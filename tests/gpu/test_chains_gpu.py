"""Chains of blocks on a device, forward and backward, by the accuracy rule."""

import chains
import pytest
import torch
from on_device import NAMESPACES, usable

import ssp_fused

pytestmark = pytest.mark.gpu
KINDS = (("ssp33", "ssp33"), ("euler", "downsample", "adaptive"), ("ssp54",))
SHAPE = (3, 16, 9, 7)


@pytest.fixture(params=NAMESPACES, autouse=True)
def _backend(request, monkeypatch):
    usable(request.param)
    # Convolutions in TF32 would hide the errors of everything else.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with ssp_fused.use_backend(request.param):
        yield


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float32(kind, training, norm, layout):
    chains.judge(kind, SHAPE, training=training, norm=norm, layout=layout, device="cuda")


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_frozen(activation):
    options = {"training": False, "frozen": True, "activation": activation}
    chains.judge(KINDS[0], SHAPE, device="cuda", **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    chains.judge(KINDS[0], SHAPE, autocast=dtype, layout="rows", device="cuda")
