"""Fixtures that every test shares."""

import pytest
import torch

import ssp_fused

pytest.register_assert_rewrite("op_judge", "op_table")


@pytest.fixture(autouse=True)
def _same_start():
    """A fixed seed, the automatic backend and default settings at the start of each test."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with ssp_fused.use_backend("auto"):
        yield
    torch.set_num_threads(threads)
