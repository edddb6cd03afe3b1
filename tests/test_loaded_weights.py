"""Through the commands: messages and records about weights, and names of runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import BACKBONE, assert_error, command, run, settle, small
from test_custom_images import fill

from svp_bench.config.compose import compose, split_flags
from svp_bench.records.store import read_record
from svp_bench.sweep.jobs import Job
from svp_bench.sweep.runner import Runner
from svp_bench.train.module import AdaptationModule
from svp_bench.train.parser import resolve

LINEAR = ("--method", "linear")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def weights(path: Path, seed: int = 0, **arguments: Any) -> Path:
    """Save weights of the small backbone, sampled from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.save(timm.create_model(BACKBONE, **{"num_classes": 100, **arguments}).state_dict(), path)
    return path


def begun(*extra: str, checkpoint: Path | str, **values: str | None) -> list[str]:
    return small(*LINEAR, *extra, model__checkpoint=str(checkpoint), **values)


# ------------------------------------------------------------------------------------- what loading did


def test_a_plain_load_is_no_part_of_the_record(place: Path) -> None:
    outcome = run(*begun(checkpoint=weights(Path("a.pth"))))
    assert "checkpoint_load" not in outcome.record
    assert "dropped the head of the file (head.bias, head.weight)" in outcome.out
    assert read_record(outcome.record_path).source_digest == ""
    fresh = run(*begun("--model.head", "fresh", checkpoint="a.pth"))
    assert fresh.record["config_digest"] == outcome.record["config_digest"]


def test_a_kept_head_is_printed_recorded_and_another_cell(place: Path) -> None:
    paths = [weights(Path(f"{seed}.pth"), seed=seed) for seed in (1, 2)]
    state = torch.load(paths[0])
    torch.save({**state, **{name: value for name, value in torch.load(paths[1]).items() if "head" in name}}, paths[1])
    fresh, *kept = (
        run(*begun("--trainer.max_epochs", "1", *extra, checkpoint=path))
        for path, extra in ((paths[0], ()), *((path, ("--model.head", "keep")) for path in paths))
    )
    assert all("kept the head of the file (head.bias, head.weight)" in outcome.out for outcome in kept)
    records = [read_record(outcome.record_path) for outcome in (fresh, *kept)]
    assert len({record.checkpoint_digest for record in records}) == 1  # the same backbone
    assert len({(record.config_digest, record.source_digest) for record in records}) == 3
    (line,) = (records[1].checkpoint_load or {})["kept"]
    assert line.startswith("head sha256:")
    again = run("rerun", str(kept[0].record_path), "--results_root", "again", "--runs_root", "again")
    assert "Bit-equal" in again.out
    refused = command(
        *("rerun", str(kept[0].record_path), "--results_root", "b", "--runs_root", "b", "--model.checkpoint", "2.pth")
    )
    assert "another head than the run began with" in assert_error(refused, 1)
    image = str(next(Path("data").rglob("*.jpg")))
    saved = str(kept[0].folder / "checkpoints" / "last.ckpt")
    assert run("predict", "--ckpt", saved, "--images", image).out


@pytest.mark.parametrize("head", ["keep", "kept"])
def test_a_head_that_cannot_be_kept_is_one_line(place: Path, head: str) -> None:
    path = weights(Path("seven.pth"), num_classes=7)
    text = assert_error(command(*begun("--model.head", head, checkpoint=path)), 1 if head == "keep" else 2)
    if head == "keep":
        assert "seven.pth: the file has a head of 7 classes (width 16), the model has a head of 100 classes" in text
        assert "takes the head of a file" in assert_error(command(*begun("--model.head", head, checkpoint="none")), 2)
        both = begun("--model.head", head, "--model.head_hidden", "4", checkpoint=path)
        assert "model.head_hidden" in assert_error(command(*both), 2)
    else:
        assert "model.head" in text
    assert not list(Path().rglob("*.json"))


def test_resized_positions_and_casts_are_printed_recorded_and_found_again(place: Path) -> None:
    path = weights(Path("half.pth"))
    torch.save({name: value.half() for name, value in torch.load(path).items()}, path)
    given = begun(checkpoint=path, data__image_size="16")
    outcome = run(*given)
    load = outcome.record["checkpoint_load"]
    assert load["resized"] == ["pos_embed 4x4 -> 2x2"]
    assert load["cast"][0].startswith("float16 -> float32")
    assert "resized pos_embed 4x4 -> 2x2" in outcome.out
    common = (*small(model__checkpoint="half.pth", data__image_size="16")[3:],)
    job = Job("vtab/cifar", "linear", 0, "final", common=common)
    found = Runner().look(job)
    assert found is not None
    assert found.run_id == outcome.record_path.stem
    again = run("rerun", str(outcome.record_path), "--results_root", "again", "--runs_root", "again")
    assert "Bit-equal" in again.out


# ------------------------------------------------------------------------------------------------ run names


