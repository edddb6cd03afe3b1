"""Out of memory: one line with the bytes requested, the memory of the device, and the flags that help."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_error, command, draw, run, settle, small

from svp_bench.core.errors import file_size
from svp_bench.sweep.jobs import Job
from svp_bench.sweep.runner import Runner
from svp_bench.train.oom import is_out_of_memory, out_of_memory

COUNTS = {"train800": 24, "val200": 8, "test": 8}  # trains on 32 in stage final: two whole batches
FLAGS = {"data__root": "more", "data__batch_size": "16"}
ACCUMULATE = "--trainer.accumulate_grad_batches"
EVALUATE = "--data.eval_batch_size"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settle(tmp_path, monkeypatch)
    draw(Path("more"), counts=COUNTS)
    return tmp_path


def line(*extra: str, **values: str | None) -> list[str]:
    return small(*extra, **{**FLAGS, **values})


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
    text = str(out_of_memory(error, "train, vim", torch.device("cpu"), "--flag"))
    assert text.startswith("out of memory (train, vim): ")
    assert text.endswith("; try --flag")
    assert (requested is not None) == ("failed to allocate" in text)
    assert requested is None or file_size(requested) in text
    if on_host:
        on_gpu = str(out_of_memory(error, "train, vim", torch.device("cuda", 0), "--flag"))
        assert "--data.num_workers" in on_gpu


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of luck"), ValueError("out of memory"), OSError("out of memory"), KeyboardInterrupt()],
)
def test_other_errors_do_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_file_sizes() -> None:
    assert [file_size(n) for n in (23.5e9, 2**30, 64 * 2**20, 9.5 * 2**20, 2**20, 600, 0)] == [
        *("21.9 GiB", "1.0 GiB", "64 MiB", "9.5 MiB", "1.0 MiB", "600 B", "0 B"),
    ]


# ---- a run


GREEDY = """
import torch
from svp_bench.methods.linear import Linear


class Greedy(Linear):
    \"\"\"Linear probing that runs out of memory for more than `most` images.\"\"\"

    def __init__(self, most: int = 4) -> None:
        self.most = most

    def attach(self, model):
        super().attach(model)
        model.points.on_patch_embed(self.want)

    def want(self, images, tokens):
        if len(images) > self.most:
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
    return ("--method", "greedy.yaml")


def test_training_suggests_the_same_batch_in_parts(greedy: tuple[str, ...]) -> None:
    outcome = command(*line(*greedy, EVALUATE, "4"))
    text = assert_error(outcome, 1)
    assert "out of memory (train, vim_test_patch8_32, 32-true): failed to allocate 2.0 GiB; CPU" in text
    for flag in (ACCUMULATE, "--model.grad_checkpointing true", "--data.batch_size", "--trainer.precision"):
        assert flag in text
    record = outcome.record
    assert (record["status"], record["metrics"], record["epochs"]) == ("failed", {}, 0)
    assert text.removeprefix("svp-bench: error: ") in record["status_reason"]
    again = run(*line(*greedy, EVALUATE, "4", ACCUMULATE, "4")).record
    assert (again["status"], again["config_digest"]) == ("complete", record["config_digest"])  # the same cell


def test_the_test_continues_with_fewer_images_at_a_time(greedy: tuple[str, ...]) -> None:
    failed = command(*line(*greedy, ACCUMULATE, "4"))
    text = assert_error(failed, 1)
    assert "out of memory (test, " in text
    assert f"{EVALUATE} than 16" in text
    assert text.endswith("--resume")
    again = run(*line(*greedy, ACCUMULATE, "4", EVALUATE, "4", "--resume"))
    assert (again.record["status"], again.record["run_id"]) == ("complete", failed.record["run_id"])

    weights = str(again.folder / "checkpoints/last.ckpt")
    ask = ("predict", "--ckpt", weights, "--images", "more/cifar/images/test", "--batch_size")
    assert "--batch_size than 8" in assert_error(command(*ask, "8"), 1)
    assert len(command(*ask, "4").out.splitlines()) == COUNTS["test"] + 1


def test_in_a_sweep_it_is_the_line_of_the_trial(greedy: tuple[str, ...]) -> None:
    flags = ("--results_root", "results", "--runs_root", "runs", "--trainer.num_sanity_val_steps", "0")
    common = (*line()[3:], *flags)
    outcome = Runner().run(Job("vtab/cifar", "greedy.yaml", 0, "select", common=common))
    assert outcome.status == "failed"
    assert outcome.reason is not None
    assert outcome.reason.startswith("out of memory (train, ")
    assert "\n" not in outcome.reason
