"""Triton interprets its kernels here, on CPU tensors: a choice for the whole process, made before triton is imported.

So these tests run in a pytest process of their own; in any other they are skipped.
"""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ALONE = "they run in a process of their own: python -m pytest tests/triton_interpreter"


def pytest_configure(config):
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if all(path == HERE or HERE in path.parents for path in paths):
        assert "triton" not in sys.modules, "triton was imported before the interpreter was chosen"
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.mend()


@pytest.fixture(autouse=True)
def _alone():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(ALONE)
