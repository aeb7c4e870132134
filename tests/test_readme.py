"""README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_code_to_run():
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS)
def test_code(code):
    exec(compile(code, str(README), "exec"), {})
