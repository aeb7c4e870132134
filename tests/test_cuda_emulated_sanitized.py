"""Part of test_cuda_emulated again, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import pytest
from cuda_on_host import build, sanitized

# One shape with tails in both layouts, one with several blocks; no opcheck, which runs the ops again.
CASES = (
    "(float32 or bfloat16) and (1x17x4x3 or 2x24x23x21) or changes_no_bit and rows-torch.float32"
)


def test_no_sanitizer_finds_anything():
    if reason := build.missing():
        pytest.skip(reason)
    build.build(sanitize=True)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", CASES]
    done = sanitized.run("-m", "pytest", *options, "tests/test_cuda_emulated.py")
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]
    assert "passed" in done.stdout
