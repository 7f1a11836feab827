"""Every command and code block of the README and of docs/evaluate.md runs.

Commands of containers run here as what is inside them would.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.DOTALL)
EVALUATE = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs/evaluate.md").read_text(), re.DOTALL)
BIN = Path(sys.executable).parent


def lines(kind: str, blocks: list[tuple[str, str]] = BLOCKS) -> list[str]:
    return [
        line.split("  #")[0].strip() for k, block in blocks if k == kind for line in block.splitlines() if line.strip()
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the demo has run, as the README begins."""
    folder = tmp_path_factory.mktemp("readme")
    done = subprocess.run([BIN / "slidestream", "demo"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"held-out AUC (\S+)", done.stdout).group(1)) >= 0.9
    return folder


def test_there_are_blocks_of_every_use():
    commands = lines("bash")
    assert {"make demo", "make test", "slidestream demo"} <= set(commands)
    assert any(line.startswith("docker run") for line in commands)
    assert len([1 for kind, _ in BLOCKS if kind == "python"]) == 2


@pytest.mark.parametrize("command", [line for line in lines("bash") if line.startswith("make")])
def test_make_targets(command):
    dry = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


@pytest.mark.timeout(900)
def test_commands_in_their_order(place):
    for line in lines("bash"):
        if line.startswith("slidestream") and line != "slidestream demo":
            words = shlex.split(line)
            done = subprocess.run([BIN / words[0], *words[1:]], cwd=place, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_the_page_on_annotations(place):
    """The demo's head finds the nests that it was not told of."""
    first, command = lines("bash", EVALUATE)
    assert first == "slidestream demo"
    words = shlex.split(command)
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"auc_weight +(\S+)", done.stdout).group(1)) >= 0.8
    (code,) = (block for kind, block in EVALUATE if kind == "python")
    (place / "annotated.py").write_text(code)
    done = subprocess.run([sys.executable, "annotated.py"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"Interval\(value=.*\) 12", done.stdout.strip())


def test_container_commands(place):
    """tests/docker builds the image and runs it; here the command runs as it would inside."""
    build, run = (line for line in lines("bash") if line.startswith("docker"))
    assert os.access(ROOT / build, os.X_OK)
    words = shlex.split(run)
    mounts = dict(reversed(words[i + 1].split(":")[:2]) for i, word in enumerate(words) if word == "-v")
    inside = words[words.index("slidestream") :]
    outside = [mounts.get(word, word) for word in inside]
    assert outside != inside
    done = subprocess.run([BIN / outside[0], *outside[1:]], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_python_blocks(place, number):
    code = [block for kind, block in BLOCKS if kind == "python"][number]
    (place / f"block{number}.py").write_text(code)
    done = subprocess.run([sys.executable, f"block{number}.py"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
