"""Digests of source code: of the package, of a commit's package, and of classes that a config takes from elsewhere."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from svp_bench.core.resources import checkout_root
from svp_bench.records.digests import canonical_digest, cell_config

_PACKAGE = Path(__file__).resolve().parents[1]
_RECORDED = {"torch", "lightning", "timm", "torchmetrics", "numpy", "PIL", "jsonargparse", "numba"}  # in `libraries`


# --- the package -----------------------------------------------------------------------------------------------------


@cache
def package_digest() -> str:
    """Return "sha256:..." of the package's own files as they are on disk, read once in a process.

    The cards, configs and quoted numbers that a wheel carries inside the package (`_share`) are left out, as caches and
    hidden files are: so a checkout and the wheel built from it have one digest.
    """
    files = {}
    for folder, names, entries in os.walk(_PACKAGE):
        names[:] = [name for name in names if _counts(name)]
        for name in entries:
            path = Path(folder) / name
            if _counts(name):
                files[path.relative_to(_PACKAGE).as_posix()] = _digest(path.read_bytes())
    return canonical_digest(files)


@cache
def package_digest_at(commit: str) -> str | None:
    """Return what `package_digest` is for a commit of this checkout; None without a repository or that commit."""
    root = checkout_root()
    content = git(root, "archive", "--format=tar", commit, "svp_bench") if root else None
    if content is None:
        return None
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        blobs = {entry.name.removeprefix("svp_bench/"): archive.extractfile(entry) for entry in archive}
    return canonical_digest(
        {name: _digest(blob.read()) for name, blob in blobs.items() if blob and all(map(_counts, name.split("/")))}
    )


def git(root: Path, *arguments: str, timeout: float = 60) -> bytes | None:
    """Run git on the repository whose top folder is `root`; None if that fails, or `root` is inside another one.

    Variables like GIT_DIR, which point git to another repository, are not passed on.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def run(*words: str) -> bytes | None:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, timeout=timeout, env=environment)
        return None if done.returncode else done.stdout

    try:
        top = run("rev-parse", "--show-toplevel")
        if top is None or Path(os.fsdecode(top.rstrip(b"\n"))).resolve() != root.resolve():
            return None
        return run(*arguments)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _counts(name: str) -> bool:
    """Whether a file or folder is part of the package: no cache, no hidden file, not what only a wheel carries."""
    return not name.startswith(".") and name not in ("__pycache__", "_share")


def _digest(content: bytes) -> str:
    """Digest a file; line ends of Windows are those of others."""
    return "sha256:" + hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


# --- classes from elsewhere ------------------------------------------------------------------------------------------


def class_paths(config: Mapping[str, Any]) -> list[str]:
    """Return every class and function that the part of a config which makes a cell names, e.g. "my_methods.Scale".

    That is each `class_path`, and each other text that is a name in a module which is imported already.
    """
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            found.update([value["class_path"]] if isinstance(value.get("class_path"), str) else [])
            for item in value.values():
                look(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                look(item)
        elif isinstance(value, str) and value.rpartition(".")[0] in sys.modules:
            found.add(value)

    look(cell_config(config))
    return sorted(found)


def source_files(classes: Sequence[str]) -> dict[str, str]:
    """Return the files that define classes from outside of the package, and all that these import, by name → digest.

    Followed are imports of modules that lie neither in Python's own library nor in an installed package. A class from
    an installed package has one entry, "NAME (installed)", over those files of that package which its module needs,
    unless `libraries` of a record names the version. Names are relative to the folder that Python finds the module in.
    A file is read once in a process, when its class has just been imported: a later edit is not what runs.

    Args:
        classes: "module.Class", importable.
    """
    files: dict[str, str] = {}
    for name in classes:
        module = name.rpartition(".")[0]
        path = _file(module) if module and not _is_known(module) else None
        if path is None:
            continue
        top = module.partition(".")[0]
        if _installed(path) and top in sys.stdlib_module_names:
            continue
        if _installed(path):
            files[f"{top} (installed)"] = canonical_digest(_closure([module], top))
        else:
            files.update(_closure([module, *_bases(name)]))
    return dict(sorted(files.items()))


def _is_known(module: str) -> bool:
    """Whether a module is of this package, or of a library whose version each record names."""
    top = module.partition(".")[0]
    return top == "svp_bench" or top in _RECORDED


def _closure(modules: Sequence[str], installed: str | None = None) -> dict[str, str]:
    """Return the files of modules and of what they import, by name → digest; of installed packages only `installed`."""
    files: dict[str, str] = {}
    queue, seen = list(modules), set()
    while queue:
        current = queue.pop()
        if current in seen or _is_known(current):
            continue
        seen.add(current)
        path = _file(current)
        if path is not None and _installed(path) and current.partition(".")[0] != installed:
            continue
        if path is not None:
            depth = current.count(".") + (path.name == "__init__.py")
            files["/".join(path.parts[-1 - depth :])] = _file_digest(path)
            queue += _imports(path, current)
        queue += [current.rpartition(".")[0]] if "." in current else []  # a package runs before its modules
    return files


def _bases(name: str) -> list[str]:
    """Return the modules of a class and of the classes that it inherits from; none if it is not imported yet."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return [base.__module__ for base in found.__mro__] if isinstance(found, type) else []


def _file(module: str) -> Path | None:
    """Return the file of a module, source or compiled, without importing anything; None if there is none."""
    known = getattr(sys.modules.get(module), "__file__", None)
    if isinstance(known, str) and Path(known).is_file():
        return Path(known).resolve()
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for name in rest:  # the finder of a path imports no package
            spec = spec and PathFinder.find_spec(name, spec.submodule_search_locations or [])
    except (ImportError, ValueError, AttributeError):
        return None
    origin = spec.origin if spec is not None else None
    return Path(origin).resolve() if origin and Path(origin).is_file() else None


@cache
def _file_digest(path: Path) -> str:
    return _digest(path.read_bytes())


@cache
def _installed_places() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    places = {Path(place).resolve() for name in names if (place := sysconfig.get_paths().get(name))}
    return (*sorted(places), _PACKAGE)


@cache
def _installed(path: Path) -> bool:
    """Whether a file belongs to Python, to an installed package, or to this one."""
    inside = any(path.is_relative_to(place) for place in _installed_places())
    return inside or bool({"site-packages", "dist-packages"} & set(path.parts))


@cache
def _imports(path: Path, module: str) -> tuple[str, ...]:
    """Return the modules that a file imports, anywhere in it; those that its text names, not computed names."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return tuple(_named(_tree(path), package))


def _tree(path: Path) -> ast.AST:
    try:
        return ast.parse(path.read_bytes() if path.suffix == ".py" else b"")
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _named(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".") if package else []
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            if base:
                yield base
            yield from (f"{base}.{name.name}" if base else name.name for name in node.names if name.name != "*")
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            name = node.args[0].value
            if name.startswith("."):
                name = importlib.util.resolve_name(name, package) if package else name.lstrip(".")
            yield name
