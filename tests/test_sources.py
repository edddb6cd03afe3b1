"""What a record states of code: a method's own files and those of the package, and what follows if they change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Outcome, assert_error, command, settle
from helpers import small as line

from svp_bench.audit.record import audit
from svp_bench.records import code
from svp_bench.records.store import read_record
from svp_bench.train import provenance

METHOD = """\
import numpy
from svp_bench.methods.linear import Linear
from strength import STRENGTH


class Probe(Linear):
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale * STRENGTH
"""
YAML = "model:\n  method:\n    class_path: own_probe.Probe\n    init_args: {scale: 1.0}\n"


def forget() -> None:
    """Forget modules and digests, as a new process would."""
    for name in ("own_probe", "strength", "own_package", "own_package.parts", "own_package.deep.inner"):
        sys.modules.pop(name, None)
    for cached in (code._file_digest, code._imports):
        cached.cache_clear()
    shutil.rmtree("__pycache__", ignore_errors=True)  # its clock is in whole seconds


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    settle(tmp_path, monkeypatch)
    Path("own_probe.py").write_text(METHOD, encoding="utf-8")
    Path("strength.py").write_text("STRENGTH = 1.0\n", encoding="utf-8")
    Path("probe.yaml").write_text(YAML, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield tmp_path
    forget()


def edit(name: str = "strength.py") -> None:
    with Path(name).open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    forget()


def fit(*extra: str, **values: str | None) -> Outcome:
    return command(*line("--method", "probe.yaml", *extra, **values))


# ---- which files


def test_what_a_class_imports_from_the_users_folder_is_part_of_it(place: Path) -> None:
    package = Path("own_package/deep")
    package.mkdir(parents=True)
    Path("own_package/__init__.py").write_text("", encoding="utf-8")
    Path("own_package/parts.py").write_text(
        "import importlib\nimport json\n\n\ndef late():\n    from .deep import inner\n    import scipy.stats\n"
        "    return importlib.import_module('strength'), inner\n\n\nclass Part:\n    pass\n",
        encoding="utf-8",
    )
    Path("own_package/deep/inner.py").write_text("import own_package.nowhere\nfrom .. import parts\n", encoding="utf-8")
    files = code.source_files(["own_package.parts.Part", "svp_bench.methods.svp.SVP", "torch.optim.AdamW"])
    assert list(files) == [
        "own_package/__init__.py",
        "own_package/deep/inner.py",
        "own_package/parts.py",
        "strength.py",
    ]
    before = dict(files)
    edit("own_package/deep/inner.py")
    after = code.source_files(["own_package.parts.Part"])
    assert {name for name in files if before[name] != after[name]} == {"own_package/deep/inner.py"}


def test_a_class_that_is_inherited_from_counts(place: Path) -> None:
    Path("own_probe.py").write_text("import strength\nBase = strength.make()\nclass Probe(Base):\n    pass\n")
    Path("strength.py").write_text("def make():\n    import hidden_base\n    return hidden_base.Base\n")
    Path("hidden_base.py").write_text("class Base:\n    pass\n")
    __import__("own_probe")
    assert set(code.source_files(["own_probe.Probe"])) == {"own_probe.py", "strength.py", "hidden_base.py"}
    del sys.modules["hidden_base"]


def test_other_ways_to_a_file_of_the_user_count_too(place: Path) -> None:
    for name in ("inner", "compiled_part"):
        Path("namespace").mkdir(exist_ok=True)
        Path(f"namespace/{name}.py").write_text("import code\n", encoding="utf-8")
    Path("bisect_it.so").write_bytes(b"\0")
    Path("own_probe.py").write_text(
        "import json\nfrom namespace import inner\nimport namespace.compiled_part as part\n"
        "def late():\n    import bisect_it\n",
        encoding="utf-8",
    )
    assert list(code.source_files(["own_probe.Probe"])) == [
        *("bisect_it.so", "namespace/compiled_part.py", "namespace/inner.py", "own_probe.py")
    ]


def test_line_ends_of_another_system_are_no_change(place: Path) -> None:
    unix = code.source_files(["own_probe.Probe"])
    Path("own_probe.py").write_bytes(METHOD.replace("\n", "\r\n").encode())
    forget()
    assert code.source_files(["own_probe.Probe"]) == unix


def test_an_installed_package_of_others_is_one_entry(place: Path) -> None:
    installed = place / "site-packages" / "their_methods"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("from their_methods.core import Theirs\n", encoding="utf-8")
    (installed / "core.py").write_text("class Theirs:\n    pass\n", encoding="utf-8")
    (installed / "unused.py").write_text("", encoding="utf-8")
    sys.path.append(str(installed.parent))
    first = code.source_files(["their_methods.Theirs"])
    assert list(first) == ["their_methods (installed)"]
    (installed / "core.py").write_text("class Theirs:\n    other = 1\n", encoding="utf-8")
    forget()
    assert code.source_files(["their_methods.Theirs"]) != first


def test_every_class_and_function_of_the_cell_is_looked_at(place: Path) -> None:
    __import__("strength")
    config = {
        "model": {"method": {"class_path": "a.B", "init_args": {"act": "strength.STRENGTH", "name": "not.imported"}}},
        "trainer": {"callbacks": [{"class_path": "c.D"}], "logger": {"class_path": "e.F"}},
    }
    assert code.class_paths(config) == ["a.B", "c.D", "strength.STRENGTH"]


# ---- their effects


def test_an_edited_method_is_another_cell_everywhere(place: Path) -> None:
    """Between two seeds, in a table, in a sweep, and in a rerun."""
    first = fit(seed_everything="0").record
    assert set(first["method_source"]) == {"own_probe.py", "strength.py"}
    assert str(place) not in str(first["method_source"])
    edit()
    outcome = fit(seed_everything="1")
    second = outcome.record
    assert second["config_digest"] == first["config_digest"]
    assert second["method_source"]["own_probe.py"] == first["method_source"]["own_probe.py"]
    assert second["method_source"]["strength.py"] != first["method_source"]["strength.py"]
    old = next(path for path in Path("results/records").rglob("*-seed0-*.json"))
    again = command("rerun", str(old), "--data.root", "data")
    assert again.status == 1
    assert "Does not agree on the method's source: strength.py" in again.out
    same = command("rerun", str(outcome.record_path), "--data.root", "data")
    assert same.status == 0, same.out
    assert "method's source" not in same.out
    texts = {
        finding.text for one in audit(["results"]).audits for finding in one.findings if finding.subject == "identity"
    }
    assert any("strength.py" in text and "another source" in text for text in texts)


def test_a_changed_method_does_not_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svp_bench.train.run import FitRun

    def stop(self: FitRun, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FitRun, "_train_and_test", stop)
        assert fit().status == 130
    (old,) = Path("results/records").rglob("*.json")
    edit()
    text = assert_error(fit("--resume"), 2)
    assert f"{old.stem} began with another source of its method (strength.py)" in text
    assert "without --resume" in text
    Path("strength.py").write_text("STRENGTH = 1.0\n", encoding="utf-8")
    forget()
    assert fit("--resume").record["run_id"] == old.stem


def test_a_run_is_tested_with_the_method_that_trained_it(place: Path) -> None:
    trained = fit("--no_test")
    edit()
    flags = ["--ckpt_path", str(trained.folder / "checkpoints" / "last.ckpt")]
    text = assert_error(command("test", "--config", str(trained.folder / "config.yaml"), *flags), 2)
    assert "another source of its method (strength.py)" in text
    assert read_record(trained.record_path).status == "unscored"


def test_weights_that_were_put_in_the_place_of_the_final_ones_are_not_tested(place: Path) -> None:
    import torch

    trained, other = (fit("--no_test", seed_everything=seed) for seed in ("0", "1"))
    files = [one.folder / "checkpoints" / "last.ckpt" for one in (trained, other)]
    contents = [torch.load(path, weights_only=False) for path in files]
    torch.save({**contents[0], "state_dict": contents[1]["state_dict"]}, files[0])
    flags = ["--config", str(trained.folder / "config.yaml"), "--ckpt_path", str(files[0])]
    text = assert_error(command("test", *flags), 2)
    assert "not the weights that its run ended with" in text
    assert read_record(trained.record_path).status == "unscored"
    torch.save(contents[0], files[0])
    done = command("test", *flags)
    assert done.status == 0, done.err
    assert read_record(trained.record_path).status == "complete"


def test_a_sweep_runs_an_edited_method_anew(place: Path) -> None:
    from svp_bench.config.compose import compose, split_flags
    from svp_bench.sweep.runner import Runner
    from svp_bench.train.parser import resolve

    made = line("--method", "probe.yaml", "--results_root", "results", "--runs_root", "runs")
    assert command(*made).status == 0
    resolved = resolve(compose(split_flags(made[1:])))
    (old,) = Path("results/records").rglob("*.json")
    assert Runner()._same(read_record(old), resolved)
    edit()
    assert not Runner()._same(read_record(old), resolve(compose(split_flags(made[1:]))))


@pytest.mark.slow
def test_a_selected_config_belongs_to_the_searched_source(place: Path) -> None:
    Path("search.yaml").write_text(
        "name: small\nversion: 1\nsampler: grid\nbudget: 2\n"
        "spaces:\n  default: {model.learning_rate: [1.0e-3, 1.0e-2]}\n",
        encoding="utf-8",
    )
    flags = [
        "--model.backbone",
        "vim_nano_patch8_64",
        "--model.checkpoint",
        "none",
        "--model.scan_backend",
        "reference",
    ]
    flags += ["--data.image_size", "32", "--data.root", "data", "--trainer.max_epochs", "1", "--method", "probe.yaml"]
    done = command("tune", "--task", "vtab/cifar", "--search", "search.yaml", "--trainer.accelerator", "cpu", *flags)
    assert done.status == 0, done.out + done.err
    (selected,) = Path("results/selected_configs").rglob("*.json")
    final = [
        "fit",
        "--config",
        "configs/vtab/cifar.yaml",
        "--selected_config",
        str(selected),
        "--trainer.accelerator",
        "cpu",
        *flags,
    ]
    assert command(*final).status == 0
    edit()
    text = assert_error(command(*final), 2)
    assert "was selected with method_source.strength.py = sha256:" in text
    assert "search again" in text


# ---- the package's own files


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit of a small package, which counts as this one."""
    root = tmp_path / "checkout"
    (root / "svp_bench" / "sub").mkdir(parents=True)
    (root / "tasks").mkdir()
    (root / "svp_bench" / "a.py").write_text("A = 1\n", encoding="utf-8")
    (root / "svp_bench" / "sub" / "data.bin").write_bytes(b"\0\r\n\1")
    (root / "tasks" / "one.yaml").write_text("name: one\n", encoding="utf-8")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "first")
    monkeypatch.setattr(code, "_PACKAGE", root / "svp_bench")
    for module in (code, provenance):
        monkeypatch.setattr(module, "checkout_root", lambda: root)
    monkeypatch.setattr(provenance, "package_digest", code.package_digest.__wrapped__)
    monkeypatch.setattr(provenance, "package_digest_at", code.package_digest_at.__wrapped__)
    return root


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def digest() -> str:
    return code.package_digest.__wrapped__()


