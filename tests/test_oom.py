"""Out of memory: one line with what was asked, what the device has, and a batch that fits; the suggestion runs.

Most tests run on a simulated device of any size (`memory_card`): its tensors are real ones, on a CPU.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Outcome, assert_error, command, draw, run, settle, small
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_card import Card
from test_ddp import SCRIPT

from svp_bench.core.errors import file_size
from svp_bench.data.augment import AugmentConfig
from svp_bench.data.module import VisionDataModule
from svp_bench.sweep.jobs import Job
from svp_bench.sweep.runner import Runner
from svp_bench.train import oom
from svp_bench.train.oom import AllocationFailure, is_out_of_memory

COUNTS = {"train800": 24, "val200": 8, "test": 8}  # trains on 32 in stage final: two whole batches
MANY = {"train800": 4, "val200": 32, "test": 32}  # to score
FLAGS = {"data__root": "more", "data__batch_size": "16", "model__scan_backend": "cpu"}
ACCUMULATE = "--trainer.accumulate_grad_batches"
EVALUATE = "--data.eval_batch_size"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settle(tmp_path, monkeypatch)
    draw(Path("more"), counts=COUNTS)
    return tmp_path


def on(card: Card, *argv: str) -> Outcome:
    """Run a command on a simulated device."""
    with card:
        return command(*argv)


def line(*extra: str, **values: str | None) -> list[str]:
    return small(*extra, **{**FLAGS, **values})


def suggested(text: str) -> list[str]:
    """Return the flag and the value of the batch that was measured to fit."""
    found = re.search(r"Measured: (\d+) images? at a time fit with (--\S+ \d+)", text)
    assert found, text
    return shlex.split(found[2])


# ---- the error


@pytest.mark.parametrize(
    ("error", "on_host", "requested"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"), False, 5 * 2**29),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than 1EB memory."), False, None),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), False, None),
        (torch.AcceleratorError("CUDA error: out of memory"), False, None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False, None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), False, None),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
            ),
            True,
            4096,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes."), True, 12),
        (MemoryError(), True, None),
    ],
)
def test_errors_that_mean_out_of_memory(error: Exception, on_host: bool, requested: int | None) -> None:
    assert is_out_of_memory(error)
    assert AllocationFailure.from_error(error) == (requested, on_host)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of luck"), ValueError("out of memory"), OSError("out of memory"), KeyboardInterrupt()],
)
def test_other_errors_do_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_the_tensors_of_the_failed_step_are_released() -> None:
    """Also those that closures hold: clearing frames leaves them."""
    card = Card()

    def step() -> None:
        graph = torch.zeros(1000)
        [part for part in [0] if (lambda: graph.sum() + torch.zeros(10**6))() is not None]

    card.limit = 10**6
    with card:
        try:
            step()
        except torch.OutOfMemoryError as error:
            AllocationFailure.from_error(error)
    assert (card.refused, card.live) == (1, 0)


def test_file_sizes() -> None:
    assert [file_size(n) for n in (23.5e9, 2**30, 64 * 2**20, 9.5 * 2**20, 2**20, 600, 0)] == [
        *("21.9 GiB", "1.0 GiB", "64 MiB", "9.5 MiB", "1.0 MiB", "600 B", "0 B"),
    ]


@settings(deadline=None, max_examples=60)  # a busy machine is no failure
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 40), st.booleans())
def test_images_at_once_are_those_of_the_largest_batch(
    world: int, accumulate: int, times: int, more: int, mixed: bool
) -> None:
    parts = world * accumulate
    batch, count = parts * times, 2 * parts + more
    data = VisionDataModule(
        "demo/count", batch_size=batch, eval_batch_size=batch, augment=AugmentConfig(mixup=0.8 if mixed else 0.0)
    )
    data.splits = {"train": "train", "val": "val"}
    data._source = SimpleNamespace(get=lambda _: range(count))  # type: ignore[assignment]
    data.drop_last = True
    data.trainer = SimpleNamespace(world_size=world, global_rank=0, accumulate_grad_batches=accumulate)  # type: ignore[assignment]
    from svp_bench.data.samplers import EvalBatchSampler, GlobalBatchSampler

    evaluation = [len(b) for rank in range(world) for b in EvalBatchSampler(count, batch, world, rank)]
    assert data.images_at_once("val") == max(evaluation)
    try:
        training = [
            len(b)
            for rank in range(world)
            for b in GlobalBatchSampler(
                count, batch, 0, world, rank, accumulate=accumulate, drop_last=True, pairs=data.augment.mixes
            )
        ]
    except ValueError:
        return
    at_once = data.images_at_once("train")
    assert max(training) <= at_once <= max(training) + (1 if mixed else 0)  # the last pair may be half of one


# ---- runs on a simulated device


def peak(*argv: str) -> float:
    """Return the bytes that a whole run needs."""
    with Card() as card:
        assert command(*argv).status == 0
    return card.peak


@pytest.mark.parametrize("size", [0.8, pytest.param(0.4, marks=pytest.mark.slow)])
def test_the_suggestion_runs(size: float, place: Path) -> None:
    limit = size * peak(*line(EVALUATE, "1"))
    card = Card(limit)
    outcome = on(card, *line(EVALUATE, "1"))
    text = assert_error(outcome, 1)
    assert card.refused
    assert "out of memory (train, vim_test_patch8_32, 32-true): 16 images of 32x32 at a time" in text
    assert re.search(r"failed to allocate [\d.]+ .*B\. CPU .* has ", text), text
    assert "--model.grad_checkpointing true" in text
    assert "--trainer.precision" in text
    record = outcome.record
    assert (record["status"], record["metrics"], record["epochs"]) == ("failed", {}, 0)
    assert text.removeprefix("svp-bench: error: ") in record["status_reason"]
    flags = suggested(text)
    assert flags[0] == ACCUMULATE
    again = on(Card(limit), *line(EVALUATE, "1", *flags))
    assert again.status == 0, again.err
    assert again.record["config_digest"] == record["config_digest"]  # the same cell


def test_a_run_that_accumulates_gets_more_parts(place: Path) -> None:
    text = assert_error(on(Card(0.9 * peak(*line(ACCUMULATE, "2", EVALUATE, "1"))), *line(ACCUMULATE, "2")), 1)
    assert ": 8 images of 32x32" in text
    assert suggested(text) in ([ACCUMULATE, "4"], [ACCUMULATE, "8"])


def test_where_nothing_fits_nothing_is_suggested(place: Path) -> None:
    text = assert_error(on(Card(0.6 * peak(*line(ACCUMULATE, "16", EVALUATE, "1"))), *line()), 1)
    assert "Not even 1 image fits" in text
    assert "--model.backbone" in text


def test_a_batch_that_cannot_be_divided_gets_a_smaller_one(place: Path) -> None:
    """Of 32 images in batches of 31, the last has one, which two parts cannot share."""
    odd = line(EVALUATE, "1", data__batch_size="31")
    limit = 0.5 * peak(*odd)
    flags = suggested(assert_error(on(Card(limit), *odd), 1))
    assert flags[0] == "--data.batch_size"
    assert on(Card(limit), *line(EVALUATE, "1", *flags, data__batch_size=None)).status == 0


def test_scoring_fewer_images_at_a_time(place: Path) -> None:
    """The weights are there: the run continues with the test. `test` and `predict` suggest their own flags."""
    draw(Path("many"), counts=MANY)
    at_twos = {"data__batch_size": "2", "data__root": "many"}
    limit = 1.3 * peak(*line("--no_test", **at_twos))
    failed = on(Card(limit), *line(EVALUATE, "32", **at_twos))
    text = assert_error(failed, 1)
    assert "out of memory (test, vim_test_patch8_32, 32-true): 32 images of 32x32" in text
    assert text.endswith("--resume")
    flags = suggested(text)
    assert flags[0] == EVALUATE
    again = on(Card(limit), *line("--resume", *flags, **at_twos))
    assert again.status == 0, again.err
    assert (again.record["status"], again.record["run_id"]) == ("complete", failed.record["run_id"])
    assert again.record["metrics"]["count"] == 32

    weights = str(again.folder / "checkpoints/last.ckpt")
    ask = ("predict", "--ckpt", weights, "--images", "many/cifar/images/test", "--batch_size")
    text = assert_error(on(Card(limit), *ask, "32"), 1)
    flag, images = suggested(text)
    assert flag == "--batch_size"
    assert len(on(Card(limit), *ask, images).out.splitlines()) == 33


@pytest.mark.filterwarnings("ignore:the data of vtab/cifar differ from its card")
def test_in_a_sweep_it_is_the_line_of_the_trial(place: Path) -> None:
    flags = ("--results_root", "results", "--runs_root", "runs", "--trainer.num_sanity_val_steps", "0")
    job = Job("vtab/cifar", "svp", 0, "select", common=(*line(EVALUATE, "1")[3:], *flags))
    with Card(0.7 * peak(*line(EVALUATE, "1"))):
        outcome = Runner().run(job)
    assert outcome.status == "failed"
    assert outcome.reason is not None
    assert outcome.reason.startswith("out of memory (train, ")
    assert "\n" not in outcome.reason
    assert suggested(outcome.reason)[0] == ACCUMULATE


# ---- where it is not the tensors that are too many


GREEDY = """
import os
import torch
from svp_bench.methods.linear import Linear


