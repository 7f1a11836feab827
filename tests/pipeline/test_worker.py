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
