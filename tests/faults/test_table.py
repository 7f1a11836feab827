"""docs/reliability.md is what the tests say, and every row of the fault matrix has a test."""

import subprocess
import sys
from pathlib import Path


def test_the_table_is_the_one_of_the_tests():
    script = Path(__file__).with_name("table.py")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
