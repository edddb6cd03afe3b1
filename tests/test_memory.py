"""Out of memory: one sentence, whose numbers are right; what it suggests runs, and what does not help is not offered.

Most of it happens on a card of any size that is not there (`memory_card`): its tensors are real ones, on a CPU.
"""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
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
from svp_bench.data.module import VisionDataModule
from svp_bench.methods import METHODS
from svp_bench.methods.base import build_method
from svp_bench.sweep.jobs import Job
from svp_bench.sweep.runner import Runner
from svp_bench.train import memory, out_of_memory
from svp_bench.train.memory import HostGauge, Need, Room, Shortage, Steps, is_out_of_memory, stepping
from svp_bench.train.module import AdaptationModule

BATCH = 16
COUNTS = {"train800": 24, "val200": 8, "test": 8}  # trains on 32 in stage final: two whole batches
MANY = {"train800": 4, "val200": 32, "test": 32}  # to score
FLAGS = {"data__root": "more", "data__batch_size": str(BATCH), "model__scan_backend": "cpu"}
ACCUMULATE = "--trainer.accumulate_grad_batches"
CHECKPOINTING = "--model.grad_checkpointing true"
EVALUATE = "--data.eval_batch_size"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settle(tmp_path, monkeypatch)
    draw(Path("more"), counts=COUNTS)
    return tmp_path