def stopped(argv: list[str], monkeypatch: pytest.MonkeyPatch, epoch: int = 1) -> Path:
    """Start a run that fails after some epochs; return its folder."""
    known = set(Path("runs").glob("*/*/*"))

    def fail(self: AdaptationModule) -> None:
        if self.current_epoch >= epoch:
            raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(AdaptationModule, "on_train_epoch_start", fail)
        with pytest.raises(RuntimeError, match="the power went"):
            command(*argv)
    (folder,) = set(Path("runs").glob("*/*/*")) - known
    return folder


def ids() -> list[str]:
    return sorted(path.stem for path in Path().rglob("records/**/*.json"))


@pytest.mark.parametrize("epoch", [0, 1])  # without and with a checkpoint
def test_other_weights_do_not_take_over_the_name_of_a_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    one, two = weights(Path("one.pth"), 1), weights(Path("two.pth"), 2)
    epochs = {"trainer__max_epochs": "2"}
    folder = stopped(begun(checkpoint=one, **epochs), monkeypatch, epoch)
    other = run(*begun("--resume", checkpoint=two, **epochs))
    assert other.folder != folder
    assert any(f"{folder.name} began from other weights" in notice for notice in other.notices)
    random = run(*begun("--resume", checkpoint="none", **epochs))
    assert random.folder not in (folder, other.folder)
    again = run(*begun("--resume", checkpoint=one, **epochs))
    assert again.folder == folder
    complete = command(*begun("--resume", checkpoint=two, **epochs))
    assert f"{other.folder.name} is complete" in complete.out


def test_weights_that_changed_behind_their_name_begin_a_new_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights(Path("w.pth"), 1)
    epochs = {"trainer__max_epochs": "2"}
    folder = stopped(begun(checkpoint=path, **epochs), monkeypatch)
    weights(path, 2)
    assert run(*begun("--resume", checkpoint=path, **epochs)).folder != folder


def test_a_run_that_is_recorded_elsewhere_keeps_its_name(place: Path) -> None:
    first = run(*begun("--resume", checkpoint="none"))
    second = run(*begun("--resume", "--results_root", "other", checkpoint="none"))
    assert first.folder != second.folder
    assert len(ids()) == len(set(ids())) == 2


def test_sweeps_with_other_weights_over_one_runs_folder_share_no_name(place: Path) -> None:
    one, two = weights(Path("one.pth"), 1), weights(Path("two.pth"), 2)
    flags = tuple(small(model__checkpoint=None)[3:])

    def job(root: str, checkpoint: Path | str) -> Job:
        given = (*flags, "--results_root", root, "--model.checkpoint", str(checkpoint))
        return Job("vtab/cifar", "linear", 0, "final", common=given)

    jobs = [job("a", one), job("b", two), job("a", two), job("c", "none")]
    outcomes = [Runner().run(each) for each in jobs]
    assert [(outcome.status, outcome.found) for outcome in outcomes] == [("complete", False)] * 4
    assert len(ids()) == len(set(ids())) == 4
    assert [Runner().look(each).run_id for each in jobs] == [outcome.run_id for outcome in outcomes]  # type: ignore[union-attr]
    assert Runner().look(job("c", one)) is None


# ------------------------------------------------------------------------------------- sizes that follow


def config_of(*argv: str) -> Mapping[str, Any]:
    return resolve(compose(split_flags(argv))).config


def test_own_images_take_the_backbones_size_unless_one_is_set(place: Path) -> None:
    fill(Path("own"))
    own = ("--config", "configs/custom/images.yaml", "--data.root", "own")
    nano = ("--model.backbone", "vim_nano_patch8_64")
    assert config_of(*own, *nano)["data"]["image_size"] == 64
    assert config_of(*own)["data"]["image_size"] == 224
    assert config_of(*own, *nano, "--data.image_size", "32")["data"]["image_size"] == 32
    assert config_of("--config", "configs/vtab/cifar.yaml", *nano)["data"]["image_size"] == 224  # the protocol's
    given = ("fit", *own, *LINEAR, "--model.backbone", BACKBONE, "--model.checkpoint", "none")
    outcome = run(*given, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--data.batch_size", "8")
    assert any(f"data.image_size is 32, the size that {BACKBONE} was trained with" in n for n in outcome.notices)
    assert "  images     32x32 pixels" in outcome.out
    assert outcome.record["config"]["data"]["image_size"] == 32
    unknown = command("fit", *own, "--model.backbone", "vim_nan_patch8_64")
    assert "did you mean 'vim_nano_patch8_64'" in assert_error(unknown, 2)


def test_what_follows_from_searched_values_is_settled_anew(place: Path) -> None:
    flags = tuple(small(trainer__max_epochs="8")[3:])
    assert config_of("--config", "configs/vtab/cifar.yaml", *flags)["model"]["warmup_epochs"] == 1.6
    base = Job("vtab/cifar", "linear", 0, "final", common=flags)
    longer = Job("vtab/cifar", "linear", 0, "final", {"trainer.max_epochs": 100}, common=flags)
    runner = Runner()
    assert runner.resolved(base).config["model"]["warmup_epochs"] == 1.6
    assert runner.resolved(longer).config["model"]["warmup_epochs"] == 10
