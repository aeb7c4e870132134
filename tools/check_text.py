"""Check the whitespace of the repository's text files: no tabs, none trailing, one newline last."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABS_BELONG = ("Makefile",)


def problems(name: str, text: str) -> list[str]:
    """What is wrong with a file's text, a line for each place."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if re.search(r"\s$", line):
            found.append(f"{name}:{number}: trailing whitespace")
        if "\t" in line and Path(name).name not in TABS_BELONG:
            found.append(f"{name}:{number}: tab")
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append(f"{name}: must end in one newline")
    return found


def main() -> int:
    """Check what git tracks or would track."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = []
    for name in filter(None, names.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            found += problems(name, data.decode())
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
