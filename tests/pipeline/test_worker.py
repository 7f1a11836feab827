"""What a worker process sets before it works."""

import gc
import subprocess
import sys

import pytest

from pipeline.worker import importing

LEAVES = """
import atexit, signal, sys
from pipeline.worker import dask_setup
dask_setup(None)
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
atexit.register(print, "registered later, called before", end="")
class Slow:
    def __del__(self):
        print("taken apart")
sys.modules["slow"] = Slow()
"""


def test_a_worker_leaves_without_taking_its_modules_apart_but_says_all_it_had_to_say():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "registered later, called before", "")


def test_what_is_imported_is_not_looked_through():
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        kept = [[] for _ in range(100)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    gc.unfreeze()


def test_garbage_is_collected_again_after_an_import_that_failed():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


HANGS = """
import ctypes, sys, threading, time
from pipeline.worker import Watch, expect
{}
print("alive", flush=True)
"""
SLEEPS_IN_C = "ctypes.PyDLL(None).sleep(20)"  # and keeps the interpreter's lock, so that no thread of Python may run


@pytest.mark.parametrize(
    ("does", "lives"),
    [
        ("expect('it', 0.3); time.sleep(20)", False),
        (f"expect('it', 0.3); {SLEEPS_IN_C}", False),
        ("expect('it', 0.3); expect('it', None); time.sleep(0.6)", True),
        ("expect('it', 0.3); expect('another', 20); time.sleep(20)", False),
        ("expect('it', 0.3); expect('another', 20); expect('another', None); time.sleep(20)", False),
        ("[(expect('it', 0.4), time.sleep(0.1)) for _ in range(8)]; expect('it', None)", True),
        ("watch = Watch('it', 0.3); time.sleep(0.6)", True),
        ("watch = Watch('it', 0.3); watch.heard(2); watch.heard(-1); time.sleep(20)", False),
        ("watch = Watch('it', 0.3); watch.heard(2); watch.heard(-2); watch.heard(); time.sleep(0.6)", True),
        ("watch = Watch('it', 0.3); watch.heard(1); watch.close(); time.sleep(0.6)", True),
    ],
)
def test_a_process_ends_where_nothing_is_heard_for_too_long(does, lives):
    done = subprocess.run([sys.executable, "-c", HANGS.format(does)], capture_output=True, text=True, timeout=15)
    assert (done.stdout, done.stderr) == ("alive\n" if lives else "", "")
    assert (done.returncode == 0) == lives
