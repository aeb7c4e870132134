"""Fixtures that every test shares."""

import os

# Convolutions round differently for every instruction set, and the accuracy rule compares with them: one set gives one
# verdict on every processor. Set before torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

import pytest
import torch

pytest.register_assert_rewrite("op_judge", "op_table")


@pytest.fixture(autouse=True)
def _same_start():
    """A fixed seed, the automatic backend, default settings and no recorded walks at the start of each test."""
    # Not above: with torch._dynamo it imports triton, for which tests/triton_interpreter has a choice to make first.
    import ssp_fused
    from ssp_fused import _chain
    from ssp_fused._chain.replay import Replays

    torch.manual_seed(0)
    _chain._REPLAYS = Replays()  # ops that a test replaces would be in them
    threads = torch.get_num_threads()
    with ssp_fused.use_backend("auto"):
        yield
    torch.set_num_threads(threads)
