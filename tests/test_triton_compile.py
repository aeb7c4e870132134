"""The Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100: no spills, bounded resources, wide accesses.

Compiled is every choice of the launch table in each layout (``triton_resources.covering``), not their whole product,
which takes hours. Each compilation has a cache folder of its own, so that the compiler's log is always there.
"""

import pytest
import torch

from benchmarks import machine_code, triton_bounds, triton_resources

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


# A pass of an attack step has one round; beside mask bits the assembler may put off a load or two.
MOST_ROUNDS = {"linf_kernel": 1, "l2_kernel": 3, "apply_kernel": 2}


@pytest.mark.parametrize("arch", triton_resources.ARCHS)
def test_loads_go_out_together(arch):
    chosen = {}
    for launch in triton_resources.launches():
        of = launch.arguments
        if launch.name not in MOST_ROUNDS or not triton_bounds.is_dense_path(launch):
            continue
        if launch.name == "apply_kernel" and (of["bits"] is None or len(of["extras"]) != 1):
            continue
        if of.get("dz", of.get("x_adv")).dtype == torch.bfloat16:
            chosen.setdefault((launch.name, of.get("ROWS"), of.get("ACTIVATION")), launch)
    assert len(chosen) == 6  # masks: both layouts, relu and leaky_relu
    with triton_resources.target(arch):
        for launch in chosen.values():
            binary = triton_resources.compiled(launch, arch).binary
            rounds = machine_code.load_rounds(binary.asm["sass"])
            assert 1 <= rounds <= MOST_ROUNDS[launch.name], f"{rounds} of {launch.variant}"


def test_rounds_of_loads_are_counted():
    load = "--:-:{}:-:1\t@P0 LDG.E.128 R4, desc[UR4][R2.64];"
    other = "{}:-:-:-:4\tFADD R4, R4, R5;"
    first, second, wait, no_wait = (
        load.format(0),
        load.format(3),
        other.format("08"),
        "--:-:1:-:1\tLDC R1, c[0x0][0x28];",
    )
    for lines, rounds in (
        ([no_wait, wait], 0),
        ([first, second, wait], 1),
        ([first, wait, second], 1),  # for another barrier
        ([second, wait, first], 2),
        ([second, wait, first, no_wait, second, wait, wait], 2),
    ):
        assert machine_code.load_rounds("\n".join(lines)) == rounds


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
