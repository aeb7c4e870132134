"""Stacks of blocks, run as one autograd node: their values by the rule of ``accuracy``, gradients in every setting."""

import pytest
import torch
from accuracy import cases, generator
from chains import (
    BLOCKS,
    ODD,
    PLAIN,
    assert_same,
    judge,
    module_by_module,
    needs_cpu_backend,
    results,
    twins,
)

import ssp_fused
from ssp_fused.nn import SSPStack

pytestmark = needs_cpu_backend

MIXED = ("ssp22", "downsample", "adaptive", "ssp54")
NAMES = (*(name for name in BLOCKS if name != "downsample"), MIXED)
TAME = 0.1  # of random convolutions: many stages in a row stay of order one


@pytest.fixture(autouse=True)
def _cpu_backend():
    with ssp_fused.use_backend("cpu"):
        yield


def chain_of(name):
    return name if isinstance(name, tuple) else (name,) * 3


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed, 7), dtype=torch.float64).to(dtype)


def judge_mode(kind, mode, **options):
    """``frozen``: in evaluation mode, no parameter requires a gradient."""
    judge(kind, ODD, training=mode == "train", frozen=mode == "frozen", scale=TAME, **options)


@pytest.mark.parametrize(
    ("norm", "mode"),
    # What a group norm computes does not depend on its mode.
    [
        *cases(["batch"], ["train", "eval", "frozen"]),
        *cases(["group"], ["train", "frozen"]),
        ("instance", "eval"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_every_scheme_and_norm(name, norm, mode):
    judge_mode(chain_of(name), mode, norm=norm)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_that_are_run_in_rows(dtype, norm, mode):
    """Channels in whole vectors, which a chain on planes brings into rows and back."""
    for layout in ("planes", "slice"):
        judge(
            ("ssp33", "adaptive"),
            (3, 16, 7, 5),
            norm=norm,
            dtype=dtype,
            layout=layout,
            training=mode == "train",
            frozen=mode == "frozen",
            scale=TAME / 2,
        )


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_narrow_dtypes(norm, dtype, mode):
    for kinds in (chain_of("ssp33"), ("ssp22", "downsample", "adaptive")):
        judge_mode(kinds, mode, norm=norm, dtype=dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("kinds", [chain_of("ssp33"), MIXED], ids=["ssp33", "mixed"])
def test_float64(kinds, norm, training):
    """The rule's truth is fp64 itself: a chain in fp64 is as far from it as the truth from the exact value."""
    fused, plain = twins(kinds, training=training, norm=norm)
    values = results(fused, normal(*ODD), fused)
    expected = results(plain, normal(*ODD), lambda x: module_by_module(plain, x))
    for name, value in expected.items():
        largest = max(1.0, value.abs().max().item())
        assert (values[name] - value).abs().max() <= 1e-10 * largest, name


@pytest.mark.parametrize("layout", ["rows", "slice"])
@pytest.mark.parametrize("activation", PLAIN)
def test_activations_and_layouts(activation, layout):
    for norm, mode in (("batch", "train"), ("batch", "frozen"), ("group", "train")):
        judge_mode(MIXED, mode, norm=norm, activation=activation, layout=layout)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_chain_of_one_is_the_block(kind, mode):
    block, other = twins(kind, training=mode == "train", dtype=torch.float32)
    stack = SSPStack(other).requires_grad_(mode != "frozen")
    block.requires_grad_(mode != "frozen")
    x = normal(*ODD, dtype=torch.float32)
    values = results(stack, x.clone(), stack)
    expected = results(block, x.clone(), block)
    named = {name.replace("0.", "", 1): value for name, value in values.items()}
    assert_same(named, expected)
