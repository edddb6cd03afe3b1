"""What ARCHITECTURE.md says about rooms and arrows, held to by reading the source and by importing it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import svp_bench
from svp_bench.cards import load_task

PACKAGE = Path(svp_bench.__file__).resolve().parent
ROOT = PACKAGE.parent

# The rooms in the order of ARCHITECTURE.md, lowest first: the modules or packages of a room, and the rooms that it may
# import. Its own room is always allowed. The package itself, `svp_bench/__init__.py`, is the front door.
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "foundation": (("_version", "errors", "registry", "resources", "atomic", "interrupts", "terminal"), ()),
    "cards": (("plain_yaml", "cards"), ("foundation",)),
    "results": (("results",), ("foundation", "cards")),
    "ops": (("ops",), ("foundation",)),
    "models": (("models",), ("foundation", "ops")),
    "methods": (("methods",), ("foundation", "ops", "models")),
    "data": (("data",), ("foundation", "cards")),
    "config": (("config",), ("foundation", "cards", "results", "methods")),
    "train": (("train",), ("foundation", "cards", "results", "ops", "models", "methods", "data", "config")),
    "sweep": (
        ("sweep",),
        ("foundation", "cards", "results", "ops", "models", "methods", "data", "config", "train"),
    ),
    "door": (
        ("verbs", "cli", "__init__", "__main__"),
        ("foundation", "cards", "results", "ops", "models", "methods", "data", "train", "config", "sweep"),
    ),
}
ROOM_OF = {part: room for room, (parts, _) in ROOMS.items() for part in parts}

HEAVY = ("torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning", "timm", "transformers")
LIGHT_MODULES = [
    "svp_bench",
    "svp_bench.cards",
    "svp_bench.results.record",
    "svp_bench.results.files",
    "svp_bench.results.tables",
    "svp_bench.data",
    "svp_bench.methods",
    "svp_bench.ops",
    "svp_bench.config",
    "svp_bench.cli",
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
        elif isinstance(node, ast.Constant) and OUR_PATH.fullmatch(str(node.value)):
            yield node.lineno, str(node.value).replace(":", ".")


def upward_arrows(tree: ast.AST, inside: str, room: str) -> list[str]:
    """Return a line of text for each import of ours that `room` may not have."""
    allowed = {room, *ROOMS[room][1]}
    wrong = []
    for line, name in imported_modules(tree, inside):
        parts = name.split(".")
        if parts[0] != "svp_bench":
            continue
        part = parts[1] if len(parts) > 1 else "__init__"
        if part == "__version__":
            part = "_version"
        target = ROOM_OF.get(part, ROOM_OF["__init__"])  # `from svp_bench import create_model` is the front door
        if target not in allowed:
            wrong.append(f"line {line}: {room} imports {name} ({target}); allowed: {', '.join(sorted(allowed))}")
    return wrong


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


# ---- rooms


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in ROOM_OF, f"{path.name} is in no room: add it to ARCHITECTURE.md and to ROOMS"
    assert upward_arrows(parse(path), package_of(path), ROOM_OF[part_of(path)]) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cards", "import svp_bench.data"),
        ("cards", "import svp_bench.data as data"),
        ("models", "from svp_bench.methods.svp import SVP"),
        ("models", "from svp_bench import methods"),
        ("models", "from svp_bench import create_model"),
        ("models", "from ..methods import svp"),
        ("models", "from .. import methods"),
        ("models", "def late():\n    import svp_bench.methods.build"),
        ("data", "if TYPE_CHECKING:\n    from svp_bench.train.module import Module"),
        ("ops", "importlib.import_module('svp_bench.models.vim')"),
        ("ops", "registry.add('reference', 'svp_bench.models.vim:scan')"),
        ("results", "from svp_bench.config import digest"),
        ("config", "from svp_bench.train.parsing import resolve"),
        ("foundation", "from svp_bench.cards import list_tasks"),
    ],
)
def test_an_upward_arrow_is_seen(room: str, source: str) -> None:
    assert len(upward_arrows(ast.parse(source), f"svp_bench.{room}", room)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("models", "from svp_bench.ops import selective_scan\nfrom svp_bench.models.vim import VisionMamba"),
        ("models", "from .vim import VisionMamba\nfrom ..ops import selective_scan"),
        ("results", "from svp_bench import __version__\nfrom svp_bench._version import __version__"),
        ("results", "import json\nname = 'svp_bench'\n'''svp_bench.train reads this.'''"),
    ],
)
def test_an_arrow_down_is_not_blamed(room: str, source: str) -> None:
    assert upward_arrows(ast.parse(source), f"svp_bench.{room}", room) == []


def test_the_rooms_are_those_of_the_architecture_page() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("\n## Rooms", 1)[1].split("\n## ", 1)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    on_page = [tuple(name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([^`]+)`", cell)) for cell in cells]
    unnamed = {"_version", "__init__", "__main__"}  # carry no room of their own on the page
    in_test = [tuple(part for part in parts if part not in unnamed) for parts, _ in ROOMS.values()]
    assert on_page == in_test


def test_the_allowed_rooms_are_lower_ones() -> None:
    order = list(ROOMS)
    for room, (_, allowed) in ROOMS.items():
        assert set(allowed) <= set(order[: order.index(room)])


# ---- light imports


def test_results_never_import_torch() -> None:
    paths = sorted((PACKAGE / "results").rglob("*.py"))
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


# ---- the front door


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
            if load_task(f"{suite}/{card.stem}").source != "drawn":  # those are called by common words
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
    assert bare - task_names() == {"textures", "location", "orientation", "count", "size"}


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
