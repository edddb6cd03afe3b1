"""On a CUDA device: the numbers of the CPU, runs in mixed precision, and what checkpointing saves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curves import curve, follows
from helpers import run, settle
from helpers import small as line
from tolerances import BACKBONE, relative_error

import svp_bench
from svp_bench.ops.selftest import self_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products in float32: TF32 has ten bits."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_every_backend_passes_its_self_test() -> None:
    results = [result for result in self_test() if result.device == "cuda"]
    assert results
    assert all(result.passed for result in results), results


@pytest.mark.parametrize("name", ["vim_nano_patch8_64", "vim_tiny_patch16_224"])
@pytest.mark.parametrize("method", ["svp", "vpt_deep", "linear", "full", "lora", "adapter"])
def test_the_model_equals_that_on_the_cpu(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = svp_bench.create_model(name, num_classes=7, method=method).eval()  # no dropout
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim < 3:
            torch.nn.init.normal_(parameter, std=0.05)
    side = model.patch_embed.img_size[0]
    images, labels = torch.randn(2, 3, side, side), torch.tensor([1, 5])
    found: list[dict[str, Any]] = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad(set_to_none=True)
        logits = model(images.to(device))
        F.cross_entropy(logits, labels.to(device)).backward()
        grads = {n: p.grad.to("cpu", copy=True) for n, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": logits.detach().to("cpu", copy=True), **grads})
    here, there = found
    assert here.keys() == there.keys()
    for key, value in here.items():
        allowed = BACKBONE.forward if key == "logits" else BACKBONE.backward
        assert relative_error(there[key], value) <= 2 * allowed, key  # each is that near to the exact numbers


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_two_epochs_in_each_precision(place: Path, precision: str) -> None:
    flags = {"trainer__max_epochs": "2", "trainer__precision": precision, "trainer__accelerator": "gpu"}
    outcome = run(*line("--model.scan_backend", "auto", **flags))
    record = outcome.record
    assert record["status"] == "complete"
    assert record["precision"] == precision
    assert record["device"] == torch.cuda.get_device_name()
    assert record["metrics"]["count"] == 9
    assert record["peak_memory_mib"] > 0


def test_a_gpu_chooses_bf16_by_itself(place: Path) -> None:
    assert run(*line(trainer__accelerator="auto")).record["precision"] == "bf16-mixed"


def test_gradient_checkpointing_saves_memory() -> None:
    model = svp_bench.create_model("vim_tiny_patch16_224", num_classes=7, method="svp").cuda()
    images = torch.randn(8, 3, 224, 224, device="cuda")
    peaks, gradients = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        model(images).square().sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert peaks[1] < 0.6 * peaks[0]
    plain, again = gradients
    assert all(relative_error(again[name], plain[name]) < 1e-5 for name in plain)


def test_the_table_of_tolerances_on_the_device() -> None:
    """In its own process, whose default device is the GPU: scan, convolution, norms; 200 repetitions bit for bit."""
    table = Path(__file__).with_name("gpu_table.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(table.parents[1]), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(table)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=table.parents[1],
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d{2,} passed", done.stdout, re.MULTILINE), done.stdout[-2000:]


@pytest.mark.parametrize("method", ["svp", "full"])
def test_fifty_steps_follow_those_on_the_cpu(method: str) -> None:
    here, there = (curve(method, device, "auto") for device in ("cpu", "cuda"))
    assert follows(there, here)
