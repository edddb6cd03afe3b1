"""The packages and imports that ARCHITECTURE.md states, checked on the source and by importing it."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import svp_bench
from svp_bench.tasks.cards import load_task

PACKAGE = Path(svp_bench.__file__).resolve().parent
ROOT = PACKAGE.parent

# The packages in the order of ARCHITECTURE.md, lowest first, and the packages that each may import. Modules beside them
# (`__init__.py`, `__main__.py`) count as the top package, which may import everything.
PACKAGES: dict[str, tuple[str, ...]] = {
    "core": (),
    "stats": ("core",),
    "tasks": ("core",),
    "records": ("core", "stats", "tasks"),
    "ops": ("core",),
    "models": ("core", "ops"),
    "methods": ("core", "ops", "models"),
    "data": ("core", "tasks"),
    "prepare": ("core", "tasks", "data", "models"),
    "config": ("core", "tasks", "records", "methods"),
    "tables": ("core", "stats", "tasks", "records"),
    "audit": ("core", "stats", "tasks", "records"),
    "report": ("core", "stats", "tasks", "records", "tables"),
    "train": ("core", "stats", "tasks", "records", "ops", "models", "methods", "data", "config", "tables"),
    "sweep": (
        *("core", "stats", "tasks", "records", "ops", "models", "methods", "data", "config", "tables", "report"),
        "train",
    ),
}
PACKAGES["cli"] = (*PACKAGES, "audit")
PACKAGES["top"] = (*PACKAGES,)

HEAVY = ("torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning", "timm", "transformers")
LIGHT_MODULES = [
    "svp_bench",
    "svp_bench.tasks.cards",
    "svp_bench.records.record",
    "svp_bench.records.store",
    "svp_bench.tables.build",
    "svp_bench.data",
    "svp_bench.methods",
    "svp_bench.ops",
    "svp_bench.config.compose",
    "svp_bench.cli.main",
]
PUBLIC_NAMES = [
    "__version__",
    "create_model",
    "list_backends",
    "list_methods",
    "list_tasks",
    "load_checkpoint",
    "load_results",
]

ENTRY_POINTS = {"svp_bench.backbones"}  # a group of entry points that is not also a package
OUR_PATH = re.compile(r"svp_bench(\.\w+)+(:\w+)?")
DECIDING_METHODS = {"startswith", "endswith", "removeprefix", "removesuffix", "fullmatch"}

MODULES = sorted(PACKAGE.rglob("*.py"))
IDS = [path.relative_to(PACKAGE).as_posix() for path in MODULES]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.AST, inside: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything that a module imports, wherever the import stands in it.

    `from a.b import c` yields `a.b.c`, whatever c is. A string that is nothing but the path of a module of ours, or
    "module:attribute", counts too: it is how the registry and `importlib.import_module` name what they import.

    Args:
        tree: The module.
        inside: The dotted name of the package that the module lies in, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Constant) and OUR_PATH.fullmatch(str(node.value)) and node.value not in ENTRY_POINTS:
            yield node.lineno, str(node.value).replace(":", ".")


def upward_imports(tree: ast.AST, inside: str, package: str) -> list[str]:
    """Return a line of text for each import of the project's own that `package` may not have."""
    allowed = {package, *PACKAGES[package]}
    wrong = []
    for line, name in imported_modules(tree, inside):
        parts = name.split(".")
        if parts[0] != "svp_bench":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in PACKAGES else "top"  # `from svp_bench import create_model`
        if parts[1:2] in (["_version"], ["__version__"]):
            continue
        if target not in allowed:
            wrong.append(f"line {line}: {package} imports {name} ({target}); allowed: {', '.join(sorted(allowed))}")
    return wrong


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


def part_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "top"


# ---- packages


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in PACKAGES, f"{path.name} is in no package: add it to ARCHITECTURE.md and to PACKAGES"
    assert upward_imports(parse(path), package_of(path), part_of(path)) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("tasks", "import svp_bench.data"),
        ("tasks", "import svp_bench.data as data"),
        ("models", "from svp_bench.methods.svp import SVP"),
        ("models", "from svp_bench import methods"),
        ("models", "from svp_bench import create_model"),
        ("models", "from ..methods import svp"),
        ("models", "from .. import methods"),
        ("models", "def late():\n    import svp_bench.methods.build"),
        ("data", "if TYPE_CHECKING:\n    from svp_bench.train.module import Module"),
        ("ops", "importlib.import_module('svp_bench.models.vim')"),
        ("ops", "registry.add('reference', 'svp_bench.models.vim:scan')"),
        ("records", "from svp_bench.config.compose import digest"),
        ("config", "from svp_bench.train.parser import resolve"),
        ("core", "from svp_bench.tasks.cards import list_tasks"),
    ],
)
def test_an_upward_import_is_found(package: str, source: str) -> None:
    assert len(upward_imports(ast.parse(source), f"svp_bench.{package}", package)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("models", "from svp_bench.ops import selective_scan\nfrom svp_bench.models.vim import VisionMamba"),
        ("models", "from .vim import VisionMamba\nfrom ..ops import selective_scan"),
        ("records", "from svp_bench import __version__\nfrom svp_bench._version import __version__"),
        ("records", "import json\nname = 'svp_bench'\n'''svp_bench.train reads this.'''"),
    ],
)
def test_a_downward_import_is_allowed(package: str, source: str) -> None:
    assert upward_imports(ast.parse(source), f"svp_bench.{package}", package) == []