@pytest.fixture
def on(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a command on a card."""

    def go(card: Card, *argv: str) -> Outcome:
        card.insert(monkeypatch)
        with card:
            return command(*argv)

    return go


def line(*extra: str, **values: str | None) -> list[str]:
    return small(*extra, **{**FLAGS, **values})


def offered(text: str) -> list[list[str]]:
    """Return the flags of each way out that a sentence offers, those for scoring with each."""
    advice = re.search(r"\. (?:Go on with (--resume) and|Add|\d+ cannot be cut so:) (--.+)$", text)
    if advice is None:
        return []
    scoring = re.search(rf"(?:, and )({EVALUATE} \d+) for scoring$", advice[2])
    shared = ([advice[1]] if advice[1] else []) + (shlex.split(scoring[1]) if scoring else [])
    ways = re.sub(r"\([^)]*\)", "", advice[2][: scoring.start()] if scoring else advice[2]).split(", or ")
    return [[*shared, *re.findall(r"--[\w.]+|(?<= )(?:\d+|true)(?= |$)", way)] for way in ways]


# ---- the error


@pytest.mark.parametrize(
    ("error", "host", "requested"),
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
def test_the_ways_in_which_memory_is_said_to_be_out(error: Exception, host: bool, requested: int | None) -> None:
    assert is_out_of_memory(error)
    shortage = Shortage.told_by(error)
    assert (shortage.of_the_host, shortage.requested) == (host, requested)
    assert shortage.text
    assert "\n" not in shortage.text


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of luck"), ValueError("out of memory"), OSError("out of memory"), KeyboardInterrupt()],
)
def test_other_errors_are_none_of_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_what_an_error_holds_is_let_go() -> None:
    """Also what functions within functions see: clearing frames leaves that."""
    card = Card()

    def step() -> None:
        graph = torch.zeros(1000)
        [part for part in [0] if (lambda: graph.sum() + torch.zeros(10**6))() is not None]

    card.limit = 10**6
    with card:
        try:
            step()
        except torch.OutOfMemoryError as error:
            Shortage.told_by(error)
    assert card.refused == 1
    assert card.live == 0


def test_bytes_in_words() -> None:
    assert [file_size(n) for n in (23.5e9, 2**30, 64 * 2**20, 9.5 * 2**20, 2**20, 600, 0)] == [
        *("21.9 GiB", "1.0 GiB", "64 MiB", "9.5 MiB", "1.0 MiB", "600 B", "0 B"),
    ]


# ---- the arithmetic


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 2000), st.integers(0, 10**8), st.booleans())
def test_on_a_line_it_is_exact(base: int, each: int, asked: int, budget: int, refuses: bool) -> None:
    seen: list[int] = []

    def measure(images: int) -> int | None:
        seen.append(images)
        needed = base + each * images
        return None if refuses and needed > budget else needed

    need = Need(measure, budget, patience=1e9)
    fit = max(0, min(asked, (budget - base) // each))
    assert need.most(asked) == fit
    assert need.fits(asked) == (fit == asked)
    assert len(seen) == len(set(seen)) <= asked.bit_length() + 1
    assert max(seen) <= max(2, fit)  # nothing is tried that two steps say is too large
    if len(need.measured) > 1:
        assert need.at(asked) == base + each * asked


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**4)), min_size=1, max_size=4),
    st.integers(1, 1000),
    st.integers(0, 10**7),
    st.booleans(),
)
def test_what_fits_was_seen_to_fit(lines: list[tuple[int, int]], asked: int, budget: int, largest: bool) -> None:
    """Whatever bends the line: buffers of fixed size at one place of a step, pieces of work of bounded size."""

    def needs(images: int) -> int:
        return (max if largest else min)(base + each * images for base, each in lines)

    need = Need(lambda images: needs(images) if needs(images) <= budget else None, budget, patience=1e9)
    most = need.most(asked)
    assert not need.fits(asked) or needs(asked) <= budget
    for images in range(1, most + 1):
        if need.fits(images):
            assert needs(images) <= budget
    if needs(1) <= budget:
        assert most >= 1
    if largest:  # convex: a line through what was seen never says too much, a step back from what fits
        assert most <= 2 * max(1, max((n for n in range(1, asked + 1) if needs(n) <= budget), default=0))


def test_out_of_patience_the_line_says_it() -> None:
    need = Need(lambda images: 10 + 5 * images, 500, patience=0)
    assert need.fits(90)
    assert not need.fits(99)
    assert need.most(1000) == 98
    assert need.measured == [1, 2]


# ---- steps of real models


def module(method: str = "svp", **arguments: Any) -> AdaptationModule:
    made = build_method(METHODS.get(method), method, {})
    given = {"backbone": "vim_nano_patch8_64", "checkpoint": "none", "num_classes": 10, "image_size": 64}
    return AdaptationModule(made, **{**given, "scan_backend": "cpu", **arguments})


def steps(module: AdaptationModule) -> Any:
    return stepping(module, HostGauge(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [
        ("svp", False),
        ("full", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("svp", True), ("vpt_deep", True), ("linear", False), ("lora", False)]
        ),
    ],
)
def test_two_small_steps_tell_of_a_larger_one(method: str, checkpointing: bool) -> None:
    with steps(module(method)) as (at_hand, _):
        measured = {images: at_hand.train(images, checkpointing) for images in (1, 2, 4, 8)}
        need = Need(measured.__getitem__, 2**50, patience=0)
        need.fits(8)
    assert need.measured == [1, 2]
    assert need.at(8) == pytest.approx(measured[8], rel=0.08)
    later = Need(measured.__getitem__, 2**50, patience=1e9)
    later.fits(4)
    assert later.at(8) == pytest.approx(measured[8], rel=0.02)


@pytest.mark.slow
def test_a_step_is_as_large_as_that_of_a_run(on: Callable[..., Outcome]) -> None:
    """The peak that a card sees in a whole run, and that of one made-up step with the weights."""
    for extra, checkpointing in (([], False), (CHECKPOINTING.split(), True)):
        card = Card()
        assert on(card, *line(*extra, "--no_test", "--method", "full")).status == 0
        small_one = module("full", backbone="vim_test_patch8_32", num_classes=100, image_size=32)
        weights = sum(t.numel() * t.element_size() for t in (*small_one.parameters(), *small_one.buffers()))
        with steps(small_one) as (at_hand, _):
            step = at_hand.train(BATCH, checkpointing)
        kept = sum(COUNTS[name] for name in ("train800", "val200")) * 3 * 32 * 32  # images in memory
        assert step + weights + kept == pytest.approx(card.peak, rel=0.05)


def test_measuring_leaves_no_trace() -> None:
    """Not in weights, averages, gradients, modes and random numbers."""
    one = module("svp", ema_decay=0.9, drop_path=0.1, frozen_mode="train").eval()
    assert one.ema is not None
    weights = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in one.ema.weights.items()}
    state = torch.get_rng_state()
    with steps(one) as (at_hand, _):
        assert at_hand.train(2, True) > at_hand.evaluate(2) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())
    assert all(torch.equal(tensor, averages[name]) for name, tensor in one.ema.weights.items())
    assert all(parameter.grad is None for parameter in one.parameters())
    assert not one.training
    assert not one.model.grad_checkpointing


def test_nothing_is_compiled_to_measure() -> None:
    def backend(*_: Any) -> Any:
        raise AssertionError("compiled")

    one = module("linear")
    one.model.compile(backend=backend, dynamic=False)
    with steps(one) as (at_hand, _):
        assert at_hand.train(1, False) > 0


def test_a_gpu_is_measured_by_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        mem_get_info=lambda _: (30 * 2**30, 80 * 2**30),
        memory_reserved=lambda _: 2**30,
        get_per_process_memory_fraction=lambda _: 0.25,
        get_device_name=lambda _: "a card",
        reset_peak_memory_stats=lambda _: None,
        synchronize=lambda _: None,
        memory_allocated=lambda _: 100,
        max_memory_allocated=lambda _: 1100,
        empty_cache=lambda: None,
    )
    one = module("linear")
    monkeypatch.setattr(torch, "cuda", cuda)
    gauge = memory.CudaGauge(torch.device("cuda", 0))
    assert gauge.room() == Room("a card", 80 * 2**30, 20 * 2**30)  # no more than this process may have
    cuda.get_per_process_memory_fraction = lambda _: 1.0
    assert gauge.room() == Room("a card", 80 * 2**30, 31 * 2**30)  # what others leave, and what is cached
    del cuda.get_per_process_memory_fraction  # torch 2.6
    assert gauge.room() == Room("a card", 80 * 2**30, 31 * 2**30)
    gauge.rest(one)
    assert gauge.peak(lambda: None) == 1000


def test_the_machine_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    room = memory.host_room()
    if sys.platform == "linux":
        assert room.free is not None
        assert 0 < room.free < room.total
    rooms = {"_machine": Room("", 100, 70), "_control_group": Room("its control group", 80, 60), "_address_space": None}
    for name, found in rooms.items():
        monkeypatch.setattr(memory, name, lambda found=found: found)
    assert memory.host_room()[1:] == (80, 60)
    assert memory.host_room().name.endswith(" by its control group")
    monkeypatch.setattr(memory, "_control_group", lambda: None)
    assert memory.host_room().name.startswith("CPU (")
    monkeypatch.setattr(memory, "_machine", lambda: None)
    assert memory.host_room().free is None


# ---- how many images a process gets at a time


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 40), st.booleans())
def test_images_at_once_are_those_of_the_largest_batch(
    world: int, accumulate: int, times: int, more: int, mixed: bool
) -> None:
    parts = world * accumulate
    batch, count = parts * times, 2 * parts + more
    data = VisionDataModule("demo/count", batch_size=batch, eval_batch_size=batch, mixup=0.8 if mixed else None)
    data.lists = {"train": "train", "val": "val"}
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
                count, batch, 0, world, rank, accumulate=accumulate, drop_last=True, pairs=bool(data.mixing)
            )
        ]
    except ValueError:
        return
    at_once = data.images_at_once("train")
    assert max(training) <= at_once <= max(training) + (1 if mixed else 0)  # the last pair may be half of one


# ---- runs on a card


Needs = Callable[..., float]


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> Needs:
    """What a whole run needs, on a card without an end."""
    place = tmp_path_factory.mktemp("needs")
    known: dict[tuple[int, bool, str], float] = {}

    def found(parts: int, checkpointing: bool, backend: str = "cpu") -> float:
        if (parts, checkpointing, backend) not in known:
            with pytest.MonkeyPatch.context() as patch:
                folder = place / str(len(known))
                folder.mkdir()
                settle(folder, patch)
                draw(Path("more"), counts=COUNTS)
                flags = [ACCUMULATE, str(parts), "--model.grad_checkpointing", str(checkpointing).lower()]
                with Card() as card:
                    assert command(*line(*flags, EVALUATE, "1", model__scan_backend=backend)).status == 0
            known[parts, checkpointing, backend] = card.peak
        return known[parts, checkpointing, backend]

    return found


@pytest.mark.parametrize(
    ("backend", "size"),
    [
        ("cpu", 0.36),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("cpu", 0.97), ("cpu", 0.6), ("reference", 0.8), ("reference", 0.4)]
        ),
    ],
)
def test_what_is_suggested_runs_and_what_would_not_is_not_suggested(
    backend: str, size: float, on: Callable[..., Outcome], needs: Needs
) -> None:
    limit = size * needs(1, False, backend)
    card = Card(limit)
    outcome = on(card, *line(model__scan_backend=backend))
    text = assert_error(outcome, 1)
    assert card.refused
    assert text.startswith(
        "svp-bench: error: out of memory while training vim_test_patch8_32 with svp: 16 images of 32×32 at a time "
        "in 32-true; "
    )
    assert f"a toy card has {file_size(limit)}, " in text
    assert re.search(r"16 would need ([\d.]+ .iB), about (\d+) fit", text), text
    record = outcome.record
    assert (record["status"], record["metrics"], record["epochs"]) == ("failed", {}, 0)
    assert record["status_reason"] == text.replace("svp-bench: error: ", "OutOfMemoryError: ")  # whole: one line is cut

    ways: list[tuple[int, bool]] = []
    for way in offered(text):
        parts = int(way[way.index(ACCUMULATE) + 1]) if ACCUMULATE in way else 1
        ways.append((parts, "--model.grad_checkpointing" in way))
        again = on(Card(limit), *line(*way, model__scan_backend=backend))
        assert again.status == 0, (way, again.err)
        assert again.record["status"] == "complete"
        assert again.record["config_digest"] == record["config_digest"]  # the same cell
        if parts > 1:
            assert re.search(rf"{ACCUMULATE} {parts} \((the same batch of 16, )?{BATCH // parts} at a time\)", text), (
                text
            )
    (plain,) = (parts for parts, checkpointing in ways if not checkpointing)
    lightly = [parts for parts, checkpointing in ways if checkpointing]
    for fewer in (parts for parts in (2, 4, 8) if parts < plain):  # the fewest parts, but for the margin
        assert needs(fewer, False, backend) > 0.85 * limit
    if needs(1, True, backend) <= 0.85 * limit:
        assert lightly == [1]
    if lightly:  # only where it saves parts
        assert lightly[0] < plain
        assert needs(lightly[0], True, backend) < needs(lightly[0], False, backend)


@pytest.mark.slow
def test_about_so_many_fit(on: Callable[..., Outcome], needs: Needs) -> None:
    limit = 0.8 * needs(1, False)
    text = assert_error(on(Card(limit), *line()), 1)
    (most,) = re.findall(r"about (\d+) fit,", text)
    assert 8 < int(most) < 16
    flags = ("--data.drop_last", "true")
    assert on(Card(limit), *line(*flags, data__batch_size=most)).status == 0
    assert on(Card(limit), *line(*flags, data__batch_size=str(int(most) + 2))).status == 1


@pytest.mark.slow
def test_where_it_is_checkpointing_already(on: Callable[..., Outcome], needs: Needs) -> None:
    text = assert_error(on(Card(0.9 * needs(1, True)), *line(*CHECKPOINTING.split())), 1)
    assert "at a time in 32-true, gradient checkpointing; " in text
    assert [way[0] for way in offered(text)] == [ACCUMULATE]


@pytest.mark.slow
def test_checkpointing_is_not_offered_where_it_saves_nothing(on: Callable[..., Outcome]) -> None:
    """Linear probing keeps no layer's input."""
    with_linear = line("--method", "linear", EVALUATE, "1")
    card = Card()
    assert on(card, *with_linear).status == 0
    text = assert_error(on(Card(0.9 * card.peak), *with_linear), 1)
    assert "checkpointing" not in text
    assert [way[0] for way in offered(text)] == [ACCUMULATE]


def test_a_run_that_accumulates_already_gets_more_parts(on: Callable[..., Outcome], needs: Needs) -> None:
    text = assert_error(on(Card(0.9 * needs(2, False)), *line(ACCUMULATE, "2")), 1)
    assert ": 8 images of 32×32 at a time" in text
    assert offered(text)[0][-2:] == [ACCUMULATE, "4"]
    assert "(the same batch of 16, 4 at a time)" in text


@pytest.mark.slow
def test_scoring_does_not_follow_the_accumulation(on: Callable[..., Outcome], needs: Needs) -> None:
    limit = 1.05 * needs(16, False)
    text = assert_error(on(Card(limit), *line()), 1)
    assert re.search(rf", and {EVALUATE} \d+ for scoring$", text), text
    for way in offered(text):
        assert on(Card(limit), *line(*way)).status == 0
    assert f"{EVALUATE}" not in assert_error(on(Card(limit), *line("--no_test")), 1)


def test_where_nothing_fits_nothing_is_suggested(on: Callable[..., Outcome], needs: Needs) -> None:
    text = assert_error(on(Card(0.62 * needs(16, True)), *line()), 1)
    assert "Measured here: not even 1 fits; a smaller --model.backbone or --data.image_size, or a device with" in text
    assert offered(text) == []


def test_a_batch_that_cannot_be_cut_gets_a_smaller_one(on: Callable[..., Outcome]) -> None:
    """Of 32 images in batches of 31, the last has one, which no two parts share."""
    odd = line(data__batch_size="31")
    card = Card()
    assert on(card, *odd).status == 0
    limit = 0.5 * card.peak
    text = assert_error(on(Card(limit), *odd), 1)
    assert re.search(r"31 cannot be cut so: --data.batch_size (4|8)( --model\S+ true)? fits, another setting$", text), (
        text
    )
    (way,) = offered(text)
    again = on(Card(limit), *line(*way, data__batch_size=None))
    assert again.status == 0, again.err


def test_too_many_images_to_score_at_a_time(on: Callable[..., Outcome]) -> None:
    """The weights are there: the run goes on with the test."""
    draw(Path("many"), counts=MANY)
    at_twos = {"data__batch_size": "2", "data__root": "many"}
    card = Card()
    assert on(card, *line("--no_test", **at_twos)).status == 0
    failed = on(Card(1.3 * card.peak), *line(EVALUATE, "32", **at_twos))
    text = assert_error(failed, 1)
    assert "while testing vim_test_patch8_32 with svp: 32 images of 32×32 at a time" in text
    assert failed.record["status_reason"].startswith("OutOfMemoryError: out of memory while testing")
    assert re.search(
        rf"Go on with --resume and {EVALUATE} (4|8|16) \(results do not depend on it, except for rounding\)$", text
    ), text
    (way,) = offered(text)
    again = on(Card(1.3 * card.peak), *line(*way, **at_twos))
    assert again.status == 0, again.err
    assert (again.record["status"], again.record["run_id"]) == ("complete", failed.record["run_id"])
    assert again.record["metrics"]["count"] == 32


@pytest.mark.slow
def test_validation_beside_training_and_alone(on: Callable[..., Outcome]) -> None:
    select = ("--data.stage", "select", "--trainer.num_sanity_val_steps", "0")
    draw(Path("many"), counts=MANY)
    at_twos = {"data__batch_size": "2", "data__root": "many"}
    card = Card()
    assert on(card, *line(*select, **at_twos)).status == 0
    limit = 1.3 * card.peak
    failed = on(Card(limit), *line(*select, EVALUATE, "32", **at_twos))
    text = assert_error(failed, 1)
    assert "while validating vim_test_patch8_32 with svp: 32 images" in text
    (way,) = offered(text)
    again = on(Card(limit), *line(*select, *[flag for flag in way if flag != "--resume"], **at_twos))
    assert again.status == 0, again.err

    saved = ("--config", str(again.folder / "config.yaml"), "--ckpt_path", str(again.folder / "checkpoints/last.ckpt"))
    text = assert_error(on(Card(limit), "validate", *saved, EVALUATE, "32"), 1)
    assert f"Add {EVALUATE}" in text
    (way,) = offered(text)
    assert on(Card(limit), "validate", *saved, *way).status == 0


@pytest.mark.slow
def test_test_and_predict(on: Callable[..., Outcome]) -> None:
    draw(Path("many"), counts=MANY)
    at_twos = {"data__batch_size": "2", "data__root": "many"}
    card = Card()
    made = on(card, *line("--no_test", **at_twos))
    limit = 1.3 * card.peak
    weights = str(made.folder / "checkpoints/last.ckpt")
    saved = ("--config", str(made.folder / "config.yaml"), "--ckpt_path", weights)
    text = assert_error(on(Card(limit), "test", *saved, EVALUATE, "32"), 1)
    (way,) = offered(text)
    assert "Completed" in on(Card(limit), "test", *saved, *way).out

    ask = ("predict", "--ckpt", weights, "--images", "many/cifar/images/test", "--batch_size")
    text = assert_error(on(Card(limit), *ask, "32"), 1)
    assert "out of memory while predicting with vim_test_patch8_32: 32 images of 32×32 at a time" in text
    found = re.search(r"Add --batch_size (4|8|16) \(results do not depend", text)
    assert found, text
    outs = on(Card(limit), *ask, found[1]).out, run(*ask, "32").out
    few, many = (list(csv.DictReader(out.splitlines())) for out in outs)
    assert [row["path"] for row in few] == [row["path"] for row in many]
    for one, other in zip(few, many, strict=True):  # in batches of another size, products round otherwise
        assert float(one["p1"]) == pytest.approx(float(other["p1"]), abs=2e-4)
    assert "--batch_size is at least 1, not 0" in assert_error(command(*ask, "0"), 2)


def test_replicate_says_it_too(on: Callable[..., Outcome], needs: Needs) -> None:
    text = assert_error(on(Card(0.8 * needs(1, False)), *line(EVALUATE, "1", subcommand="replicate")), 1)
    assert offered(text)[0] == [ACCUMULATE, "2"]


@pytest.mark.filterwarnings("ignore:the data of vtab/cifar differ from its card")
def test_in_a_sweep_it_is_the_line_of_the_trial(place: Path, monkeypatch: pytest.MonkeyPatch, needs: Needs) -> None:
    card = Card(0.8 * needs(1, False))
    card.insert(monkeypatch)
    flags = ("--results_root", "results", "--runs_root", "runs")
    job = Job("vtab/cifar", "svp", 0, "select", common=(*line("--trainer.num_sanity_val_steps", "0")[3:], *flags))
    with card:
        outcome = Runner().run(job)
    assert outcome.status == "failed"
    assert outcome.reason is not None
    assert outcome.reason.startswith("out of memory while training vim_test_patch8_32 with svp: 16 images")
    assert "\n" not in outcome.reason
    assert f"Add {ACCUMULATE} 2 (the same batch of 16, 8 at a time)" in outcome.reason
    found = Runner().run(job)
    assert (found.found, found.reason) == (True, f"OutOfMemoryError: {outcome.reason}")
    more = Job("vtab/cifar", "svp", 0, "select", common=(*job.common, ACCUMULATE, "2"))
    with Card(card.limit):
        assert Runner().run(more, retry=True).status == "complete"


# ---- where it is not the tensors that are too many


GREEDY = """
import os
import torch
from svp_bench.methods.linear import Linear

TOLD = []


class Greedy(Linear):
    \"\"\"Linear probing that wants more than there is, for more than `most` images, `times` times.\"\"\"

    def __init__(self, most: int = 4, times: int = 1000, rank: str = "0", error: str = "memory") -> None:
        self.most, self.times, self.rank, self.error = most, times, rank, error

    def attach(self, model):
        super().attach(model)
        model.points.on_patch_embed(self.want)

    def want(self, images, tokens):
        if len(images) > self.most and len(TOLD) < self.times and os.environ.get("LOCAL_RANK", "0") == self.rank:
            TOLD.append(len(images))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        if TOLD and self.error != "memory":
            raise ValueError(self.error)
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
    Path("program.py").write_text(SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))))
    return ("--method", "greedy.yaml")


def program(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "program.py", *argv], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
def test_as_a_command_with_a_method_of_ones_own(greedy: tuple[str, ...]) -> None:
    """It wants its memory above 4 images; the machine has enough for all: only steps of that size tell."""
    done = program(*line(*greedy, EVALUATE, "4"))
    assert done.returncode == 1
    (text,) = done.stderr.strip().splitlines()[-1:]
    assert done.stderr.count("svp-bench: error: ") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert "Out of memory: measuring what would fit" in done.stdout
    assert "with greedy: 16 images of 32×32 at a time in 32-true; 2.0 GiB more could not be had. CPU (" in text
    assert "about 7 fit" in text or "about 4 fit" in text, text
    assert text.endswith(f"Add {ACCUMULATE} 4 (the same batch of 16, 4 at a time)")
    assert "Record (failed)" in done.stdout
    assert run(*line(*greedy, EVALUATE, "4", ACCUMULATE, "4")).record["status"] == "complete"


def test_memory_that_is_there_again(greedy: tuple[str, ...]) -> None:
    text = assert_error(command(*line(*greedy, "--model.method.times", "1")), 1)
    assert re.search(
        r"Measured here: 16 images need [\d.]+ .iB, which would fit now\. Others held the memory then, or it was in "
        r"pieces: run it again$",
        text,
    ), text


@pytest.mark.slow
def test_what_cannot_be_measured_is_said_with_the_reason(
    greedy: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = assert_error(command(*line(*greedy, "--model.method.error", "no such shape")), 1)
    assert text.endswith(
        f"What would fit could not be measured (ValueError: no such shape); try {ACCUMULATE} or {CHECKPOINTING}"
    )
    monkeypatch.setattr(memory, "host_room", lambda: Room("this system", 100, None))
    text = assert_error(command(*line(*greedy)), 1)
    assert text.endswith(f"how much memory is free; try {ACCUMULATE} 2 (8 at a time) or {CHECKPOINTING}")


@pytest.mark.slow
def test_ctrl_c_while_it_measures_is_an_interruption(
    on: Callable[..., Outcome], needs: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Steps, "train", stop)
    outcome = on(Card(0.8 * needs(1, False)), *line())
    assert assert_error(outcome, 130) == "svp-bench: interrupted; the same command with --resume continues"
    assert outcome.record["status"] == "interrupted"


def test_the_machines_memory_is_not_the_devices(place: Path) -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    failed: Any = SimpleNamespace(trainer=trainer)
    text = out_of_memory._advice(failed, Shortage("not enough memory", None, True))
    assert "the machine's own memory that is out, not that of the device: fewer --data.num_workers" in text


@pytest.mark.slow
def test_one_of_two_processes(greedy: tuple[str, ...]) -> None:
    """The other waits for it: nothing is measured, and both end as they do after any failure."""
    two = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    given = (*greedy, "--model.method.rank", "1", *two, EVALUATE, "8")
    began = time.monotonic()
    done = program(*line(*given))
    assert done.returncode != 0
    assert time.monotonic() - began < 300  # and does not wait for the half hour of a collective
    assert "Traceback" not in done.stderr, done.stderr
    assert "measuring" not in done.stdout
    assert "8 images of 32×32 at a time in 32-true; 2.0 GiB more could not be had. CPU (" in done.stderr
    assert (
        "Nothing was measured: other processes wait for this; try --trainer.accumulate_grad_batches 2 (4 at a time) or "
        "--model.grad_checkpointing true"
    ) in done.stderr
    again = program(*line(*given, ACCUMULATE, "2"))
    assert again.returncode == 0, again.stderr


LIMITED = """
import resource
from svp_bench.train.run import BenchCLI

real = BenchCLI.within_memory
more = int(sys.argv.pop(1))

def within_memory(self, work):
    taken = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, -1))
    return real(self, work)

