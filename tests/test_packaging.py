"""The cards, configs and published numbers arrive with a wheel and with an editable install; the set-up is sound."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import svp_bench
from svp_bench.records.code import package_digest
from svp_bench.tasks.cards import list_tasks

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parent.parent
# What a build reads. Copied before building, so that no build folder appears in the checkout, and nothing that an
# older build left in one can get into the wheel.
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "svp_bench", "tasks", "configs", "results/published", "tests"]
SHARED = {"tasks": "tasks", "configs": "configs", "published": "results/published"}
DATA_SUFFIXES = {".yaml", ".yml", ".csv", ".bib", ".txt"}
LARGEST_FILE = 1 << 20  # bytes
LARGEST_WEIGHTS = 4_000_000

PROBE = """
import hashlib, json, sys
from pathlib import Path
import svp_bench
from svp_bench.core.resources import configs_dir, published_dir, tasks_dir
from svp_bench.records.code import package_digest
found = {"package": svp_bench.__file__, "version": svp_bench.__version__, "files": {}, "digest": package_digest()}
for name, folder in {"tasks": tasks_dir(), "configs": configs_dir(), "published": published_dir()}.items():
    found[name] = str(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            key = name + "/" + path.relative_to(folder).as_posix()
            found["files"][key] = hashlib.sha256(path.read_bytes()).hexdigest()
print(json.dumps(found))
"""


def shared_files(root: Path) -> dict[str, str]:
    """Return the digest of each data file of a checkout, by its place in the wheel's `_share`."""
    return {
        f"{name}/{path.relative_to(root / folder).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for name, folder in SHARED.items()
        for path in (root / folder).rglob("*")
        if path.suffix in DATA_SUFFIXES
    }


def call(command: Sequence[str | Path], cwd: Path) -> str:
    """Run a command as an outsider would, without the paths of this checkout; return what it printed."""
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, which borrows every package of this one except svp-bench."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def script(self) -> Path:
        return self.folder / "bin" / "svp-bench"

    @classmethod
    def make(cls, folder: Path) -> Environment:
        call([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
        (site,) = (folder / "lib").glob("python*/site-packages")
        # Plain lines of a .pth file come after the environment's own packages, and .pth files in the borrowed folders
        # are not read: the finder of an editable install of svp-bench there stays asleep.
        borrowed = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
        (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
        return cls(folder)

    def install(self, *what: str | Path) -> None:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "--disable-pip-version-check",
            "install",
            "-q",
        ]
        call([*pip, "--no-deps", "--no-index", "--no-build-isolation", *what], self.folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    dist = tmp_path_factory.mktemp("dist")
    call([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source], source)
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment.make(tmp_path_factory.mktemp("wheel") / "venv")
    environment.install(wheel)
    return environment


# ---- the wheel


def test_the_wheel_holds_package_and_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
    info = f"svp_bench-{svp_bench.__version__}.dist-info/"
    share = "svp_bench/_share/"
    shipped = {name.removeprefix(share) for name in entries if name.startswith(share)}
    package = {name for name in entries if not name.startswith((info, share))}
    kinds = {".py", ".j2", ".css", ".js", ".safetensors"}  # code, the report's template, style, script, the weights
    paths = [path for path in (ROOT / "svp_bench").rglob("*") if path.suffix in kinds]
    in_checkout = {path.relative_to(ROOT).as_posix() for path in paths}

    assert {name for name in shipped if Path(name).suffix in DATA_SUFFIXES} == set(shared_files(ROOT))
    assert {Path(name).suffix for name in shipped} <= DATA_SUFFIXES | {".md"}
    assert package == in_checkout | {"svp_bench/py.typed", "svp_bench/models/embedded/README.md"}
    assert f"{info}licenses/LICENSE" in entries
    large = {name: entry.file_size for name, entry in entries.items() if entry.file_size > LARGEST_FILE}
    assert all(name.endswith(".safetensors") and size <= LARGEST_WEIGHTS for name, size in large.items()), large
    print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {len(entries)} files")


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    assert f"\nVersion: {svp_bench.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata


def test_an_installed_wheel_finds_its_data(installed: Environment, tmp_path: Path) -> None:
    found = json.loads(call([installed.python, "-c", PROBE], tmp_path))
    assert installed.folder in Path(found["package"]).parents
    assert found["version"] == svp_bench.__version__
    assert found["digest"] == package_digest.__wrapped__(), "a checkout and its wheel have one digest of their code"
    for name in SHARED:
        assert Path(found["package"]).parent / "_share" / name == Path(found[name])
    assert {name: digest for name, digest in found["files"].items() if Path(name).suffix in DATA_SUFFIXES} == (
        shared_files(ROOT)
    )


def test_an_installed_wheel_lists_tasks_and_methods(installed: Environment, tmp_path: Path) -> None:
    tasks = call([installed.script, "tasks"], tmp_path)
    assert [name for name in list_tasks() if name not in tasks] == []
    methods = call([installed.script, "methods"], tmp_path)
    assert [name for name in svp_bench.list_methods() if name not in methods] == []
    assert list(tmp_path.iterdir()) == [], "listing writes nothing"


def test_an_editable_install_finds_the_checkout(source: Path, tmp_path: Path) -> None:
    environment = Environment.make(tmp_path / "venv")
    environment.install("-e", source)
    found = json.loads(call([environment.python, "-c", PROBE], tmp_path))
    assert Path(found["package"]) == source / "svp_bench" / "__init__.py"
    assert {name: Path(found[name]) for name in SHARED} == {name: source / folder for name, folder in SHARED.items()}


# ---- what the project states about itself


def project() -> dict[str, Any]:
    data: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return data["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def test_constraints_are_exact_pins_in_order_without_addresses() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert [line for line in pinned if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert pinned == sorted(pinned, key=str.lower)
    assert len(pins()) == len(pinned)
    assert "://" not in "".join(lines)


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    about = project()
    extras = about["optional-dependencies"]
    wanted = [Requirement(text) for text in [*about["dependencies"], *extras["test"], *extras["dev"]]]
    loose = {
        requirement.name: pins().get(canonicalize_name(requirement.name), "no pin")
        for requirement in wanted
        if requirement.name != about["name"]
        and pins().get(canonicalize_name(requirement.name), "no pin") not in requirement.specifier
    }
    assert loose == {}


def test_the_citation_file_and_the_changelog_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {key: citation[key] for key in ("cff-version", "version", "license")} == {
        "cff-version": "1.2.0",
        "version": svp_bench.__version__,
        "license": "Apache-2.0",
    }
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, flags=re.MULTILINE)[0] == svp_bench.__version__


# ---- make


@dataclass(frozen=True)
class Make:
    """A folder with the project's Makefile and programs that only note how they are called."""

    folder: Path

    @property
    def stamp(self) -> Path:
        return self.folder / ".venv" / "installed.stamp"

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls.log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # An outer make, with `make test PYTHON=...`, hands its variables down.
        outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "CONSTRAINTS", "WORKERS"}
        env = {key: value for key, value in os.environ.items() if key not in outer}
        return subprocess.run(
            ["make", *arguments], cwd=self.folder, env=env, capture_output=True, text=True, timeout=600
        )

    def program(self, path: str, version: tuple[int, int] = (3, 11), pip_status: int = 0) -> str:
        """Write a substitute for Python (or for a script of the environment) and return its path."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f"""#!/bin/sh
case "$1 $2" in
  "-c "*) exec {sys.executable} -c "import sys; sys.version_info = {version}; $2" ;;
esac
echo "$0 $*" >> calls.log
case "$1 $2" in
  "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip") echo "Collecting torch"; echo "ERROR: no such package" >&2; exit {pip_status} ;;
esac
""",
            encoding="utf-8",
        )
        file.chmod(0o755)
        return f"./{path}"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path / name)
    return Make(tmp_path)


def test_make_alone_prints_every_subcommand_and_does_nothing(make: Make) -> None:
    done = make.run()
    assert done.returncode == 0
    phony = re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert re.findall(r"^  make (\S+) +\S", done.stdout, flags=re.MULTILINE) == phony
    assert not (make.folder / ".venv").exists()


def test_a_subcommand_sets_up_first_and_says_so_then_never_again(make: Make) -> None:
    python = make.program("python")
    done = make.run("setup", f"PYTHON={python}")
    assert done.returncode == 0, done.stderr
    assert "Setting up .venv: about three minutes and 6 GB" in done.stdout
    assert "Collecting" not in done.stdout + done.stderr  # pip is quiet unless it fails
    assert re.search(r"^Installed in \d+ s; what pip printed: .venv/install.log$", done.stdout, flags=re.MULTILINE)
    assert "Collecting torch" in (make.folder / ".venv" / "install.log").read_text(encoding="utf-8")
    assert [call.split(" ", 1)[1] for call in make.calls] == [
        "-m venv --clear .venv",
        "-m pip install --disable-pip-version-check -c constraints.txt -e .[dev]",
    ]
    assert make.stamp.exists()

    make.program(".venv/bin/svp-bench")
    done = make.run("demo", f"PYTHON={python}")
    assert done.returncode == 0, done.stderr
    assert [call.split(" ", 1)[1] for call in make.calls[2:]] == ["demo"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_dependency_upgrades_the_environment_in_place(make: Make, changed: str) -> None:
    python = make.program(".venv/bin/python")
    assert make.run("setup", "PYTHON=/nowhere/python").returncode == 0
    os.utime(make.stamp, (0, 0))
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(make.folder / name, (0, 0))
    assert make.run("setup").returncode == 0
    assert len(make.calls) == 1
    os.utime(make.folder / changed, (10, 10))
    assert make.run("setup").returncode == 0
    assert [line.split(" ")[0:3] for line in make.calls] == [[python.removeprefix("./"), "-m", "pip"]] * 2


def test_a_failed_install_leaves_no_stamp(make: Make) -> None:
    done = make.run("test", f"PYTHON={make.program('python', pip_status=1)}")
    assert done.returncode == 2
    assert "Collecting torch\nERROR: no such package\npip failed; all of its output: .venv/install.log" in done.stderr
    assert not make.stamp.exists()
    assert not any("pytest" in line for line in make.calls)


@pytest.mark.parametrize("where", ["python", ".venv/bin/python"])
def test_an_old_python_is_refused_in_one_line(make: Make, where: str) -> None:
    done = make.run("setup", f"PYTHON={make.program(where, version=(3, 9))}")
    assert done.returncode == 2
    assert "svp-bench needs Python 3.10 or newer" in done.stderr.splitlines()[0]
    assert make.calls == []


def test_python_3_10_is_told_that_the_pins_are_not_for_it(make: Make) -> None:
    python = make.program("python", version=(3, 10))
    done = make.run("setup", f"PYTHON={python}")
    assert done.returncode == 2
    assert "the pins of constraints.txt need Python 3.11 or newer" in done.stderr.splitlines()[0]
    assert make.calls == []
    assert make.run("setup", f"PYTHON={python}", "CONSTRAINTS=").returncode == 0
    assert make.calls[-1].endswith("-m pip install --disable-pip-version-check -e .[dev]")


def test_continuous_integration_runs_what_a_developer_types() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make lint test-narrow test"
