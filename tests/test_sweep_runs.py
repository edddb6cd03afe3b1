"""Sweeps that train: the same records as single runs, nothing run twice, and killed anywhere without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import SWEEP_FLAGS as FLAGS
from helpers import assert_error, command, run, wait_for
from jsonargparse import ArgumentParser
from synthetic_records import make_record

from svp_bench.config.compose import compose, split_flags
from svp_bench.records.store import read_records
from svp_bench.sweep import plan as sweep_run
from svp_bench.sweep.jobs import Job
from svp_bench.sweep.local_pool import Done, Event, Pool
from svp_bench.sweep.lookup import with_values
from svp_bench.sweep.runner import Runner
from svp_bench.train.parser import resolve

SEARCH = """\
name: small
version: 1
sampler: grid
budget: 2
folds: none
seeds: [0]
spaces:
  default: {model.learning_rate: [1.0e-3, 1.0e-2]}
"""
SWEEP = ["--tasks", "demo/digits-5shot", "--methods", "linear,offset", "--seeds", "0,1", *FLAGS]


def facts(root: Path) -> list[dict[str, Any]]:
    """All records, without what differs between two runs of the same thing."""
    records, problems = read_records(root)
    assert not problems
    found = []
    for record in records:
        data = record.to_json()
        for key in ("run_id", "created", "times", "images_per_second", "peak_memory_mib", "checkpoint_file", "commit"):
            data.pop(key)
        data.pop("dirty")
        for key in ("runs_root", "results_root"):
            data["config"].pop(key, None)
        if data["search"]:
            data["search"].pop("selected_config")  # its digest is over the run ids and the time
        found.append(data)
    return sorted(found, key=lambda data: json.dumps(data, sort_keys=True))


class InProcess(Pool):
    """A pool without workers, whose start takes seconds: for what a sweep does with jobs and their results."""

    def __init__(self, *_: object) -> None:
        self.slots, self.what = 1, "this process"
        self._runner = Runner()
        self._jobs: list[tuple[Job, bool]] = []

    def submit(self, job: Job, *, retry: bool) -> None:
        self._jobs.append((job, retry))

    def wait(self, seconds: float) -> list[Event]:
        jobs, self._jobs = self._jobs, []
        return [Done(job, self._runner.run(job, retry=retry)) for job, retry in jobs]

    def stop(self) -> None:
        raise AssertionError("nothing runs when nobody waits")

    def close(self) -> None:
        """Nothing runs."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory, and sweeps that run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_run, "LocalPool", InProcess)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with a search that nobody disturbed; its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "search.yaml").write_text(SEARCH, encoding="utf-8")
    monkey = pytest.MonkeyPatch()
    monkey.chdir(folder)
    done = command("sweep", *SWEEP, "--search", "search.yaml", "--no_report")
    monkey.undo()
    assert done.status == 0, done.out + done.err
    return folder


# ---- what is resolved


def test_a_setting_put_in_is_the_setting_parsed() -> None:
    common = ("--results_root", "r", "--runs_root", "u", "--model.backbone", "vim_nano_patch8_64")
    base = resolve(compose(split_flags(Job("vtab/dtd", "svp", 0, "select", common=common).arguments())))
    for values in (
        {"model.learning_rate": 1, "model.weight_decay": 0.05},
        {"model.method.init_args.share_layers": 3, "model.method.init_args.paths": "cross"},
        {"data.batch_size": 16, "trainer.gradient_clip_val": 1.5, "model.method.init_args.include_cls": True},
    ):
        job = Job("vtab/dtd", "svp", 7, "select", values, common=common)
        parsed = resolve(compose(split_flags(job.arguments())))
        put = with_values(base, 7, values)
        assert put.config == parsed.config
        assert put.config_digest == parsed.config_digest
        resolved = Runner().resolved(job)
        for name in ("config", "method", "search", "seed", "results_root", "runs_root", "sources", "card_digests"):
            assert getattr(resolved, name) == getattr(parsed, name)


