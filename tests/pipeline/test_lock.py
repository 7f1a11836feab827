"""One run at a time in a folder; a run that was taken over notices."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from pipeline.errors import RunStopped, UsageError
from pipeline.lock import NAME, locked, require_current, running


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
    assert running(tmp_path) == ""
    with locked(tmp_path):
        pass


def test_each_run_has_an_id_of_its_own(tmp_path):
    with locked(tmp_path) as first:
        require_current(tmp_path, first)
    with locked(tmp_path) as second:
        assert first != second
        require_current(tmp_path, second)
        with pytest.raises(RunStopped, match="taken over"):
            require_current(tmp_path, first)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", None])
def test_a_lock_file_that_says_nothing_is_nobodys_run(tmp_path, content):
    if content is not None:
        (tmp_path / NAME).write_bytes(content)
    with pytest.raises(RunStopped):
        require_current(tmp_path, "some run")
    assert running(tmp_path) == ""
    with locked(tmp_path) as run:
        require_current(tmp_path, run)


def test_a_longer_text_of_an_earlier_run_is_cut(tmp_path):
    (tmp_path / NAME).write_text("x" * 5000)
    with locked(tmp_path) as run:
        require_current(tmp_path, run)


def test_running_names_the_holder_and_does_not_take_the_lock(tmp_path):
    assert running(tmp_path) == "", "no file yet"
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in running(tmp_path)
        assert running(tmp_path), "asking does not end it"
    assert running(tmp_path) == ""


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path) as run:
        require_current(tmp_path, run)


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
