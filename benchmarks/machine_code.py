"""What the machine code of a compiled Triton kernel tells that its resources do not: in what order it loads."""

from __future__ import annotations

import re

# A line of Triton's disassembly: which barriers an instruction waits for (a mask), the one that its result releases,
# the instruction.
_INSTRUCTION = re.compile(
    r"^(?P<waits>[0-9a-f-]{2}):[\d-]:(?P<releases>[\d-]):[Y-]:\w+\s+(?:@!?U?P\w+ )?(?P<name>[A-Z]\w*)",
    re.MULTILINE,
)


def load_rounds(text: str) -> int:
    """How often a program goes on asking global memory, having waited for what it had asked before: 1 is best.

    Instructions count as they stand, a loop's once.

    Args:
        text: The disassembly, a binary's ``asm["sass"]`` in Triton.
    """
    rounds, waited = 0, True
    pending: set[int] = set()
    for found in _INSTRUCTION.finditer(text):
        waits = 0 if found["waits"] == "--" else int(found["waits"], 16)
        arrived = {barrier for barrier in pending if waits >> barrier & 1}
        waited |= bool(arrived)
        pending -= arrived
        if found["name"] == "LDG":
            rounds += waited
            waited = False
            pending.add(int(found["releases"]))  # every load has one
    return rounds