def test_the_digest_on_disk_is_that_of_the_commit(repository: Path) -> None:
    assert digest() == code.package_digest_at.__wrapped__(git(repository, "rev-parse", "HEAD"))
    assert code.package_digest_at.__wrapped__("0" * 40) is None


def test_caches_and_what_a_wheel_carries_are_no_part_of_the_package(repository: Path) -> None:
    before = digest()
    for name in ("__pycache__/a.pyc", "_share/tasks/one.yaml", ".hidden/x", "sub/.swp"):
        path = repository / "svp_bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x", encoding="utf-8")
    assert digest() == before
    (repository / "svp_bench" / "a.so").write_bytes(b"\0")
    assert digest() != before


@pytest.mark.parametrize("flag", ["--assume-unchanged", "--skip-worktree", None])
def test_changed_code_is_seen_with_any_setting_of_git(repository: Path, flag: str | None) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance.commit_and_dirty() == (commit, False)
    if flag:
        git(repository, "update-index", flag, "svp_bench/a.py")
    (repository / "svp_bench" / "a.py").write_text("A = 2\n", encoding="utf-8")
    assert provenance.commit_and_dirty() == (commit, True)
    texts = provenance.dirty_warning(commit, [])
    assert ("git ls-files -v" if flag else "svp_bench/a.py") in texts
    assert "audit" in texts
    assert "Commit the changes" in texts


