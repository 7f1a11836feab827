"""The rules of the house, read from the syntax trees of all files: who may import whom, and who names which library."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "extractors", "heads")
# A module imports only those that stand before it. `__init__` of pipeline is exempt: it only names them.
ORDER = (
    *(
        "errors",
        "patience",
        "objects",
        "ranges",
        "places",
        "doubling",
        "meter",
        "saving",
        "config",
        "scale",
        "area",
        "slide",
        "readers",
        "tissue",
        "shapes",
        "quadtree",
    ),
    "agreement",
    *(
        "arrays",
        "store",
        "stream",
        "feed",
        "rows",
        "lanes",
        "encode",
        "draw",
        "verdict",
        "prediction",
        "fingerprint",
        "outcome",
        "tables",
        "featurefiles",
    ),
    *(
        "folder",
        "stages",
        "zoom",
        "lock",
        "leases",
        "output",
        "pool",
        "labels",
        "pictures",
        "sight",
        "worker",
        "pods",
        "deploy",
        "cluster",
        "batch",
    ),
    *("regrid", "canvas", "stitching", "mapping"),
    *("targets", "folds"),
    *("bags", "cohort", "curves", "evaluation", "external", "learning", "judging", "seen", "training", "comparison"),
    "probing",
    *("annotations", "overlap", "looks", "localisation"),
    *("unbiased", "pretraining"),
    *("mending", "rereading", "treecheck", "wholeness", "reencoding", "verification"),
    *("demo", "doctor"),
    "cli",
)
BROAD = {
    ("pipeline/errors.py", "slide_door"),
    ("pipeline/cli.py", "main"),
    ("pipeline/readers/tifftiles.py", "_rgb"),
    ("pipeline/feed.py", "_run"),
    ("pipeline/pods.py", "__init__"),
}
ONLY_IN = {
    "dask": ("pipeline/cluster.py", "pipeline/deploy.py"),
    "distributed": ("pipeline/cluster.py", "pipeline/deploy.py"),
    "dask_jobqueue": ("pipeline/deploy.py",),
    "dask_kubernetes": ("pipeline/pods.py",),
    "kr8s": ("pipeline/pods.py",),
    "zarr": ("pipeline/arrays.py",),
    "s3fs": ("pipeline/objects.py",),
    "botocore": ("pipeline/objects.py",),
    "openslide": ("pipeline/readers/",),
    "tiffslide": ("pipeline/readers/",),
}


@dataclass(frozen=True)
class Import:
    """`target` is absolute (`pipeline.errors`); `where` the function it stands in, "" at the top."""

    file: str
    line: int
    target: str
    relative: bool
    where: str
    typing_only: bool


def imports(file: str, source: str) -> list[Import]:
    """Every import of a file, those inside functions and under TYPE_CHECKING and by import_module("...") included."""
    return [found for node, scope, typing in _walk(ast.parse(source)) for found in _imported(file, node, scope, typing)]


def _walk(node: ast.AST, scope: str = "", typing: bool = False) -> Iterator[tuple[ast.AST, str, bool]]:
    for child in ast.iter_child_nodes(node):
        inner, checked = scope, typing
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = child.name
        if isinstance(node, ast.If) and child in node.body and "TYPE_CHECKING" in ast.dump(node.test):
            checked = True
        yield child, inner, checked
        yield from _walk(child, inner, checked)


def _imported(file: str, node: ast.AST, scope: str, typing: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for name in node.names:
            yield Import(file, node.lineno, name.name, False, scope, typing)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = Path(file).parent.parts
            if node.level > len(package):
                base = "outside"
            else:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        for name in node.names:
            # `from . import draw` and `from pipeline import draw` name a module too.
            yield Import(file, node.lineno, f"{base}.{name.name}", bool(node.level), scope, typing)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            yield Import(file, node.lineno, str(node.args[0].value), False, scope, typing)


def violations(files: dict[str, str]) -> list[str]:
    faults = []
    for file, source in files.items():
        for found in imports(file, source):
            fault = _arrow(found) or _style(found) or _library(found) or _heads_in_store(found)
            if fault:
                faults.append(f"{file}:{found.line}: imports {found.target}: {fault}")
        faults += [
            f"{file}:{line}: broad except in {where}" for where, line in broad(source) if (file, where) not in BROAD
        ]
    return faults


def _module(dotted: str) -> str:
    """The module of pipeline that `pipeline.x.y` belongs to, "" for the package itself or a name of its `__init__`."""
    part = dotted.split(".")[1] if "." in dotted else ""
    return part if part in ORDER or (ROOT / "pipeline" / f"{part}.py").exists() else ""


def _arrow(found: Import) -> str:
    own, target = found.file.split("/")[0], found.target.split(".")[0]
    if target == "outside":
        return "it leaves the package"
    if target not in PACKAGES:
        return ""
    if own != "pipeline":
        return "" if own == target else f"{own} imports nothing of ours but itself"
    me = Path(found.file).parts[1].removesuffix(".py")
    if target != "pipeline" or me == "__init__":
        return ""
    it = _module(found.target)
    if not it:
        return "name the module that the thing stands in"
    if it == me:
        return ""
    if it not in ORDER or me not in ORDER:
        return "the module has no place in the order of the modules"
    return "" if ORDER.index(it) < ORDER.index(me) else f"{it} stands after {me}"


def _style(found: Import) -> str:
    inside = found.file.split("/")[0] == found.target.split(".")[0]
    return "relative inside a package, absolute across" if inside and not found.relative else ""


def _library(found: Import) -> str:
    if found.relative:
        return ""
    places = ONLY_IN.get(found.target.split(".")[0])
    return "" if places is None or found.file.startswith(places) else f"only {', '.join(places)} may name it"


def _heads_in_store(found: Import) -> str:
    if found.file != "pipeline/store.py" or found.target.split(".")[0] != "heads":
        return ""
    return "" if found.typing_only or found.where == "bag" else "only inside bag(), or for types"


def broad(source: str) -> list[tuple[str, int]]:
    """(function, line) of every handler that catches everything and does not raise it again."""
    return [
        (scope, node.lineno)
        for node, scope, _ in _walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler) and _catches_all(node.type) and not _reraises(node)
    ]


def _catches_all(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or (isinstance(k, ast.Name) and k.id in ("Exception", "BaseException")) for k in kinds)


def _reraises(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def sources() -> dict[str, str]:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_no_file_breaks_a_rule():
    files = sources()
    assert len(files) > 40, "the walk must find the files"
    assert violations(files) == []


def test_every_module_has_a_place_in_the_order():
    there = {path.stem for path in (ROOT / "pipeline").glob("*.py")} | {"readers"}
    assert there - {"__init__"} <= set(ORDER)


def test_the_page_on_the_architecture_has_the_same_order():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    names = [name for cell in first_cells for name in re.findall(r"`(\w+)/?`", cell)]
    assert names == [name for name in ORDER if name != "quiet"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("heads/abmil.py", "def f():\n    from pipeline.errors import SlideError"),
        ("extractors/uni.py", "import heads"),
        ("heads/abmil.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from extractors import Encoder"),
        ("heads/abmil.py", "from heads.bag import Bag"),
        ("heads/abmil.py", "import importlib\nimportlib.import_module('pipeline.store')"),
        ("pipeline/store.py", "def f():\n    def g():\n        from .stages import prepare"),
        ("pipeline/store.py", "from . import stages"),
        ("pipeline/store.py", "if TYPE_CHECKING:\n    from .encode import Work"),
        ("pipeline/store.py", "from heads import Bag"),
        ("pipeline/store.py", "def bags():\n    from heads import Bag"),
        ("pipeline/readers/image.py", "from ..tissue import TissueMask"),
        ("pipeline/readers/image.py", "from ...heads import Bag"),
        ("pipeline/stages.py", "from pipeline.store import BagStore"),
        ("pipeline/stages.py", "from . import BagStore"),
        ("pipeline/stages.py", "import dask.distributed"),
        ("pipeline/batch.py", "import dask"),
        ("pipeline/worker.py", "from distributed import Worker"),
        ("pipeline/prediction.py", "def f():\n    import zarr"),
        ("pipeline/scale.py", "import tiffslide"),
        ("extractors/uni.py", "from openslide import OpenSlide"),
        ("pipeline/store.py", "def f():\n    try:\n        pass\n    except Exception:\n        pass"),
        ("pipeline/store.py", "try:\n    pass\nexcept:\n    pass"),
        ("pipeline/cli.py", "def run():\n    try:\n        f()\n    except (OSError, BaseException):\n        raise X"),
    ],
)  # fmt: skip
def test_each_rule_is_able_to_fail(file, source):
    assert len(violations({file: source})) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pipeline/store.py", "if TYPE_CHECKING:\n    from heads import Bag"),
        ("pipeline/store.py", "class S:\n    def bag(self):\n        from heads import Bag"),
        ("pipeline/readers/openslide.py", "import openslide as library\nfrom ..scale import ScaleTags"),
        ("pipeline/readers/__init__.py", "from .tiffcheck import fault\nfrom ..slide import Slide"),
        ("pipeline/prediction.py", "from heads import load_head\nfrom .store import BagStore"),
        ("pipeline/cluster.py", "import dask"),
        ("pipeline/readers/__init__.py", "try:\n    pass\nexcept BaseException:\n    close()\n    raise"),
        ("pipeline/errors.py", "def slide_door():\n    try:\n        pass\n    except Exception:\n        pass"),
    ],
)
def test_what_is_allowed_is_allowed(file, source):
    assert violations({file: source}) == []


def loaded(code: str, *names: str) -> list[str]:
    """Which of `names` a fresh interpreter has loaded after running `code`."""
    tail = f"\nimport sys\nprint(*(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_slides_and_stores_need_no_torch_and_no_dask():
    modules = [*ORDER[: ORDER.index("store") + 1], "readers.image", "readers.openslide", "readers.tiffslide"]
    code = "import " + ", ".join(f"pipeline.{name}" for name in modules)
    assert loaded(code, "torch", "dask", "distributed", "timm", "pipeline.store") == ["pipeline.store"]


def test_the_package_itself_loads_nothing():
    assert loaded("import pipeline", "torch", "zarr", "numpy", "cv2", "pipeline.config") == []
    assert loaded("import extractors; extractors.list_encoders(); extractors.load_encoder('resnet50')", "torch") == []


CLI = """
import sys
from pipeline.cli import main
sys.argv = ["slidestream", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
"""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["train", "--help"], ["predict", "-h"]])
def test_help_loads_nothing_heavy(arguments):
    assert loaded(CLI.format(arguments=arguments), "torch", "dask", "zarr", "cv2", "scipy") == []


def test_a_run_needs_no_torch_in_the_process_that_is_typed():
    """It is imported where the encoder is, meanwhile this process has a cluster to start."""
    code = "import pipeline.batch; from pipeline.deploy import reached"
    assert loaded(code, "torch", "timm", "pipeline.stages") == ["pipeline.stages"]


def test_status_needs_no_torch(tmp_path):
    (tmp_path / "run.json").write_text('{"root": "/s", "recipe": {}, "encoders": {}}')
    assert loaded(CLI.format(arguments=["status", str(tmp_path)]), "torch", "dask", "timm") == []