def test_a_trial_that_is_not_comparable_is_a_failed_one() -> None:
    record = make_record(
        "demo/digits", kind="selection", stage="select", not_comparable=("a callback changed weights",)
    )
    outcome = Runner()._outcome(record, None, found=True)  # type: ignore[arg-type]
    assert (outcome.status, outcome.found, outcome.top1) == ("failed", True, None)
    assert "a callback changed weights" in (outcome.reason or "")


# ---- undisturbed


def test_a_sweep_searches_selects_and_tests_once(undisturbed: Path) -> None:
    records, problems = read_records(undisturbed / "results")
    assert not problems
    kinds = [(record.method, record.kind) for record in records]
    assert sorted(kinds) == sorted(
        [(m, k) for m in ("linear", "offset") for k in ("selection", "selection", "final", "final")]
    )
    for record in records:
        if record.kind == "selection":
            assert record.splits == {"train": "train", "val": "val"}
            assert not list((undisturbed / "runs" / record.task / record.run_id).glob("checkpoints"))
        else:
            assert record.search is not None
            assert record.search.keys == ("model.learning_rate",)
            assert (record.search.budget, record.search.trials) == (2, 2)
            (selected,) = undisturbed.glob(f"results/selected_configs/*/{record.task}/{record.method}.json")
            import hashlib

            assert record.search.selected_config == "sha256:" + hashlib.sha256(selected.read_bytes()).hexdigest()
            assert (
                record.config["model"]["learning_rate"]
                == json.loads(selected.read_text())["trials"][json.loads(selected.read_text())["chosen"]]["values"][
                    "model.learning_rate"
                ]
            )