def test_another_repository_in_the_environment_is_not_asked(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = repository.parent / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    commit, dirty = provenance.commit_and_dirty()
    monkeypatch.delenv("GIT_DIR")
    assert (commit, dirty) == (git(repository, "rev-parse", "HEAD"), False)


def test_only_cards_that_a_run_reads_make_it_dirty(repository: Path) -> None:
    card, new, outside = (
        repository / "tasks" / "one.yaml",
        repository / "tasks" / "new.yaml",
        repository.parent / "x.yaml",
    )
    for path in (new, outside):
        path.write_text("name: x\n", encoding="utf-8")
    assert provenance.commit_and_dirty()[1] is False
    assert provenance.changed_cards([card, outside]) == []
    assert provenance.changed_cards([card, new]) == ["tasks/new.yaml"]
    (repository / ".gitignore").write_text("tasks/new.yaml\n", encoding="utf-8")
    assert provenance.changed_cards([new]) == ["tasks/new.yaml"]
    assert "--tasks_dir" in provenance.dirty_warning("c" * 40, ["tasks/new.yaml"])


def test_the_processor_is_named_with_its_instructions() -> None:
    name, _, isa = provenance.cpu_name().rpartition(", ")
    assert name
    import torch

    assert isa == torch.backends.cpu.get_cpu_capability()
    assert os.linesep not in name
