"""Every real and every broken slide ends as the manifest beside it expects, through the real command."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2].parent / "shared/data"
COMMAND = Path(sys.executable).with_name("slidestream")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "manifest.csv").is_file(), reason="needs the slides of ../shared/data"),
]

SERIES = {"slides/boxes_dicom/boxes_1.dcm"}  # the second file of a DICOM series: a part of boxes_0.dcm, not a slide


def expected(name: str, expect: str, in_table: bool) -> set[str]:
    """The statuses that a row of the manifest allows; {"unlisted"} for what is no slide at all."""
    good, bad = {"done", "empty"}, {"failed"}
    if name in SERIES:
        return {"skipped"}
    if not expect or "is a directory" in expect:
        return {"unlisted"}
    if name.startswith("slides/BPAEC/"):
        return bad
    if expect.startswith("failed") and ("unless mpp.csv" in expect or "CSV can give it" in expect):
        return good if in_table else bad
    if " or ok" in expect or (expect.startswith("ok") and " or error" in expect):
        return good | bad
    return good if expect.startswith(("ok", "done")) else bad


def outcomes(
    folder: str, out: Path, *options: str
) -> tuple[dict[str, dict[str, str]], subprocess.CompletedProcess[str]]:
    words = [COMMAND, "run", str(DATA / folder), "-o", str(out), "--mpp", "0.5", "--levels", "3", *options]
    done = subprocess.run(words, capture_output=True, text=True)
    with open(out / "slides.csv", newline="") as file:
        return {f"{folder}/{row['slide']}": row for row in csv.DictReader(file)}, done


def read(table: str) -> list[dict[str, str]]:
    with open(DATA / table, newline="") as file:
        return list(csv.DictReader(file))


CASES = [
    ("slides", False, ["-e", "lab_lbp"]),
    ("slides", True, ["-e", "lab_lbp"]),
    ("slides", True, ["-e", "resnet50", "--weights", "random"]),
    ("broken", False, ["-e", "lab_lbp"]),
    ("broken", True, ["-e", "lab_lbp"]),
]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("folder", "with_table", "options"), CASES)
def test_every_row_ends_as_expected(tmp_path, folder, with_table, options):
    table = {row["slide"] for row in read("mpp.csv")} if with_table else set()
    extra = ["--mpp-csv", str(DATA / "mpp.csv")] if with_table else []
    rows, done = outcomes(folder, tmp_path / "out", *options, *extra)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    manifest = [row for row in read("manifest.csv") if row["file"].startswith(folder)]
    wrong = []
    for row in manifest:
        name = row["file"]
        status = rows[name]["status"] if name in rows else "unlisted"
        if status not in expected(name, row["expect"], name in table):
            wrong.append(f"{name}: {status}, expected {row['expect']!r}; {rows.get(name, {}).get('message')}")
        if status == "failed":
            assert len(rows[name]["message"]) > 15, name
            assert rows[name]["stage"] in ("open", "segment", "encode"), name
    assert not wrong, "\n".join(wrong)
    assert not set(rows) - {row["file"] for row in manifest}
