"""The Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100: no spills, bounded resources, wide accesses.

Compiled is every choice of the launch table in each layout (``triton_resources.covering``), not their whole product,
which takes hours. Each compilation has a cache folder of its own, so that the compiler's log is always there.
"""

import pytest

from benchmarks import triton_bounds, triton_resources

pytest.importorskip("triton")

SHARES = 8  # for as many processes


@pytest.fixture(scope="module")
def covering():
    return triton_resources.covering(triton_resources.launches())


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("arch", triton_resources.ARCHS)
def test_kernels_compile_within_bounds(covering, arch, share):
    dense = 0
    with triton_resources.target(arch):
        for launch in covering[share::SHARES]:
            found = triton_resources.compiled(launch, arch)
            faults = triton_bounds.broken(launch, found)
            assert not faults, f"{found.resources} of {launch.problem}: {', '.join(faults)}"
            dense += triton_bounds.is_dense_path(launch)
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