@pytest.mark.usefixtures("here")
def test_a_second_sweep_finds_all_of_it(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(undisturbed)
    before = facts(Path("results"))
    again = run("sweep", *SWEEP, "--search", "search.yaml", "--no_report")
    assert "4 runs complete (0 new), 0 failed" in again.out
    assert facts(Path("results")) == before
    plan = run("sweep", *SWEEP, "--search", "search.yaml", "--dry_run")
    assert re.search(r"linear +0 +2 +2 +0 +0 ", plan.out), plan.out
    longer = run("sweep", *SWEEP, "--search", "search.yaml", "--dry_run", "--seeds", "0,1,2,3")
    assert re.search(r"linear +0 +4 +2 +0 +2 +\d+ (s|min)", longer.out), longer.out
    assert "Time: about" in longer.out


@pytest.mark.usefixtures("here")
def test_a_dry_run_shows_the_disk_space_of_final_runs(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(undisturbed)
    again = run("sweep", *SWEEP, "--search", "search.yaml", "--dry_run")
    assert "no new checkpoint" in again.out
    longer = run("sweep", *SWEEP, "--search", "search.yaml", "--dry_run", "--seeds", "0,1,2,3")
    assert re.search(r"offset +0 +4 +2 +0 +2 +\d+ (s|min) +\d[\d.]* \w+", longer.out), longer.out
    assert re.search(r"Disk: about \d.*; \d.* free", longer.out), longer.out
    unsearched = run("sweep", *SWEEP, "--search", "search.yaml", "--dry_run", "--results_root", "empty")
    assert re.search(r"Disk: about \d", unsearched.out), unsearched.out  # of the final runs to come


@pytest.mark.usefixtures("here")
def test_a_dry_run_reads_and_parses_once_for_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        return lambda *args, **more: (calls.update([name]), function(*args, **more))[1]

    monkeypatch.setattr(yaml, "compose", counted("read", yaml.compose))
    monkeypatch.setattr(ArgumentParser, "parse_args", counted("parse", ArgumentParser.parse_args))
    monkeypatch.setenv("SVP_BENCH_CACHE", "cache")
    cells = ("--tasks", "demo/count,demo/size", "--methods", "linear,offset", *FLAGS)
    seen = []
    for seeds in ("7", ",".join(map(str, range(300)))):
        calls.clear()
        assert run("sweep", *cells, "--seeds", seeds, "--dry_run").status == 0
        seen.append(dict(calls))
    assert seen[0]["read"] == seen[1]["read"]  # files
    assert max(counts.get("parse", 0) for counts in seen) <= 2  # one for each method


def test_the_disk_space_is_that_of_a_checkpoint(undisturbed: Path) -> None:
    runner, common = Runner(), (*FLAGS, "--results_root", "r", "--runs_root", "u")
    for method in ("linear", "offset"):
        estimate = runner.checkpoint_bytes(Job("demo/digits-5shot", method, 0, "final", common=common))
        for checkpoint in undisturbed.glob(f"runs/demo/digits-5shot/{method}-*/checkpoints/*.ckpt"):
            assert 0.5 < estimate / checkpoint.stat().st_size < 1.5, (method, estimate, checkpoint.stat().st_size)
    sizes = [
        runner.checkpoint_bytes(Job("demo/digits-5shot", "linear", 0, "final", common=(*common, *more)))
        for more in ((), ("--model.optimizer.name", "sgd"), ("--model.ema.decay", "0.99"))
    ]
    assert [size / sizes[0] * 3 for size in sizes] == [3, 2, 4]


@pytest.mark.usefixtures("here")
def test_a_task_without_data_is_listed_and_the_others_run() -> None:
    flags = ["--tasks", "demo/digits-5shot,vtab/dtd", "--methods", "linear", *FLAGS]
    for more in ([], ["--dry_run"]):
        done = command("sweep", *flags, "--no_report", *more)
        assert done.status == 1, done.out + done.err
        assert re.search(r"annot run: vtab/dtd, linear: .*svp-bench data", done.out), done.out
    assert [record.status for record in read_records("results")[0]] == ["complete"]


@pytest.mark.usefixtures("here")
def test_missing_weights_end_a_sweep_before_it_begins() -> None:
    flags = ["--tasks", "demo/digits-5shot", "--methods", "linear", *FLAGS, "--model.checkpoint", "nothing.pth"]
    assert "no checkpoint file 'nothing.pth'" in assert_error(command("sweep", *flags), 1)
    assert read_records("results") == ([], [])
    assert not list(Path("runs").rglob("*.log"))


def test_a_sweeps_run_is_the_run_that_fit_makes(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (selected,) = undisturbed.glob("results/selected_configs/*/demo/digits-5shot/offset.json")
    monkeypatch.chdir(tmp_path)
    made = run(
        *(
            "fit",
            "--config",
            "configs/demo/digits-5shot.yaml",
            "--method",
            "offset",
            "--selected_config",
            str(selected),
        ),
        *("--seed_everything", "1", *FLAGS, "--trainer.enable_progress_bar", "false"),
    )
    records, _ = read_records(undisturbed / "results")
    (theirs,) = [r for r in records if (r.method, r.kind, r.seed) == ("offset", "final", 1)]
    assert made.record["correct"] == theirs.to_json()["correct"]
    assert made.record["metrics"] == theirs.to_json()["metrics"]
    assert made.record["setting_digest"] == theirs.setting_digest


def test_the_track_keeps_searched_rows_apart(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(undisturbed)
    table = run("table", "--suite", "demo").out
    assert "K = 2" in table


@pytest.mark.usefixtures("here")
def test_runs_of_other_weights_are_not_resumed() -> None:
    """Two sweeps with other weights share a runs folder: their settings are the same, their runs are not."""
    common = ["--tasks", "demo/digits-5shot", "--methods", "linear", "--seeds", "0", "--no_report", "--workers", "1"]
    common += ["--model.backbone", "vim_nano_patch8_64", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    for weights in ("embedded", "none"):
        done = command("sweep", *common, "--model.checkpoint", weights, "--results_root", weights)
        assert done.status == 0, done.out + done.err
        (record,) = read_records(Path(weights))[0]
        assert (record.status, record.checkpoint) == ("complete", weights)


@pytest.mark.usefixtures("here")
def test_a_failure_is_listed_and_run_again_on_request() -> None:
    flags = [flag if flag != "1" else "2" for flag in FLAGS]
    bad = ["--tasks", "demo/digits-5shot", "--methods", "full", "--model.learning_rate", "1e30", *flags, "--no_report"]
    first = command("sweep", *bad)
    assert first.status == 1
    assert "FAILED: NonFiniteLossError" in first.out or "FAILED: the training loss" in first.out, first.out
    assert "the same command with --retry_failed" in first.out
    second = command("sweep", *bad)
    assert second.status == 1
    assert "it failed earlier and is not run again" in second.out
    third = command("sweep", *bad, "--retry_failed")
    assert third.status == 1
    assert "it failed earlier" not in third.out


@pytest.mark.usefixtures("here")
def test_tune_writes_one_selected_config() -> None:
    Path("search.yaml").write_text(SEARCH, encoding="utf-8")
    tuned = run("tune", "--task", "demo/digits-5shot", "--method", "linear", "--search", "search.yaml", *FLAGS)
    assert "demo/digits-5shot, linear: selected learning_rate =" in tuned.out
    (selected,) = Path("results").glob("selected_configs/*/demo/digits-5shot/linear.json")
    assert str(selected) in tuned.out
    assert {record.kind for record in read_records("results")[0]} == {"selection"}


# ---- folds, nested


def start(folder: Path, *extra: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "svp_bench", "sweep", *SWEEP, "--search", "search.yaml", "--no_report", *extra],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def family(pid: int) -> list[int]:
    """The process and all that it started."""
    pids = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                pids += family(int(entry.name))
    return pids


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere_it_ends_as_if_undisturbed(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    (tmp_path / "search.yaml").write_text(SEARCH, encoding="utf-8")
    for _ in range(3):  # the whole tree ended in the middle
        sweep = start(tmp_path)
        until = time.monotonic() + dice.uniform(6, 22)
        while time.monotonic() < until and sweep.poll() is None:
            time.sleep(0.2)
            if dice.random() < 0.02:  # one worker killed
                for child in family(sweep.pid)[1:2]:
                    kill(child)
        for pid in family(sweep.pid):
            kill(pid)
        sweep.communicate()
    sweep = start(tmp_path)
    out, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 0, out
    assert facts(tmp_path / "results") == facts(undisturbed / "results")
    tables = [run("table", "--results_root", str(folder / "results")).status for folder in (tmp_path, undisturbed)]
    assert tables == [0, 0]
    for name in ("demo.csv", "demo_long.csv"):
        mine, theirs = (folder / "results" / "tables" / name for folder in (tmp_path, undisturbed))
        assert mine.read_text() == theirs.read_text()


@pytest.mark.slow
def test_an_orphan_worker_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(SEARCH, encoding="utf-8")
    sweep = start(tmp_path)
    wait_for(lambda: family(sweep.pid)[1:])
    time.sleep(4)
    workers = family(sweep.pid)[1:]
    assert workers
    kill(sweep.pid)
    sweep.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_stops_it_cleanly(tmp_path: Path, number: signal.Signals, status: int) -> None:
    (tmp_path / "search.yaml").write_text(SEARCH, encoding="utf-8")
    sweep = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("results/records/*/*/*.json")))
    sweep.send_signal(number)
    out, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == status, out
    assert "Traceback" not in out
    assert "Continue: svp-bench sweep" in out


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_work(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(SEARCH, encoding="utf-8")
    both = [start(tmp_path), start(tmp_path)]
    for sweep in both:
        out, _ = sweep.communicate(timeout=600)
        assert sweep.returncode == 0, out
    assert facts(tmp_path / "results") == facts(undisturbed / "results")


@pytest.mark.slow
def test_the_elements_of_a_slurm_array_make_the_same_records(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(SEARCH, encoding="utf-8")
    out, _ = start(tmp_path, "--emit", "slurm").communicate(timeout=600)
    assert "2 array elements" in out, out
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    for element in range(2):
        done = subprocess.run(
            ["bash", "runs/slurm/sweep.sbatch"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "SLURM_ARRAY_TASK_ID": str(element)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list(tmp_path.glob("results/selected_configs/*/*/*/*.json"))) == element + 1
    assert facts(tmp_path / "results") == facts(undisturbed / "results")
