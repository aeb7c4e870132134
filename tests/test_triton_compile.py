"""The Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100: no spills, bounded resources, wide accesses.

Compiled is every choice of the launch table in each layout (``triton_resources.covering``), not their whole product,
which takes hours. Each compilation has a cache folder of its own, so that the compiler's log is always there.
"""

import pytest

from benchmarks import triton_resources

pytest.importorskip("triton")

SHARES = 8  # for as many processes
SHARED_BYTES = 48 << 10  # what every architecture gives a block unasked
REGISTERS = 64 << 10  # of a multiprocessor: a block's have to fit
# One pass over much memory: on the dense paths 16 warps and more at a time keep it busy.
STREAMING = (
    "combine_kernel",
    "normalize_kernel",
    "apply_kernel",
    "moments_kernel",
    "channel_sum_kernel",
    "linf_kernel",
    "l2_kernel",
)
# Operands and results of activation size, by the kernels' names for them.
READ = ("terms", "dz", "extras", "g", "x_adv", "grad", "x")
WRITTEN = ("z", "du", "result")
FORWARD = ("combine_kernel", "normalize_kernel", "moments_kernel", "group_norm_kernel")


@pytest.fixture(scope="module")
def covering():
    return triton_resources.covering(triton_resources.launches())


def activations(launch):
    """How many tensors of activation size the kernel reads and writes, and the narrowest one's bytes an element."""
    arguments = launch.arguments
    read = [arguments.get(name) for name in READ]
    written = [arguments.get(name) for name in WRITTEN]
    (written if launch.name in FORWARD else read).append(arguments.get("u"))
    read, written = (list(flat(group)) for group in (read, written))
    return len(read), len(written), min((t.itemsize for t in (*read, *written)), default=0)


def flat(values):
    for value in values:
        if isinstance(value, tuple):
            yield from value
        elif value is not None:
            yield value


def is_dense_path(launch):
    """Whether lines are whole vectors of 16 bytes, aligned, with no fewer elements in a tile than threads take."""
    arguments = launch.arguments
    _, _, itemsize = activations(launch)
    if "UNIT" not in arguments or arguments["UNIT"] * itemsize != 16:
        return False
    sizes = [arguments.get(name, 1) for name in ("LINES", "LENGTH", "GROUPS", "SLOTS", "PLACES")]
    elements = 1
    for size in sizes:
        elements *= size
    enough = elements >= 32 * launch.warps * arguments["UNIT"]
    padded = arguments.get("SLOTS", 1) != arguments.get("PER_GROUP", 1) and arguments["ROWS"]
    return enough and not padded and "unaligned" not in launch.variant


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("arch", triton_resources.ARCHS)
def test_kernels_compile_within_bounds(covering, arch, share):
    dense = 0
    with triton_resources.target(arch):
        for launch in covering[share::SHARES]:
            found = triton_resources.compiled(launch, arch)
            what = f"{found.resources} of {launch.problem}"
            assert found.resources.spill_bytes == 0, what
            assert found.resources.shared_bytes <= SHARED_BYTES, what
            assert found.resources.registers * 32 * launch.warps <= REGISTERS, what
            if is_dense_path(launch):
                read, written, _ = activations(launch)
                if launch.name in STREAMING:
                    assert found.resources.registers <= 128, what
                dense += 1
                assert found.loads[16] >= read, f"{found.loads} in {what}"
                assert found.stores[16] >= written, f"{found.stores} in {what}"
    assert dense, "no launch of the share was on a dense path"


def test_the_covering_makes_every_choice(covering):
    every = triton_resources.launches()
    missing = {(launch.name, c) for launch in every for c in launch.choices}
    missing -= {(launch.name, c) for launch in covering for c in launch.choices}
    assert not missing
    from ssp_fused._triton import (
        attack,
        backward_apply,
        backward_reduce,
        group_norm,
        normalize,
        running_stats,
        stage,
    )

    modules = (attack, backward_apply, backward_reduce, group_norm, normalize, running_stats, stage)
    kernels = {name for m in modules for name in vars(m) if name.endswith("_kernel")}
    assert {launch.name for launch in covering} == kernels
