"""One process at a time in a folder."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from pipeline.errors import UsageError
from pipeline.lock import NAME, locked


def test_a_second_run_is_refused_with_the_holders_process(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(UsageError, match=f"in use by process {os.getpid()}"),
        locked(tmp_path),
    ):
        pytest.fail("two runs at once")


def test_a_run_in_another_process_is_refused_too(tmp_path):
    code = (
        f"from pathlib import Path\nfrom pipeline.lock import locked\nwith locked(Path({str(tmp_path)!r})): print('in')"
    )
    with locked(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "in use by" in done.stderr
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "in\n", "free again"


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_free_again_however_the_run_ended(tmp_path, kind):
    with pytest.raises(kind), locked(tmp_path):
        raise kind
    with locked(tmp_path):
        pass


def test_a_killed_holder_leaves_nothing_to_clean_up(tmp_path):
    code = (
        "import os\nfrom pathlib import Path\nfrom pipeline.lock import locked\n"
        f"with locked(Path({str(tmp_path)!r})): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert (tmp_path / NAME).exists()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"x" * 5000])
def test_a_lock_file_without_sense_is_nobodys(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with locked(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()} on "), locked(tmp_path):
        pytest.fail("two at once")


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    inside = 0
    with locked(tmp_path):
        inside += 1
    assert inside == 1


def test_other_faults_of_the_machine_go_through(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pytest.fail("not locked")
    assert len(os.listdir("/proc/self/fd")) == before, "the handle is closed"


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    code = "print('here', flush=True); input()"
    with locked(tmp_path):
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
        )
        assert child.stdout.readline() == b"here\n"
    try:
        with locked(tmp_path):
            pass
    finally:
        child.communicate(b"\n", timeout=60)
