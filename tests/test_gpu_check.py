"""The runner of the tests that want a GPU: groups that pass, fail, and take too long; here they want none."""

import sys

import pytest

from tools import gpu_check

WAIT = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('reported')"
DEAF = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(600)"
TESTS = """
import time
import pytest

def test_passes(): pass
def test_fails(): assert False
def test_is_skipped(): pytest.skip("for a reason")
def test_takes_long(): time.sleep(600)
"""


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Runs tests of the file above by name, as a group that wants no GPU, or one."""
    file = tmp_path / "test_these.py"
    file.write_text(TESTS)

    def run(names, timeout=None, name="math"):
        monkeypatch.setitem(gpu_check.GROUPS, name, [str(file), "-k", names])
        return gpu_check.run_group(name, tmp_path, timeout)

    return run


def test_a_command_has_its_status_and_its_output(tmp_path):
    log = tmp_path / "log"
    status, _ = gpu_check.run([sys.executable, "-c", "print('out'); raise SystemExit(3)"], log)
    assert (status, log.read_text()) == (3, "out\n")


def test_a_command_that_takes_too_long_may_report(tmp_path):
    log = tmp_path / "log"
    status, seconds = gpu_check.run([sys.executable, "-c", WAIT], log, timeout=10)
    assert (status, log.read_text()) == (gpu_check.TIMED_OUT, "reported\n")
    assert seconds < 300


def test_a_command_that_will_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    log = tmp_path / "log"
    status, seconds = gpu_check.run([sys.executable, "-c", DEAF], log, timeout=10)
    assert (status, log.read_text()) == (gpu_check.TIMED_OUT, "deaf\n")
    assert seconds < 300


def test_results_of_a_group_are_counted(group):
    found = group("passes or fails or skipped")
    assert [found[key] for key in ("ok", "passed", "failed", "skipped")] == [False, 1, 1, 1]
    assert group("passes")["ok"]
    assert "ok, 1 passed, 0 failed, 0 skipped" in gpu_check.described(group("passes"))


def test_a_group_for_a_gpu_has_to_pass_a_test(group):
    assert group("skipped")["ok"]
    assert not group("skipped", name="chains")["ok"]


def test_a_group_that_takes_too_long_fails_and_says_so(group):
    found = group("passes or long", timeout=5)
    assert found["timed_out"] and not found["ok"]
    assert gpu_check.described(found).endswith(", stopped")