def test_the_packages_are_those_of_the_architecture_page() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("\n## Packages", 1)[1].split("\n## ", 1)[0]
    on_page = re.findall(r"^\| `(\w+)/` ", section, flags=re.MULTILINE)
    assert on_page == [package for package in PACKAGES if package != "top"]


def test_the_allowed_packages_are_lower_ones() -> None:
    order = list(PACKAGES)
    for package, allowed in PACKAGES.items():
        assert set(allowed) <= set(order[: order.index(package)])


def test_no_module_imports_itself_in_a_circle() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        imports = [node for node in ast.walk(parse(path)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        imported = [name for node in imports for _, name in imported_modules(node, package_of(path))]
        found = (next((one for one in (name, name.rpartition(".")[0]) if one in names), own) for name in imported)
        graph[own] = {*found} - {own}
    graphlib.TopologicalSorter(graph).prepare()


# ---- light imports


@pytest.mark.parametrize("package", ["core", "stats", "tasks", "records", "config", "tables", "audit", "report"])
def test_light_packages_never_import_torch(package: str) -> None:
    paths = sorted((PACKAGE / package).rglob("*.py"))
    assert paths
    heavy = [
        f"{path.name}, line {line}: {name}"
        for path in paths
        for line, name in imported_modules(parse(path), package_of(path))
        if name.split(".")[0] in HEAVY
    ]
    assert heavy == []


def test_listing_and_tabling_import_no_torch() -> None:
    code = """
import importlib, json, sys
culprits = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    for heavy in json.loads(sys.argv[2]):
        if heavy in sys.modules:
            culprits.setdefault(heavy, name)
print(json.dumps(culprits))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(LIGHT_MODULES), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, "heavy package: the module of ours that brought it in"


# ---- public names


def test_public_names_are_pinned() -> None:
    assert sorted(svp_bench.__all__) == PUBLIC_NAMES
    assert set(PUBLIC_NAMES) <= set(dir(svp_bench))


def test_public_names_are_the_same_for_type_checkers() -> None:
    blocks = [node for node in parse(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    typed = {
        name.asname: statement.module
        for block in blocks
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for name in statement.names
    }
    assert typed == svp_bench._PUBLIC


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves(name: str) -> None:
    assert getattr(svp_bench, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'svp_bench' has no attribute 'create_modle'"):
        svp_bench.create_modle  # noqa: B018


# ---- data, not code


def task_names() -> set[str]:
    """Return the full name and the id of every task card of the checkout."""
    names = set()
    for suite in (path.stem for path in (ROOT / "tasks").glob("*.yaml")):
        for card in (ROOT / "tasks" / suite).glob("*.yaml"):
            names.add(f"{suite}/{card.stem}")
            task = load_task(f"{suite}/{card.stem}")
            if task.source != "synthetic" and suite != "custom":  # those have common words as names
                names.add(card.stem)
    return names


def comparisons(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each string literal that decides something.

    That is: one side of a comparison (also within a tuple, list or set), a `case` pattern, a key of a dictionary, or
    an argument of `startswith`, `endswith` and their like.
    """
    for node in ast.walk(tree):
        deciding: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            deciding = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            deciding = [node.value]
        elif isinstance(node, ast.Dict):
            deciding = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in DECIDING_METHODS:
            deciding = list(node.args)
        for part in deciding:
            for inner in ast.walk(part):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.lineno, inner.value


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_no_code_knows_a_task_by_name(path: Path) -> None:
    names = task_names()
    assert [f"line {line}: {text!r}" for line, text in comparisons(parse(path)) if text in names] == []


def test_the_names_looked_for_are_those_of_the_cards() -> None:
    full, bare = set(svp_bench.list_tasks()), {name.split("/")[1] for name in svp_bench.list_tasks()}
    assert full < task_names() < full | bare
    assert bare - task_names() == {"textures", "location", "orientation", "count", "size", "images"}


@pytest.mark.parametrize(
    "source",
    [
        "if task.name == 'vtab/dtd': flip = False",
        "flip = name not in ('kitti', 'other')",
        "match name:\n    case 'dtd' | 'svhn':\n        pass",
        "sizes = {'vtab/svhn': 32}",
        "if name.endswith('svhn'): pass",
    ],
)
def test_a_comparison_with_a_name_is_seen(source: str) -> None:
    assert {text for _, text in comparisons(ast.parse(source))} & {"vtab/dtd", "kitti", "dtd", "vtab/svhn", "svhn"}


def test_a_name_that_decides_nothing_is_not_blamed() -> None:
    assert list(comparisons(ast.parse("print('vtab/dtd')\ndefault = 'vtab/dtd'"))) == []


# ---- documentation


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert (ast.get_docstring(parse(path)) or "").strip()
