"""The table of docs/reliability.md, from the markers of the tests: python tests/faults/table.py [--check]

`@pytest.mark.fault(22, "no µm/px", "F, with the csv line to add")` says which row of the fault matrix a test is about,
what the fault is and what must happen; a second test of the row needs the number only. `--check` writes nothing and
exits 1 if the table is another one, or if a row has no test.
"""

import io
import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs/reliability.md"
ROWS = range(1, 81)
BEGIN, END = "<!-- the table: python tests/faults/table.py -->", "<!-- the end of the table -->"


class Collected:
    """All tests of the folder, none of which is run."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = items[:]


def collected() -> list[pytest.Item]:
    found, said = Collected(), io.StringIO()
    with redirect_stdout(said):
        code = pytest.main([str(HERE), "--collect-only", "-qq"], plugins=[found])
    assert code == 0, said.getvalue()
    return found.items


def table(items: list[pytest.Item]) -> str:
    """Raises AssertionError where rows are missing, or are told in two ways."""
    facts: dict[int, tuple[str, ...]] = {}
    tests: dict[int, Counter[tuple[str, str, str]]] = {row: Counter() for row in ROWS}
    for item in items:
        for mark in item.iter_markers("fault"):
            row, *words = mark.args
            assert not words or facts.setdefault(row, tuple(words)) == tuple(words), f"row {row} is told in two ways"
            slow = ", slow" if item.get_closest_marker("slow") else ""
            tests[row][item.path.stem, re.sub(r"^test_(row_\d+_)?", "", item.originalname), slow] += 1
    missing = [row for row in ROWS if row not in facts]
    assert not missing, f"no test says what the rows {missing} are about"
    lines = ["| row | fault | must | tests |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {row} | {' | '.join(facts[row])} | {_seen_by(tests[row])} |" for row in ROWS)])


def _seen_by(tests: Counter[tuple[str, str, str]]) -> str:
    files: dict[str, list[str]] = {}
    for (file, name, slow), count in tests.items():
        cases = f" ({count} cases{slow})" if count > 1 else " (slow)" * bool(slow)
        files.setdefault(file.removeprefix("test_"), []).append(name.replace("_", " ") + cases)
    return "; ".join(f"`{file}`: {', '.join(names)}" for file, names in files.items())


def main() -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"{DOCUMENT} has no line {BEGIN}"
    new = f"{before}{BEGIN}\n{table(collected())}\n{END}{after}"
    if "--check" not in sys.argv:
        DOCUMENT.write_text(new, encoding="utf-8")
    elif new != text:
        print(f"{DOCUMENT} is not what the tests say: python tests/faults/table.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