BenchCLI.within_memory = within_memory
entry_point()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is enforced by Linux")
def test_under_a_limit_of_the_system(place: Path) -> None:
    """No card that is not there: PyTorch's own allocator fails."""
    text = SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))).replace("entry_point()", LIMITED)
    Path("program.py").write_text(text.replace("import sys", "import re, sys", 1))
    demo = ("--config", "configs/demo/count.yaml", "--model.checkpoint", "none", "--trainer.max_epochs", "1")
    argv = (str(560 * 2**20), "fit", *demo, "--data.batch_size", "256", EVALUATE, "16", "--trainer.accelerator", "cpu")
    done = program(*argv)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert " by ulimit -v has " in said
    for way in offered(said):
        again = program(*argv, *way)
        assert again.returncode == 0, (way, again.stderr)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("share", [0.8, 0.4])
def test_on_a_gpu_what_is_suggested_runs(place: Path, share: float) -> None:
    """With a part of the card's memory, of which the budget knows."""
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
    fraction = share * whole.record["peak_memory_mib"] * 2**20 / total
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(fraction)
        failed = command(*small(**values))
        text = assert_error(failed, 1)
        assert torch.cuda.get_device_name() in text
        free = re.search(r"([\d.]+) ([MG])iB free", text)
        assert free, text
        assert float(free[1]) * 2 ** {"M": 20, "G": 30}[free[2]] == pytest.approx(fraction * total, rel=0.1)
        assert failed.record["peak_memory_mib"] * 2**20 <= fraction * total
        ways = offered(text)
        assert ways
        for way in ways:
            torch.cuda.empty_cache()
            again = command(*small(*way, **values))
            assert again.status == 0, (way, again.err)
            assert again.record["config_digest"] == whole.record["config_digest"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