class Greedy(Linear):
    \"\"\"Linear probing that runs out of memory for more than `most` images.\"\"\"

    def __init__(self, most: int = 4, rank: str = "0", error: str = "") -> None:
        self.most, self.rank, self.error = most, rank, error
        self.calls = 0

    def attach(self, model):
        super().attach(model)
        model.points.on_patch_embed(self.want)

    def want(self, images, tokens):
        if len(images) > self.most and os.environ.get("LOCAL_RANK", "0") == self.rank:
            self.calls += 1
            if self.error and self.calls > 1:
                raise ValueError(self.error)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return tokens
"""
METHOD = """
model:
  method: {class_path: greedy.Greedy}
  learning_rate: 1.0e-3
  weight_decay: 0.0
"""


@pytest.fixture
def greedy(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.delitem(sys.modules, "greedy", raising=False)  # that of another test
    Path("greedy.py").write_text(GREEDY)
    Path("greedy.yaml").write_text(METHOD)
    return ("--method", "greedy.yaml", EVALUATE, "4")


def test_a_custom_method_that_runs_out_of_memory(greedy: tuple[str, ...]) -> None:
    text = assert_error(command(*line(*greedy)), 1)
    assert "16 images of 32x32 at a time; failed to allocate 2.0 GiB" in text
    assert suggested(text) == [ACCUMULATE, "4"]
    assert "4 images at a time" in text
    assert run(*line(*greedy, ACCUMULATE, "4")).record["status"] == "complete"


def test_a_failing_measurement_gives_its_reason(greedy: tuple[str, ...]) -> None:
    text = assert_error(command(*line(*greedy, "--model.method.error", "no such shape")), 1)
    assert "Measuring failed (ValueError: no such shape)" in text
    assert f"try {ACCUMULATE} 2" in text


@pytest.mark.slow
def test_ctrl_c_while_it_measures_is_an_interruption(greedy: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(oom, "_step", stop)
    outcome = command(*line(*greedy))
    assert "interrupted" in assert_error(outcome, 130)
    assert outcome.record["status"] == "interrupted"


def test_memory_of_the_machine_on_a_run_with_a_gpu() -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)), precision="32-true")
    module: Any = SimpleNamespace(backbone_name="vim")
    error = oom.explain_run(AllocationFailure(None, True), trainer, module, SimpleNamespace(), "train", False)  # type: ignore[arg-type]
    assert "--data.num_workers" in str(error)


@pytest.mark.slow
def test_one_of_two_processes_measures_nothing(greedy: tuple[str, ...]) -> None:
    Path("program.py").write_text(SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))))
    two = ("--model.method.rank", "1", "--trainer.strategy", "ddp", "--trainer.devices", "2")
    argv = [sys.executable, "program.py", *line(*greedy, *two)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    assert "8 images of 32x32 at a time; failed to allocate 2.0 GiB" in done.stderr
    assert f"Not measured with several processes; try {ACCUMULATE} 2" in done.stderr
    again = subprocess.run([*argv, ACCUMULATE, "2"], capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu_the_suggestion_runs(place: Path) -> None:
    """With a part of the GPU's memory."""
    draw(Path("many"), counts={"train800": 64, "val200": 64, "test": 64})
    values = {
        "data__root": "many",
        "data__batch_size": "128",
        "data__image_size": "224",
        "model__backbone": "vim_tiny_patch16_224",
        "model__scan_backend": "auto",
        "trainer__accelerator": "gpu",
    }
    whole = run(*small(**values))
    total = torch.cuda.mem_get_info()[1]
    fraction = 0.6 * whole.record["peak_memory_mib"] * 2**20 / total
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(fraction)
        failed = command(*small(**values))
        text = assert_error(failed, 1)
        assert torch.cuda.get_device_name() in text
        assert failed.record["peak_memory_mib"] * 2**20 <= fraction * total
        torch.cuda.empty_cache()
        again = command(*small(EVALUATE, "16", *suggested(text), **values))
        assert again.status == 0, again.err
        assert again.record["config_digest"] == whole.record["config_digest"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
