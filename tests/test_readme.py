"""README's Python runs as it stands, one piece after another."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_code():
    assert len(BLOCKS) > 1
    names = {}
    for code in BLOCKS:
        exec(compile(code, str(README), "exec"), names)
