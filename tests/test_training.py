"""Whole runs on drawn data: what they train, what they write, and that the record says what happened."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from helpers import BACKBONE, COUNTS, METHODS, TASK, Outcome, assert_error, command, draw, files, read_json, run, settle
from helpers import small as line
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import svp_bench
from svp_bench.core.errors import UsageError
from svp_bench.data import module as data_module
from svp_bench.data import sources
from svp_bench.data.module import VisionDataModule
from svp_bench.data.reading import SYNTHETIC_MARK
from svp_bench.methods.checks import counted_parameters, trained_parameters
from svp_bench.models.checkpoints import backbone_digest
from svp_bench.records.bits import unpack_bits
from svp_bench.records.digests import config_digest, setting_digest
from svp_bench.records.record import Record
from svp_bench.records.store import read_record
from svp_bench.tasks.cards import displayed_class_names, load_task
from svp_bench.train.module import AdaptationModule

TRAINED, TESTED = COUNTS["train800"] + COUNTS["val200"], COUNTS["test"]
WIDTH, DEPTH, CLASSES = 16, 3, 100
CHANGING = {"run_id", "created", "times", "images_per_second", "peak_memory_mib", "checkpoint_file"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def state(outcome: Outcome) -> dict[str, torch.Tensor]:
    """The trained weights that a run saved."""
    content = torch.load(outcome.folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights: dict[str, torch.Tensor] = content["state_dict"]
    return weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steady(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs between two runs that are the same."""
    return {key: value for key, value in record.items() if key not in CHANGING}


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., None]) -> None:
    """Call `note` with the arguments before each call of `owner.name`."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


# ---- one run, looked at from all sides


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """SVP for two epochs in stage final, with what was called and when."""
    seen = SimpleNamespace(splits=[], decoded=[], loaders=[], rates=[], norms=[])
    with pytest.MonkeyPatch.context() as patch:
        seen.place = settle(tmp_path_factory.mktemp("scored"), patch)
        with pytest.MonkeyPatch.context() as spies:  # undone before other tests of the module run
            spied(spies, sources, "read_list", lambda path, *_, **__: seen.splits.append(path.name))
            spied(spies, sources.FileImages, "load", lambda images, index: seen.decoded.append((images.name, index)))

            def loader_made(data: VisionDataModule) -> None:
                trained = {k: v.clone() for k, v in data.trainer.lightning_module.named_parameters() if v.requires_grad}
                seen.loaders.append((data.trainer.global_step, trained))

            def stepped(module: AdaptationModule, *_: Any) -> None:
                group = module.trainer.optimizers[0].param_groups[0]
                seen.rates.append(group["lr"])

            spied(spies, VisionDataModule, "test_dataloader", loader_made)
            spied(spies, AdaptationModule, "on_before_optimizer_step", stepped)
            epochs = {"trainer__max_epochs": "2"}
            # without the cache of decoded images, so that each read is seen
            epochs["data__pixel_cache"] = "false"
            seen.run = run(*line("--trainer.log_every_n_steps", "1", "--model.warmup_epochs", "1", **epochs))
            seen.record = seen.run.record
        yield seen


def test_the_record_is_valid_and_in_its_place(scored: SimpleNamespace) -> None:
    record = read_record(scored.run.record_path)
    assert isinstance(record, Record)
    assert scored.run.record_path == Path("results/records") / TASK / f"{record.run_id}.json"
    assert scored.run.folder == Path("runs") / TASK / record.run_id


def test_the_record_says_what_was_run(scored: SimpleNamespace) -> None:
    record, config = scored.record, scored.record["config"]
    expected = {
        "schema": 2,
        "task": TASK,
        "suite": "vtab",
        "task_version": 1,
        "kind": "final",
        "status": "complete",
        "status_reason": None,
        "method": "svp",
        "backbone": BACKBONE,
        "checkpoint": "none",
        "checkpoint_digest": None,
        "protocol": "vtab-final",
        "stage": "final",
        "splits": {"train": "train800val200", "test": "test"},
        "data_variant": "synthetic",
        "data_status": "different",
        "seed": 0,
        "search": None,
        "package_version": svp_bench.__version__,
        "scan_backend": "reference",
        "device_count": 1,
        "precision": "32-true",
        "epochs": 2,
    }
    assert {key: record[key] for key in expected} == expected
    recipe = yaml.safe_load((Path(svp_bench.__file__).parents[1] / "configs/method/svp.yaml").read_text())["model"]
    assert record["method_args"] == recipe["method"]["init_args"]
    assert config["model"]["method"] == recipe["method"]
    assert config["model"]["learning_rate"] == recipe["learning_rate"]
    assert (config["data"]["task"], config["data"]["batch_size"]) == (TASK, 4)
    assert config["trainer"]["gradient_clip_val"] == 5.0
    assert record["config_digest"] == config_digest(config)
    assert record["setting_digest"] == setting_digest(config)
    assert record["libraries"]["torch"] == torch.__version__
    assert record["device"].startswith("CPU (")
    assert set(record["times"]) == {"train_seconds", "test_seconds"}
    assert record["images_per_second"] == pytest.approx(2 * TRAINED / record["times"]["train_seconds"], rel=0.05)
    assert record["checkpoint_file"] == f"{TASK}/{record['run_id']}/checkpoints/last.ckpt"


def test_the_record_says_how_the_data_differ(scored: SimpleNamespace) -> None:
    notes = scored.record["data_notes"]
    assert any("are synthetic, not real" in note for note in notes)
    assert f"test has {TESTED} images, the card states 10000" in notes
    (warning,) = (text for text in scored.run.warnings if "differ from its card" in text)
    assert all(note in warning for note in notes)


def test_the_digests_of_lists_are_those_of_the_files(scored: SimpleNamespace) -> None:
    def digest(name: str) -> str:
        text = (scored.place / "data/cifar" / f"{name}.txt").read_text()
        return "sha256:" + hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()

    assert scored.record["correct"]["split"] == "test"
    assert scored.record["correct"]["split_digest"] == digest("test")
    names = sorted(["train800val200", "test"])
    together = "".join(f"{name} {digest(name)}\n" for name in names)
    assert scored.record["data_digest"] == "sha256:" + hashlib.sha256(together.encode()).hexdigest()


def test_parameters_follow_the_formula_of_svp(scored: SimpleNamespace) -> None:
    hidden, groups = 64, math.ceil(DEPTH / 8)
    adapter = groups * (WIDTH**2 + 2 * WIDTH) + DEPTH * (2 * WIDTH * hidden + hidden + 2 * WIDTH)
    head = (WIDTH + 1) * CLASSES
    bare = sum(p.numel() for p in timm.create_model(BACKBONE, num_classes=0).parameters())
    assert scored.record["parameters"] == {
        "trainable": adapter + head,
        "adapter": adapter,
        "head": head,
        "total": bare + adapter + head,
    }
    assert f"svp: {adapter:,} parameters + {head:,} of the head train, of {bare + adapter + head:,}" in scored.run.out


def test_bits_and_metrics_are_those_of_the_saved_weights(scored: SimpleNamespace) -> None:
    """Scored again by other means: Pillow, timm's model built by hand, one image at a time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = svp_bench.create_model(BACKBONE, num_classes=CLASSES, method="svp")
    weights = {name.removeprefix("model."): value for name, value in state(scored.run).items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(weights) == trained
    model.load_state_dict(weights, strict=False)
    model.eval()
    right, losses = [], []
    for entry in (scored.place / "data/cifar/test.txt").read_text().splitlines():
        path, label = entry.split()
        with Image.open(scored.place / "data/cifar" / path) as image:
            pixels = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
        with torch.no_grad():
            logits = model((torch.tensor(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25)
        right.append(int(logits.argmax()) == int(label))
        losses.append(float(F.cross_entropy(logits, torch.tensor([int(label)]))))
    correct, metrics = scored.record["correct"], scored.record["metrics"]
    assert unpack_bits(correct["bits"], correct["count"]).tolist() == right
    assert metrics["count"] == correct["count"] == TESTED == len(right)
    assert metrics["correct"] == sum(right)
    assert metrics["top1"] == pytest.approx(100 * sum(right) / TESTED)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert f"top-1 {metrics['top1']:.2f} % on test ({sum(right)} of {TESTED})" in scored.run.out


def test_the_test_list_waits_for_the_final_weights(scored: SimpleNamespace) -> None:
    ((step, weights),) = scored.loaders
    assert step == 2 * math.ceil(TRAINED / 4)
    saved = state(scored.run)
    assert same({k: v for k, v in weights.items() if k in saved}, saved)
    first_test = next(i for i, (name, _) in enumerate(scored.decoded) if name == "test")
    assert {name for name, _ in scored.decoded[first_test:]} == {"test"}


def test_every_list_and_image_is_read_once(scored: SimpleNamespace) -> None:
    assert scored.splits.count("test.txt") == scored.splits.count("train800val200.txt") == 1
    assert sorted(scored.decoded) == sorted(
        [("test", i) for i in range(TESTED)] + [("train800val200", i) for i in range(TRAINED)]
    )


def test_the_run_folder_holds_config_checkpoint_and_curves(scored: SimpleNamespace) -> None:
    folder = scored.place / scored.run.folder
    left = {name for name in files(folder) if not name.startswith("events.out.tfevents")}
    assert left == {
        "checkpoints/last.ckpt",
        "config.yaml",
        "hparams.yaml",
        "lock",
        "test_confusion.csv",
        "test_per_class.csv",
        "test_predictions.csv",
    }
    assert yaml.safe_load((folder / "config.yaml").read_text()) == scored.record["config"]


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_training(scored: SimpleNamespace) -> None:
    curves = scalars(scored.place / scored.run.folder)
    steps = 2 * math.ceil(TRAINED / 4)
    for name in ("train/loss", "train/learning_rate", "train/images_per_second", "train/grad_norm"):
        assert len(curves[name]) == steps, name
        assert all(math.isfinite(value) and value > 0 for value in curves[name]), name
    assert len(curves["train/top1"]) == 2
    assert curves["train/learning_rate"] == pytest.approx(scored.rates)
    assert curves["test/top1"] == pytest.approx([scored.record["metrics"]["top1"] / 100])
    assert curves["train/loss"][0] == pytest.approx(math.log(CLASSES), rel=0.05)


def test_the_learning_rate_warms_up_and_follows_a_cosine(scored: SimpleNamespace) -> None:
    per_epoch = math.ceil(TRAINED / 4)
    peak, start, floor = 1e-3, 1e-3, 1e-5
    rises = [peak * (start + (1 - start) * step / per_epoch) for step in range(per_epoch)]
    falls = [floor + (peak - floor) * (1 + math.cos(math.pi * step / per_epoch)) / 2 for step in range(per_epoch)]
    assert scored.rates == pytest.approx(rises + falls)


def test_the_checkpoint_holds_the_trained_part_and_what_it_belongs_to(scored: SimpleNamespace) -> None:
    path = scored.place / scored.run.folder / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    assert all(name.startswith(("model.adapter.", "model.head.")) for name in content["state_dict"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bare = timm.create_model(BACKBONE, num_classes=CLASSES)
    assert content["svp_bench"] == {
        "backbone": BACKBONE,
        "backbone_digest": backbone_digest(bare),
        "checkpoint": "none",
        "init_seed": 0,
        "method": "svp_bench.methods.svp.SVP",
        "method_args": scored.record["method_args"],
        "num_classes": CLASSES,
        "image_size": [32, 32],
        "task": TASK,
        "protocol": "vtab-final",
        "stage": "final",
        "run_id": scored.record["run_id"],
        "data_digest": scored.record["data_digest"],
        "head_hidden": None,
        "head_digest": None,
        "pos_embed_grid": [4, 4],
        "input_attention": None,
        "ema_decay": None,
        "ema_evaluate": False,
        "transform": {"resize": "squash", "interpolation": "bicubic", "crop_ratio": 0.875},
        "class_names": displayed_class_names(load_task(TASK)),
        "inactive_parameters": [],
    }


# ---- stages


def test_stage_select_trains_on_train_and_scores_val(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: set[str] = set()
    spied(monkeypatch, sources.FileImages, "load", lambda images, _: decoded.add(images.name))
    outcome = run(*line(data__stage="select", trainer__max_epochs="2", data__pixel_cache="false"))
    record = outcome.record
    assert decoded == {"train800", "val200"}
    expected = {
        "kind": "selection",
        "stage": "select",
        "status": "complete",
        "splits": {"train": "train800", "val": "val200"},
        "correct": None,
    }
    assert {key: record[key] for key in expected} == expected
    metrics = record["metrics"]
    assert metrics["count"] == COUNTS["val200"]
    assert metrics["top1"] == pytest.approx(100 * metrics["correct"] / COUNTS["val200"], abs=1e-3)
    assert f"top-1 {metrics['top1']:.2f} % on val200" in outcome.out
    curves = scalars(outcome.folder)
    assert len(curves["val/top1"]) == 2
    assert curves["val/loss"][-1] == pytest.approx(metrics["loss"])
    table = run("table").out
    assert "scored on the list that chooses" in table or "selection" in table
    assert BACKBONE not in table.split("selection")[0]

    checkpoint = str(outcome.folder / "checkpoints/last.ckpt")
    validated = run("validate", "--config", str(outcome.folder / "config.yaml"), "--ckpt_path", checkpoint)
    assert "val/top1" in validated.out
    shown = re.search(r"val/loss\W+([\d.]+)", validated.out)
    assert shown
    assert float(shown.group(1)) == pytest.approx(metrics["loss"])
    line_ = assert_error(command(*line("--ckpt_path", checkpoint, subcommand="validate")), 2)
    assert "stage 'final' has no val split: vtab-final trains on 'train800val200'" in line_


def test_a_selection_without_a_last_score_is_truncated(place: Path) -> None:
    given = {"data__stage": "select", "trainer__max_epochs": "3"}
    record = run(*line("--trainer.check_val_every_n_epoch", "2", **given)).record
    assert (record["kind"], record["status"]) == ("selection", "truncated")
    assert record["status_reason"] == "val was not scored after the last epoch"
    assert record["metrics"] == {}


def test_a_run_without_test_is_completed_by_test(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = run(*line("--seed_everything", "3")).record
    decoded: list[str] = []
    with monkeypatch.context() as patch:
        spied(patch, sources.FileImages, "load", lambda images, _: decoded.append(images.name))
        outcome = run(*line("--seed_everything", "3", "--no_test"))
    assert "test" not in decoded
    record = outcome.record
    assert (record["status"], record["metrics"], record["correct"]) == ("unscored", {}, None)
    assert "unscored" in run("table").out

    later = ("test", "--config", str(outcome.folder / "config.yaml"))
    later = (*later, "--ckpt_path", str(outcome.folder / "checkpoints/last.ckpt"))
    tested = run(*later)
    assert f"Completed {outcome.record_path}" in tested.out
    done = outcome.record
    assert steady(done) == steady(scored)
    assert done["run_id"] == record["run_id"]
    assert set(done["times"]) == {"train_seconds", "test_seconds"}

    before = outcome.record_path.read_bytes()
    again = run(*later)
    assert "has its score already (the same); it is not changed" in again.out
    assert outcome.record_path.read_bytes() == before
    assert len(list(Path("results/records").rglob("*.json"))) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--trainer.limit_test_batches", "1"], "trainer.limit_test_batches = None, here 1"),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision = 32-true, here bf16-mixed"),
        (["--data.root", "other"], "trained with other splits of vtab/cifar"),
    ],
)
def test_a_record_is_completed_only_by_its_own_run(given: list[str], words: str, place: Path) -> None:
    draw(place / "other", seed=1)
    outcome = run(*line("--no_test", "--method", "linear"))
    before = outcome.record_path.read_bytes()
    config, checkpoint = str(outcome.folder / "config.yaml"), str(outcome.folder / "checkpoints/last.ckpt")
    assert words in assert_error(command("test", "--config", config, "--ckpt_path", checkpoint, *given), 2)
    assert outcome.record_path.read_bytes() == before


def test_test_without_the_record_writes_nothing(place: Path) -> None:
    outcome = run(*line("--no_test", "--method", "linear"))
    config, checkpoint = str(outcome.folder / "config.yaml"), str(outcome.folder / "checkpoints/last.ckpt")
    before = files(place)
    done = command("test", "--config", config, "--ckpt_path", checkpoint, "--results_root", "elsewhere")
    assert "only recorded runs are tested; give the run's --results_root" in assert_error(done, 2)
    assert files(place) == before


def test_only_the_final_weights_of_a_run_are_tested(place: Path) -> None:
    """Else the test list could choose: between epochs, between runs, or between settings."""
    first = run(*line("--no_test", "--method", "linear", trainer__max_epochs="2"))
    other = run(*line("--no_test", "--method", "linear", trainer__max_epochs="1", model__learning_rate="0.5"))
    chosen = run(*line("--method", "linear", data__stage="select"))
    config = str(first.folder / "config.yaml")
    before = files(place)

    copied = first.folder / "checkpoints" / "epoch0.ckpt"  # another run's weights, moved in beside the own ones
    copied.write_bytes((other.folder / "checkpoints/last.ckpt").read_bytes())
    assert " has " in assert_error(command("test", "--config", config, "--ckpt_path", str(copied)), 2)

    content = torch.load(first.folder / "checkpoints/last.ckpt", weights_only=True)
    torch.save({**content, "epoch": 0}, copied)
    text = assert_error(command("test", "--config", config, "--ckpt_path", str(copied)), 2)
    assert "not the final weights of its run (1 of 2 epochs)" in text
    copied.unlink()

    checkpoint = str(chosen.folder / "checkpoints/last.ckpt")
    text = assert_error(command(*line("--method", "linear", "--ckpt_path", checkpoint, subcommand="test")), 2)
    assert "weights of stage 'select' are never tested" in text
    assert files(place) == before


# ---- runs that do not end well


def test_a_loss_that_is_not_finite_fails_the_run(place: Path) -> None:
    given = ("--model.learning_rate", "1e30", "--model.warmup_epochs", "0", "--trainer.gradient_clip_val", "null")
    outcome = command(*line(*given))
    text = assert_error(outcome, 1)
    assert "the training loss became nan in epoch 0, step 1; try a smaller --model.learning_rate" in text
    record = outcome.record
    assert record["status"] == "failed"
    assert record["status_reason"].startswith("NonFiniteLossError: the training loss became nan")
    assert (record["metrics"], record["correct"], record["epochs"]) == ({}, None, 0)
    assert "failed" in run("table").out


def interrupt(module: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
    if batch_idx == 2:
        raise KeyboardInterrupt
    return torch.nn.Parameter(torch.zeros(())) * 0 + sum(p.sum() for p in module.parameters() if p.requires_grad)


def test_ctrl_c_leaves_a_record_of_the_interruption(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(AdaptationModule, "training_step", interrupt)
    outcome = command(*line())
    assert assert_error(outcome, 130) == "svp-bench: interrupted; the same command with --resume continues"
    record = outcome.record
    assert (record["status"], record["status_reason"]) == ("interrupted", "stopped by the user")
    assert (record["metrics"], record["epochs"]) == ({}, 0)
    assert "interrupted" in run("table").out
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_during_the_test_is_no_score(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(module: AdaptationModule, batch: Any, batch_idx: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdaptationModule, "test_step", stop)
    outcome = command(*line())
    assert assert_error(outcome, 130) == "svp-bench: interrupted; the same command with --resume continues"
    assert (outcome.record["status"], outcome.record["metrics"]) == ("interrupted", {})


def test_an_unexpected_error_leaves_a_failed_record_and_its_trace(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(module: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(AdaptationModule, "training_step", fall)
    with pytest.raises(RuntimeError, match="out of\nluck"):
        command(*line())
    (path,) = Path("results/records").rglob("*.json")
    assert (read_json(path)["status"], read_json(path)["status_reason"]) == ("failed", "RuntimeError: out of luck")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--trainer.limit_train_batches", "1"], "trainer.limit_train_batches 1"),
        (["--trainer.limit_train_batches", "0.5"], "trainer.limit_train_batches 0.5"),
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches 0"),
        (["--trainer.limit_test_batches", "2"], "trainer.limit_test_batches 2"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run"),
        (["--trainer.overfit_batches", "1"], "trainer.overfit_batches 1"),
        (["--trainer.max_steps", "2"], "stopped after 2 of 5 steps"),
        (["--trainer.max_time", "00:00:00:00"], "stopped after 0 of 1 epoch"),
    ],
)
def test_a_truncated_run_is_listed_and_never_tabled(given: list[str], reason: str, place: Path) -> None:
    record = run(*line(*given)).record
    assert (record["kind"], record["status"]) == ("final", "truncated")
    assert reason in record["status_reason"]
    assert (record["metrics"], record["correct"]) == ({}, None)
    table = run("table").out
    assert "truncated" in table
    assert tabled() == []


def tabled() -> list[dict[str, str]]:
    """The cells of the table that have a number."""
    (path,) = Path("results/tables").glob("*_long.csv")
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row["mean"]]


def test_all_batches_by_name_are_no_truncation(place: Path) -> None:
    record = run(*line("--trainer.limit_train_batches", "1.0", "--trainer.limit_test_batches", "1.0")).record
    assert record["status"] == "complete"


# ---- seeds, order and repetition


def test_seeds_are_averaged_and_settings_are_not(place: Path) -> None:
    tops = []
    for seed in ("0", "1"):
        record = run(*line("--method", "linear", "--seed_everything", seed)).record
        assert record["seed"] == int(seed)
        tops.append(record["metrics"]["top1"])
    run(*line("--method", "linear", "--model.learning_rate", "0.01"))
    run("table")
    assert {(row["row"], row["seeds"]) for row in tabled()} == {
        ("linear (learning_rate=0.001)", "0 1"),
        ("linear (learning_rate=0.01)", "0"),
    }
    (averaged,) = (row for row in tabled() if row["n"] == "2")
    assert averaged["mean"] == f"{np.mean(tops):.4f}"


@pytest.mark.parametrize("method", ["svp", "full"])
def test_the_same_seed_gives_the_same_bits(method: str, place: Path) -> None:
    given = ("--method", method, "--seed_everything", "5")
    given = (*given, "--model.method.dropout", "0.3") if method == "svp" else given
    one, other = run(*line(*given)), run(*line(*given))
    assert one.record["run_id"] != other.record["run_id"]
    assert same(state(one), state(other))
    assert steady(one.record) == steady(other.record)
    third = run(*line(*given, "--seed_everything", "6"))
    assert not same(state(one), state(third))


def test_the_order_of_images_knows_no_workers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = state(run(*line("--method", "linear")))
    monkeypatch.setattr(data_module, "MEMORY_LIMIT_BYTES", 0)  # images are decoded by workers
    for workers in ("0", "2"):
        outcome = run(*line("--method", "linear", "--data.num_workers", workers))
        assert same(state(outcome), weights)


def test_a_random_backbone_knows_no_method(place: Path) -> None:
    """Methods are compared from one backbone, also where it is random."""
    digests = set()
    for name in ("svp", "vpt_deep", "full"):
        outcome = run(*line("--method", name, "--no_test"))
        about = torch.load(outcome.folder / "checkpoints/last.ckpt", weights_only=True)["svp_bench"]
        digests.add(about["backbone_digest"])
    assert len(digests) == 1


# ---- what trains, and how


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The module of the last run, its state before and after training, and its modes in each step."""
    seen = SimpleNamespace(modes=set(), before={}, after={}, module=None)

    def begin(module: AdaptationModule) -> None:
        seen.module = module
        seen.before = {k: v.clone() for k, v in module.model.state_dict().items()}

    def step(module: AdaptationModule, *_: Any) -> None:
        seen.modes |= {(name, part.training) for name, part in module.model.named_modules()}

    def end(module: AdaptationModule) -> None:
        seen.after = {k: v.clone() for k, v in module.model.state_dict().items()}

    spied(monkeypatch, AdaptationModule, "on_train_start", begin)
    spied(monkeypatch, AdaptationModule, "on_train_batch_start", step)
    spied(monkeypatch, AdaptationModule, "on_train_end", end)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_declared_part_moves(method: str, place: Path, watched: SimpleNamespace) -> None:
    record = run(*line("--method", method, "--model.warmup_epochs", "0", trainer__max_epochs="2")).record
    model = watched.module.model
    assert trained_parameters(model).keys() == {n for n, _ in model.named_parameters() if model.method.trains(n)}
    trained = set(counted_parameters(model))
    masks = {name for name, _ in model.named_buffers() if name.startswith("adapter.")}  # that a stage may choose
    moved = {name for name, value in watched.before.items() if not torch.equal(value, watched.after[name])}
    others = trained_parameters(model).keys() - trained  # of an earlier stage; a method may reset them
    assert moved - masks - others == trained
    assert record["parameters"]["adapter"] == model.method.adapter_parameters(model)
    assert record["parameters"]["trainable"] == sum(watched.after[name].numel() for name in trained)


def test_frozen_parts_stay_in_eval_mode(place: Path, watched: SimpleNamespace) -> None:
    run(*line("--method", "svp", trainer__max_epochs="2"))
    on = {name for name, training in watched.modes if training}
    assert on
    assert {name.split(".")[0] for name in on} == {"adapter", "head", "head_drop"}
    watched.modes.clear()
    run(*line("--method", "svp", "--model.frozen_mode", "train"))
    assert {training for _, training in watched.modes} == {True}
    watched.modes.clear()
    run(*line("--method", "full"))
    assert {training for _, training in watched.modes} == {True}


def test_drop_path_acts_in_frozen_parts_only_when_asked(place: Path) -> None:
    plain = state(run(*line()))
    assert same(state(run(*line("--model.drop_path", "0.5"))), plain)
    alive = run(*line("--model.drop_path", "0.5", "--model.frozen_mode", "train"))
    assert not same(state(alive), plain)
    config = alive.record["config"]["model"]
    assert (config["drop_path"], config["frozen_mode"]) == (0.5, "train")
    assert not same(
        state(run(*line("--model.drop_path", "0.5", "--method", "full"))), state(run(*line("--method", "full")))
    )


def test_a_warm_up_longer_than_the_run_is_clipped_with_a_notice(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    spied(
        monkeypatch,
        AdaptationModule,
        "on_before_optimizer_step",
        lambda module, *_: rates.append(module.trainer.optimizers[0].param_groups[0]["lr"]),
    )
    given = run(*line("--model.warmup_epochs", "4", trainer__max_epochs="2"))
    (notice,) = (notice for notice in given.notices if "warm-up" in notice)
    assert "4 epochs is longer than the run of 2 epochs: clipped to 2 epochs" in notice
    assert given.record["config"]["model"]["warmup_epochs"] == 2
    given = run(*line("--model.warmup_epochs", "1.5", trainer__max_epochs="2"))
    assert not any("warm-up" in notice for notice in given.notices)
    rates.clear()
    outcome = run(*line(trainer__max_epochs="2"))  # the protocol's warm-up, made for 100 epochs
    (notice,) = (notice for notice in outcome.notices if "warm-up" in notice)
    assert "10 epochs is longer than a fifth of the run of 2 epochs: clipped to 0.4 epochs" in notice
    assert outcome.record["config"]["model"]["warmup_epochs"] == 0.4
    steps = math.ceil(TRAINED / 4)
    warmup = round(2 * steps / 5)
    assert rates[:warmup] == pytest.approx([1e-3 * (1e-3 + (1 - 1e-3) * step / warmup) for step in range(warmup)])
    assert rates[warmup] == max(rates) == pytest.approx(1e-3)
    saved = run("fit", "--config", str(outcome.folder / "config.yaml"))
    assert not any("warm-up" in notice for notice in saved.notices)
    assert saved.record["config_digest"] == outcome.record["config_digest"]
    rates.clear()
    outcome = run(*line("--model.warmup_epochs", "0", "--model.learning_rate", "1e-6"))
    assert not any("warm-up" in notice for notice in outcome.notices)
    assert rates == pytest.approx([1e-6] * steps)  # below the floor of the cosine: constant


def test_weight_decay_spares_biases_vectors_and_the_backbones_list(place: Path, watched: SimpleNamespace) -> None:
    run(*line("--method", "full", "--model.weight_decay", "0.5"))
    module = watched.module
    optimizer = module.trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW
    names = {id(p): name for name, p in module.model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    excluded = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0.0}
    assert decayed | excluded == set(names.values())
    assert not decayed & excluded
    assert excluded >= {"pos_embed", "cls_token", "norm_f.weight", "head.bias", "layers.0.mixer.A_log"}
    assert excluded >= {
        "layers.0.mixer.A_b_log",
        "layers.0.mixer.D",
        "layers.1.mixer.conv1d.bias",
        "patch_embed.proj.bias",
    }
    assert decayed == {
        name
        for name in names.values()
        if name.endswith("weight") and not name.endswith(("norm.weight", "norm_f.weight"))
    }


def test_label_smoothing_changes_the_loss_of_training_alone(place: Path) -> None:
    plain = run(*line("--trainer.log_every_n_steps", "1"))
    smooth = run(*line("--trainer.log_every_n_steps", "1", "--model.label_smoothing", "0.3"))
    assert smooth.record["setting_digest"] != plain.record["setting_digest"]
    assert not same(state(plain), state(smooth))
    # at random weights the logits are small: the cross entropy, smoothed or not, is that of a guess
    one, other = (scalars(outcome.folder)["train/loss"][0] for outcome in (plain, smooth))
    assert one != other
    assert one == pytest.approx(math.log(CLASSES), rel=0.05)


def test_label_smoothing_is_that_of_cross_entropy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = AdaptationModule.training_step

    def step(module: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = original(module, batch, batch_idx)
        with torch.no_grad():
            log_p = module(batch.images).log_softmax(dim=-1)
            hard = -log_p[torch.arange(len(batch.labels)), batch.labels].mean()
            kept.append((loss.detach(), 0.7 * hard - 0.3 * log_p.mean()))
        return loss

    monkeypatch.setattr(AdaptationModule, "training_step", step)
    run(*line("--model.label_smoothing", "0.3", "--method", "linear"))
    for loss, expected in kept:
        torch.testing.assert_close(loss, expected)


def test_accumulated_batches_train_as_one(place: Path) -> None:
    """Also with an uneven last batch: 17 images in steps of 4 leave one, so here 6 leave 5, in halves of 3 and 2."""
    whole = state(run(*line("--method", "linear", data__batch_size="6")))
    halves = state(run(*line("--method", "linear", "--trainer.accumulate_grad_batches", "2", data__batch_size="6")))
    assert whole.keys() == halves.keys()
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-3, atol=1e-6)


# ---- weights: saved strictly, loaded strictly


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--method", "linear"],
            "method = 'svp_bench.methods.svp.SVP', this run has 'svp_bench.methods.linear.",
        ),
        (["--model.method.hidden_dim", "3"], "method_args = {"),
        (["--model.checkpoint", "none"], "backbone_digest = 'sha256:"),
        (["--data.image_size", "48"], "backbone_digest = 'sha256:"),
        (["--data.task", "vtab/dtd"], "num_classes = 100, this run has 47; use the config.yaml next to it"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(given: list[str], words: str, place: Path) -> None:
    draw(place / "data", "vtab/dtd")
    torch.manual_seed(99)  # not the run's: its random backbone would be these very weights
    weights = timm.create_model(BACKBONE).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, "weights.safetensors")
    small = {"model__checkpoint": "weights.safetensors"}
    small["data__stage"] = "select"
    outcome = run(*line(**small))
    before = files(place)
    checkpoint = str(outcome.folder / "checkpoints/last.ckpt")
    text = assert_error(command(*line("--ckpt_path", checkpoint, *given, subcommand="validate", **small)), 1)
    assert f"the checkpoint was trained with {words}" in text
    assert files(place) == before


def test_a_checkpoint_with_a_missing_or_foreign_weight_is_refused(place: Path) -> None:
    outcome = run(*line("--no_test"))
    path = outcome.folder / "checkpoints/last.ckpt"
    config = str(outcome.folder / "config.yaml")
    content = torch.load(path, weights_only=True)
    for change in ("missing", "foreign", "shape"):
        weights = dict(content["state_dict"])
        name = next(iter(weights))
        if change == "missing":
            del weights[name]
        elif change == "foreign":
            weights[name := "model.layers.0.mixer.D"] = torch.zeros(32)
        else:
            weights[name] = torch.zeros(1)
        torch.save({**content, "state_dict": weights}, "changed.ckpt")
        text = assert_error(command("test", "--config", config, "--ckpt_path", "changed.ckpt"), 1)
        assert f"does not hold exactly the trained part; first difference: {name}" in text


def test_pretrained_weights_give_a_digest_and_a_ranked_section(place: Path) -> None:
    next((place / "data").rglob(SYNTHETIC_MARK)).unlink()  # unmarked: synthetic images are not ranked
    model = timm.create_model(BACKBONE, num_classes=10)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, "weights.safetensors")
    outcome = run(*line("--method", "linear", model__checkpoint="weights.safetensors"))
    record = outcome.record
    assert record["checkpoint"] == "weights.safetensors"
    assert record["checkpoint_digest"] == backbone_digest(model)
    assert "Random weights" not in outcome.out
    # the same weights under another name and place are the same cell
    Path("elsewhere").mkdir()
    torch.save({"model": model.state_dict()}, "elsewhere/w.pth")
    other = run(*line("--method", "linear", model__checkpoint="elsewhere/w.pth")).record
    assert other["config_digest"] == record["config_digest"]
    assert other["checkpoint_digest"] == record["checkpoint_digest"]
    run(*line("--method", "linear"))
    table = run("table").out
    assert [row["weights"] for row in tabled()] == ["pretrained", "random"]
    pretrained, random = table.split(f"{BACKBONE}, ")[1:]
    assert random.startswith("random weights")
    assert "random weights" not in pretrained
    assert "are not ranked" in random


# ---- all methods, and the table


def test_all_methods_run_and_stand_in_the_table(place: Path) -> None:
    tops = {}
    for name in METHODS:
        record = run(*line("--method", name, trainer__max_epochs="2")).record  # one for each stage
        assert (record["method"], record["status"]) == (name, "complete")
        tops[name] = record["metrics"]["top1"]
    out = run("table").out
    assert {row["method"]: row["mean"] for row in tabled()} == {name: f"{top:.4f}" for name, top in tops.items()}
    assert [row.split()[1] for row in out.splitlines() if "1/19" in row] == sorted(METHODS)
    before = {path: path.read_bytes() for path in Path("results/tables").iterdir()}
    assert run("table").out == out
    assert {path: path.read_bytes() for path in Path("results/tables").iterdir()} == before


def test_a_table_without_records_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("table")
    assert "no records" in outcome.out.lower()
    assert files(tmp_path) == set()


def test_the_demo_configs_run(place: Path) -> None:
    given = {"model__backbone": None, "model__checkpoint": None, "data__root": None, "data__image_size": "16"}
    given |= {"data__batch_size": "50", "trainer__max_epochs": "1"}
    record = run(*line("--method", "linear", config="configs/demo/digits-5shot.yaml", **given)).record
    assert record["backbone"] == "vim_nano_patch8_64"
    assert record["data_status"] == "as_card"
    assert record["metrics"]["count"] == 797
    assert record["splits"] == {"train": "trainval", "test": "test"}
    assert record["task"] == "demo/digits-5shot"


def test_the_backend_of_the_scan_is_chosen_and_recorded(place: Path) -> None:
    record = run(*line(model__scan_backend=None)).record
    assert record["scan_backend"] in svp_bench.list_backends()
    assert record["scan_reason"].startswith("auto: ")
    assert record["config_digest"] == run(*line()).record["config_digest"]


def test_data_may_lie_anywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = run(*line("--method", "linear")).record["config_digest"]
    elsewhere = place / "some" / "folder"
    elsewhere.mkdir(parents=True)
    Path("data").rename(elsewhere / "vtab-1k")
    monkeypatch.setenv("SVP_BENCH_DATA", str(elsewhere))
    record = run(*line("--method", "linear", "--results_root", "r", "--runs_root", "q", data__root=None)).record
    assert record["config_digest"] == digest
    assert {name.split("/")[0] for name in files()} >= {"r", "q"}


def test_the_record_names_the_backend_that_ran(place: Path) -> None:
    """In float64 the CPU kernels cannot run; the reference does, and header and record say so."""
    outcome = run(*line("--method", "linear", "--trainer.precision", "64-true", model__scan_backend="auto"))
    assert outcome.record["scan_backend"] == "reference"
    assert "cpu: it computes in float32" in outcome.record["scan_reason"]
    assert "scan backend reference" in outcome.out
    text = assert_error(command(*line("--trainer.precision", "64-true", model__scan_backend="cpu")), 1)
    assert "the scan backend 'cpu' was asked for and cannot run here: it computes in float32" in text


def test_a_module_is_loaded_from_its_checkpoint(place: Path) -> None:
    outcome = run(*line("--no_test", "--method", "svp"))
    path = outcome.folder / "checkpoints" / "last.ckpt"
    module = AdaptationModule.load_from_checkpoint(path, map_location="cpu")
    assert not module.training
    assert same({f"model.{n}": p for n, p in module.model.named_parameters() if p.requires_grad}, state(outcome))
    assert module(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, CLASSES)
    with pytest.raises(UsageError, match=r"no checkpoint 'missing\.ckpt'"):
        AdaptationModule.load_from_checkpoint("missing.ckpt")
