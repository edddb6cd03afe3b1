from __future__ import annotations

import io
import itertools
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from svp_bench.core.errors import ConfigError, DataError, UsageError
from svp_bench.data import module as module_file
from svp_bench.data.loading import Batch
from svp_bench.data.module import VisionDataModule
from svp_bench.data.sources import FileImages
from svp_bench.data.split_files import combined_digest, read_list, split_digest
from svp_bench.data.synthetic import draw_task
from svp_bench.data.transforms import EvalTransform, resize_squash
from svp_bench.tasks.cards import load_task

COUNTS = {"train800": 14, "val200": 5, "test": 11}
SIZE = 16

pytestmark = pytest.mark.filterwarnings("ignore:the data of vtab/dtd differ from its card")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    draw_task(load_task("vtab/dtd"), root, counts=COUNTS, size=20)
    return root


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return the folder of a task that a test may break."""
    return draw_task(load_task("vtab/dtd"), tmp_path, counts=COUNTS, size=20)


def make(root: Path, **arguments: Any) -> VisionDataModule:
    return VisionDataModule(
        **{
            "task": "vtab/dtd",
            "root": str(root),
            "image_size": SIZE,
            "batch_size": 4,
            "pixel_cache": False,
            **arguments,
        }
    )


def ready(root: Path, when: str = "fit", **arguments: Any) -> VisionDataModule:
    data = make(root, **arguments)
    data.setup(when)
    return data


def attach(data: VisionDataModule, world_size: int = 1, rank: int = 0, accumulate: int = 1) -> VisionDataModule:
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size, global_rank=rank, accumulate_grad_batches=accumulate, num_devices=world_size
    )
    return data


def indices(loader: Any) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


# --- before any data are there ---------------------------------------------------------------------------------------


def test_the_facts_of_the_card_are_known_at_once() -> None:
    data = VisionDataModule("vtab/caltech101")
    assert (data.num_classes, data.image_size, data.stage) == (102, 224, "final")
    assert (data.card.name, data.suite.name, data.protocol.name) == ("vtab/caltech101", "vtab", "vtab-final")
    assert data.splits == {"train": "train800val200", "test": "test"}
    assert VisionDataModule("vtab/caltech101", stage="select").splits == {"train": "train800", "val": "val200"}
    assert (data.batch_size, data.eval_batch_size) == (32, 32)
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        data.report  # noqa: B018
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "vtab/caltech"}, UsageError, "unknown task 'vtab/caltech'; did you mean 'vtab/caltech101'"),
        ({"protocol": "vtab-finale"}, UsageError, "unknown protocol 'vtab-finale'; did you mean 'vtab-final'"),
        ({"stage": "finale"}, UsageError, "unknown stage 'finale'; did you mean 'final'"),
        ({"protocol": "demo-final"}, UsageError, "the protocol 'demo-final' reads the split 'trainval' for train"),
        ({"batch_size": 0}, ConfigError, "data.batch_size 0 is out of range, allowed: 1 and above"),
        ({"eval_batch_size": 0}, ConfigError, "data.eval_batch_size 0 is out of range, allowed: 1 and above"),
        ({"num_workers": -1}, ConfigError, "data.num_workers -1 is out of range, allowed: 0 to 1024"),
        ({"image_size": 0}, ConfigError, "data.image_size 0 is out of range, allowed: 1 and above"),
        ({"seed": -1}, ConfigError, "data.seed -1 is out of range, allowed: 0 and above"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        VisionDataModule(**{"task": "vtab/dtd", **arguments})


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data of vtab/dtd: none of "):
        ready(tmp_path)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_training_batch_is_the_decoded_images(root: Path) -> None:
    data = ready(root)
    lines = read_list(root / "dtd" / "train800val200.txt", 47)
    images = FileImages(root / "dtd", "train800val200", lines)
    batches = list(data.train_dataloader())
    assert all(isinstance(batch, Batch) for batch in batches)
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 4, 3]
    for batch in batches:
        assert (batch.images.dtype, batch.labels.dtype, batch.index.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert batch.images.shape == (len(batch.index), 3, SIZE, SIZE)
        assert batch.labels.tolist() == lines.labels[batch.index.numpy()].tolist()
        for image, index in zip(batch.images, batch.index.tolist(), strict=True):
            assert np.array_equal(image.numpy(), resize_squash(images.load(index), SIZE))
    assert sorted(itertools.chain.from_iterable(batch.index.tolist() for batch in batches)) == list(range(19))


def test_the_order_depends_on_seed_and_epoch_only(root: Path) -> None:
    loader = ready(root, seed=5).train_dataloader()
    first = indices(loader)
    torch.manual_seed(1234)
    assert indices(loader) == first
    assert indices(ready(root, seed=5).train_dataloader()) == first
    assert indices(ready(root, seed=6).train_dataloader()) != first
    loader.sampler.set_epoch(1)
    assert indices(loader) != first


def test_loaders_leave_the_global_random_state_alone(root: Path) -> None:
    loader = ready(root).train_dataloader()
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_drop_last_leaves_the_small_batch_out_but_never_all(root: Path) -> None:
    assert [len(batch) for batch in indices(ready(root, drop_last=True).train_dataloader())] == [4, 4, 4, 4]
    assert [len(batch) for batch in indices(ready(root, drop_last=True, batch_size=64).train_dataloader())] == [19]


def test_images_are_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    load = FileImages.load
    monkeypatch.setattr(FileImages, "load", lambda self, index: (loads.append(index), load(self, index))[1])
    data = ready(root)
    for when in ("fit", "validate", "test"):
        data.setup(when)
    list(data.train_dataloader())
    list(data.train_dataloader())
    assert sorted(loads) == list(range(19))


def test_above_the_memory_limit_images_are_decoded_anew_by_workers(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cached = list(ready(root).train_dataloader())
    monkeypatch.setattr(module_file, "MEMORY_LIMIT_BYTES", 19 * 3 * SIZE * SIZE - 1)
    with caplog.at_level("INFO"):
        data = ready(root, num_workers=1)
    assert "train800val200 would take 0.0 GiB decoded; its images are decoded anew in each epoch" in caplog.text
    loader = data.train_dataloader()
    assert loader.num_workers == 1
    fresh = list(loader)
    assert all(
        torch.equal(a, b) for one, other in zip(cached, fresh, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_digits_need_no_folder() -> None:
    data = VisionDataModule("demo/digits-5shot", batch_size=16)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch.labels) for batch in batches] == [16, 16, 16, 2]
    assert batches[0].images.shape == (16, 3, 64, 64)
    assert data.report.status == "as_card"


# --- stages ----------------------------------------------------------------------------------------------------------


def test_stage_final_has_no_val_loader(root: Path) -> None:
    data = ready(root)
    assert data.val_dataloader() == []
    with pytest.raises(UsageError, match=r"stage 'final' has no val split.+'train800val200'; validate with --"):
        data.require_val()


def test_stage_select_validates_on_val_in_order(root: Path) -> None:
    data = ready(root, stage="select", eval_batch_size=3)
    data.require_val()
    assert sorted(itertools.chain.from_iterable(indices(data.train_dataloader()))) == list(range(14))
    val = data.val_dataloader()
    assert indices(val) == [[0, 1], [2, 3, 4]]
    labels = torch.cat([batch.labels for batch in val])
    assert labels.tolist() == read_list(root / "dtd" / "val200.txt", 47).labels.tolist()
    assert "test" not in data.splits


def test_validate_alone_decodes_only_val(root: Path) -> None:
    data = ready(root, "validate", stage="select")
    assert list(data._datasets) == ["val"]


def test_there_is_no_test_loader_before_it_is_unlocked(root: Path) -> None:
    data = ready(root)
    with pytest.raises(UsageError, match="the test images are read once, after the weights are final"):
        data.test_dataloader()
    data.unlock_test()
    assert indices(data.test_dataloader()) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]


def test_stage_select_never_unlocks_test(root: Path) -> None:
    data = ready(root, stage="select")
    with pytest.raises(UsageError, match=r"stage 'select' has no test list.+'val200'; test with --data\.stage f"):
        data.unlock_test()
    with pytest.raises(UsageError, match="there is no test loader yet"):
        data.test_dataloader()


def test_workers_read_the_same_test_images(root: Path) -> None:
    alone, helped = ready(root, "test", num_workers=0), ready(root, "test", num_workers=2)
    alone.unlock_test()
    helped.unlock_test()
    for one, other in zip(alone.test_dataloader(), helped.test_dataloader(), strict=True):
        assert isinstance(other, Batch)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_start_by_themselves_for_long_lists(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_file, "cpu_count", lambda: 12)
    data = ready(root, "test")
    data.unlock_test()
    assert data.test_dataloader().num_workers == 0  # 11 images
    monkeypatch.setattr(module_file, "_FEW_IMAGES", 11)
    assert data.test_dataloader().num_workers == 8
    assert data.train_dataloader().num_workers == 0  # cached in memory
    assert attach(data, world_size=4).test_dataloader().num_workers == 3
    assert attach(data, world_size=16).test_dataloader().num_workers == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_broken_inside_stays_one_line(own: Path, num_workers: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[1000:1100] = bytes(100)
    path = own / "images/test/000002.jpg"
    data = ready(own.parent, num_workers=num_workers)
    path.write_bytes(content)  # after all images were examined
    data.unlock_test()
    with pytest.raises(DataError, match=r"000002\.jpg: cannot be decoded \(.+\); get the file again$") as caught:
        list(data.test_dataloader())
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


# --- what stops before training, and what is reported ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test.txt", "images/test/000000.jpg 47\n", r"test\.txt:1: label 47 is out of range, the card of vtab/dtd has"),
        ("test.txt", None, r"has no list 'test' \(test\.txt\)"),
        ("images/test/000003.jpg", None, "1 of the 11 images of .*test.txt are missing"),
        ("images/test/000003.jpg", "<html>", r"000003\.jpg: not a readable image"),
        ("images/train800val200/000003.jpg", None, "1 of the 19 images of .*train800val200.txt are missing"),
    ],
)
def test_broken_data_stop_before_any_image_is_decoded(
    own: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str | None, message: str
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(EvalTransform, "__call__", decode)
    (own / file).unlink()
    if content is not None:
        (own / file).write_text(content)
    with pytest.raises(DataError, match=message):
        ready(own.parent)


def test_lists_of_the_other_stage_may_have_missing_images(own: Path) -> None:
    (own / "images/val200/000000.jpg").unlink()
    ready(own.parent, stage="final")
    with pytest.raises(DataError, match=r"1 of the 5 images of .*val200\.txt are missing"):
        ready(own.parent, stage="select")


def test_differences_are_warned_of_once(root: Path) -> None:
    data = make(root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("fit")
        data.setup("test")
    ours = [str(warning.message) for warning in caught if "differ" in str(warning.message)]
    assert len(ours) == 1
    assert ours[0].startswith("the data of vtab/dtd differ from its card: ")
    assert "test has 11 images, the card states 1880" in ours[0]
    assert "are synthetic, not real" in ours[0]
    assert ours[0].endswith("records will say data_status: different")
    assert data.report.status == "different"
    assert data.report.counts == {**COUNTS, "train800val200": 19}


def test_data_as_on_the_card_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the data of")
        VisionDataModule("demo/digits-5shot", image_size=8).setup("fit")


def test_the_digest_of_the_test_list_is_that_of_its_lines(root: Path) -> None:
    expected = split_digest("test", read_list(root / "dtd" / "test.txt", 47))
    assert ready(root).split("test").digest == expected


def test_the_digest_of_a_run_is_that_of_the_lists_of_its_stage(own: Path) -> None:
    def digest(*names: str) -> str:
        return combined_digest({name: split_digest(name, read_list(own / f"{name}.txt", 47)) for name in names})

    final = ready(own.parent).report
    assert (final.digest, final.variant) == (digest("train800val200", "test"), "synthetic")
    assert ready(own.parent, stage="select").report.digest == digest("train800", "val200")
    (own / "val200.txt").unlink()
    assert ready(own.parent).report.digest == final.digest


# --- processes -------------------------------------------------------------------------------------------------------


def test_batch_size_is_shared_by_processes_and_accumulated_batches(root: Path) -> None:
    alone = indices(ready(root, batch_size=8, drop_last=True).train_dataloader())
    shared = []
    for rank in range(2):
        data = attach(make(root, batch_size=8, drop_last=True), world_size=2, rank=rank, accumulate=2)
        data.setup("fit")
        shared.append(indices(data.train_dataloader()))
    assert [len(batch) for batch in shared[0]] == [2] * 4
    for step, whole in enumerate(alone):
        parts = [shared[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert list(itertools.chain.from_iterable(parts)) == whole


def test_each_process_tests_its_own_images(root: Path) -> None:
    seen = []
    for rank in range(3):
        data = attach(make(root, batch_size=6), world_size=3, rank=rank)
        data.setup("test")
        data.unlock_test()
        seen += list(itertools.chain.from_iterable(indices(data.test_dataloader())))
    assert sorted(seen) == list(range(11))


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate", "message"),
    [
        (6, 2, 2, "data.batch_size 6 cannot be divided by 2 processes x 2 accumulated batches = 4 parts; 12 or 20"),
        (1, 2, 1, "data.batch_size 1 cannot be divided by 2 processes x 1 accumulated batch = 2 parts; 4 or 8 would"),
        (
            6,
            2,
            1,
            "data.batch_size 6 leaves a last batch of 1 of the 19 images, fewer than 2 processes x 1 accumulated "
            "batch = 2 parts; 4 or 8 would fit, or leave it out with --data.drop_last true",
        ),
        (32, 8, 4, "train800val200 has 19 images, fewer than 8 processes x 4 accumulated batches = 32 parts; use"),
    ],
)
def test_a_batch_size_that_cannot_be_shared_names_those_that_can(
    root: Path, batch_size: int, world_size: int, accumulate: int, message: str
) -> None:
    data = attach(make(root, batch_size=batch_size), world_size=world_size, accumulate=accumulate)
    with pytest.raises(ConfigError, match=re.escape(message)):
        data.setup("fit")
    fit = re.search(r"; (\d+) or (\d+)", message)
    for size in fit.groups() if fit else ():
        data = attach(make(root, batch_size=int(size)), world_size=world_size, accumulate=accumulate)
        data.setup("fit")
        list(data.train_dataloader())


# --- with Lightning --------------------------------------------------------------------------------------------------


class Watcher(pl.LightningModule):
    """Trains nothing of interest; notes which images it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen["train"].append(batch.index.tolist())
        return self.weight * batch.images.float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen["val"].append(batch.index.tolist())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen["test"].append(batch.index.tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path: Path) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )


def test_lightning_fits_with_a_new_order_each_epoch_and_tests_once_unlocked(
    root: Path, trainer: pl.Trainer, recwarn: pytest.WarningsRecorder
) -> None:
    data, model = make(root), Watcher()
    trainer.fit(model, datamodule=data)
    texts = [str(warning.message) for warning in recwarn]
    assert not [text for text in texts if "_dataloader" in text or "Total length" in text]
    expected = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        expected.sampler.set_epoch(epoch)
        epochs += indices(expected)
    assert model.seen["train"] == epochs
    assert model.seen["train"][:5] != model.seen["train"][5:]
    assert model.seen["val"] == []
    with pytest.raises(UsageError, match="there is no test loader yet"):
        trainer.test(model, datamodule=data, verbose=False)
    data.unlock_test()
    trainer.test(model, datamodule=data, verbose=False)
    assert model.seen["test"] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]


def test_lightning_validates_in_stage_select(root: Path, trainer: pl.Trainer) -> None:
    model = Watcher()
    trainer.validate(model, datamodule=make(root, stage="select"), verbose=False)
    assert model.seen["val"] == [[0, 1], [2, 3, 4]]
