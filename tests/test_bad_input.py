"""What a user can get wrong: one line on stderr with the words that help, the right status, nothing left behind."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import BACKBONE, TASK, assert_error, command, files, run, settle, small
from native_files import write_native
from PIL import Image

from svp_bench.tasks.cards import load_task

LIST = Path("data/cifar/train800val200.txt")
IMAGE = Path("data/cifar/images/train800val200/000003.jpg")
TEST_IMAGE = Path("data/cifar/images/test/000003.jpg")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, for commands that leave nothing behind."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        return settle(folder, patch)


@pytest.fixture
def shared(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(drawn)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return drawn


def refused(argv: list[str], status: int, *words: str) -> str:
    """Run a command that must be refused without a trace, and return its one line."""
    before = files()
    outcome = command(*argv)
    text = assert_error(outcome, status)
    assert text.startswith("svp-bench: error: ")
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in {text!r}"
    assert files() == before
    assert outcome.out == ""
    return text


def fit(*extra: str, **values: str | None) -> list[str]:
    return small(*extra, **values)


# ---- names, flags, values


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fitt"], ["unknown command 'fitt'; did you mean 'fit'?", "svp-bench --help"]),
        (["fit"], ["no task: give a config, e.g. --config configs/vtab/caltech101.yaml", "svp-bench tasks"]),
        (["fit", "--data.task", "vtab/caltech"], ["unknown task 'vtab/caltech'; did you mean 'vtab/caltech101'?"]),
        (["fit", "--data.task", "cifar"], ["unknown task 'cifar'; did you mean 'vtab/cifar'?"]),
        (["fit", "--config", "configs/vtab/cifr.yaml"], ["unknown config file", "'configs/vtab/cifar.yaml'?"]),
        (["fit", "--config"], ["--config needs a value: --config FILE"]),
        (["fit", "--config", "--no_test"], ["--config needs a value: --config FILE"]),
        (["fit", "--config="], ["unknown config file ''"]),
        (["fit", "--config", ""], ["unknown config file ''"]),
        (["fit", "--method"], ["--method needs a value: --method NAME"]),
        (fit("--method", "lineer"), ["unknown method 'lineer'; did you mean 'linear'?", "svp-bench methods"]),
        (fit("--method", ""), ["unknown method ''"]),
        (fit("--method", "mine.yaml"), ["no method file 'mine.yaml'; --method takes a name"]),
        (
            fit("--method", "svp", "--method=linear"),
            ["--method was given twice: svp, linear"],
        ),
        (fit("--model.method", "linear"), ["--method NAME (or FILE)"]),
        (fit("--model.method.class_path=SVP"), ["--method NAME (or FILE)"]),
        (fit("--model", "{learning_rate: 1}"), ["--model is set key by key, e.g. --model.learning_rate"]),
        (fit("--config", "configs/method/linear.yaml"), ["a second config names a method; use --method"]),
        (fit("--data.protocol", "vtab-finl"), ["unknown protocol 'vtab-finl'; did you mean 'vtab-final'?"]),
        (
            fit("--data.protocol", "demo-final"),
            ["'demo-final' reads the split 'trainval' for train, which vtab/cifar lacks"],
        ),
        (fit(model__backbone="vim_tiny_patch16_22"), ["unknown backbone", "did you mean 'vim_tiny_patch16_224'?"]),
        (fit(model__scan_backend="referense"), ["unknown scan backend 'referense'; did you mean 'reference'?"]),
        (
            fit("--model.learing_rate", "1"),
            ["unknown argument 'model.learing_rate'; did you mean 'model.learning_rate'?"],
        ),
        (fit("--traner.max_epochs=1"), ["unknown argument 'traner.max_epochs'; did you mean 'trainer.max_epochs'?"]),
        (fit("--learning_rate", "1"), ["unknown argument 'learning_rate'; did you mean 'model.learning_rate'?"]),
        (fit("--fast"), ["unknown argument 'fast'", "`svp-bench fit --help=all` lists all"]),
        (fit("stray"), ["unrecognized arguments: stray"]),
        (
            fit("--model.method.hidden_dm", "3"),
            ["unknown argument of the method svp 'hidden_dm'; did you mean 'hidden_dim'?"],
        ),
        (
            fit("--method", "linear", "--model.method.hidden_dim", "3"),
            ["unknown argument of the method linear 'hidden_dim'"],
        ),
        (fit("--model.method.hidden_dim", "x"), ["hidden_dim: expected int, not 'x'"]),
        (fit("--model.method.hidden_dim", "0"), ["svp: hidden_dim must be at least 1, not 0"]),
        (fit("--model.method.depths", "[7]"), ["svp: depths must be distinct blocks of 0..2, not [7]"]),
        (
            fit("--method", "vpt_deep", "--model.method.mode", "x"),
            ["mode: expected replace or accumulate, not 'x'"],
        ),
        (fit("--model.num_classes", "3"), ["model.num_classes is not set by hand: it follows from the task's card"]),
        (fit("--model.image_size=3"), ["model.image_size is not set by hand: set --data.image_size"]),
        (fit("--model.seed=3"), ["model.seed is not set by hand: set --seed_everything"]),
        (fit("--data.seed=3"), ["data.seed is not set by hand: set --seed_everything"]),
        (fit("--seed_everything", "abc"), ["seed_everything: expected int, not 'abc'"]),
        (fit("--seed_everything", "-1"), ["seed_everything is a whole number of 0 to 4294967295, not -1"]),
        (fit("--seed_everything", "true"), ["seed_everything: expected int, not 'True'"]),
        (fit("--seed_everything", "null"), ["seed_everything"]),
        (fit(data__batch_size="0"), ["data.batch_size 0 is out of range, allowed: 1 and above"]),
        (fit(data__batch_size="four"), ["data.batch_size: expected int, not 'four'"]),
        (fit(data__image_size="4"), [f"data.image_size 4 is smaller than a patch of {BACKBONE} (8 pixels)"]),
        (fit("--data.stage", "finl"), ["data.stage: expected final or select, not 'finl'; did you mean 'final'?"]),
        (fit("--model.learning_rate", "-1"), ["model.learning_rate -1 is out of range, allowed: above 0"]),
        (fit("--model.learning_rate", "0"), ["model.learning_rate 0 is out of range, allowed: above 0"]),
        (fit("--model.learning_rate", "fast"), ["model.learning_rate: expected float, not 'fast'"]),
        (fit("--model.weight_decay", "-0.1"), ["model.weight_decay -0.1 is out of range, allowed: 0 and above"]),
        (fit("--model.label_smoothing", "1"), ["model.label_smoothing 1 is out of range, allowed: 0 to below 1"]),
        (fit("--model.drop_path", "1"), ["model.drop_path 1 is out of range, allowed: 0 to below 1"]),
        (fit("--model.warmup_epochs", "-1"), ["model.warmup_epochs -1 is out of range, allowed: 0 and above"]),
        (
            fit("--model.optimizer.betas", "[0.9, 1.0]"),
            ["model.optimizer.betas 1 is out of range, allowed: 0 to below 1"],
        ),
        (
            fit("--model.optimizer.betas", "[0.9]"),
            ["model.optimizer.betas: expected tuple with 2 elements, not '[0.9]'"],
        ),
        (fit("--model.frozen_mode", "off"), ["model.frozen_mode: expected eval or train, not"]),
        (fit(trainer__max_epochs="ten"), ["trainer.max_epochs: expected int or null, not 'ten'"]),
        (fit(trainer__max_epochs="0"), ["trainer.max_epochs is at least 1 (the schedule needs an end), not 0"]),
        (fit(trainer__max_epochs="-1"), ["trainer.max_epochs is at least 1"]),
        (fit(trainer__max_epochs="null"), ["trainer.max_epochs is at least 1"]),
        (
            fit("--trainer.precision", "16-mixed", "--trainer.accelerator", "cpu"),
            ["16-mixed needs a GPU; on a CPU use 32-true"],
        ),
        (fit("--trainer.precision", "31"), ["trainer.precision: expected 64, 32, 16", "bf16-mixed"]),
        (fit("--trainer.precision", "bf17-mixed"), ["did you mean 'bf16-mixed'?"]),
        (fit("--trainer.accelerator", "abacus"), ["Lightning refuses these trainer settings", "accelerator='abacus'"]),
        (fit("--trainer.devices", "0", "--trainer.accelerator", "cpu"), ["Lightning refuses these trainer settings"]),
        (fit("--trainer.strategy", "x"), ["Lightning refuses these trainer settings", "strategy='x'"]),
        (
            fit("--trainer.accumulate_grad_batches", "3"),
            ["data.batch_size 4 cannot be divided by", "6 or 9 would fit"],
        ),
        (
            fit("--trainer.accumulate_grad_batches", "2"),
            ["leaves a last batch of 1 of the 17 images", "--data.drop_last true"],
        ),
        (fit("--trainer.accumulate_grad_batches", "0"), ["trainer.accumulate_grad_batches is at least 1, not 0"]),
        (fit("--trainer.check_val_every_n_epoch", "0"), ["trainer.check_val_every_n_epoch is at least 1, not 0"]),
        (fit("--trainer.max_steps", "0"), ["trainer.max_steps is at least 1, or -1 for no limit, not 0"]),
        (fit("--trainer.gradient_clip_val", "-1"), ["trainer.gradient_clip_val is at least 0, or null", "not -1"]),
        (fit("--trainer.gradient_clip_val", ".nan"), ["trainer.gradient_clip_val is a finite number, not nan"]),
        (fit("--model.learning_rate", ".nan"), ["model.learning_rate is a finite number, not nan"]),
        (fit("--model.learning_rate", "nan"), ["model.learning_rate: expected float, not 'nan'"]),
        (fit("--model.optimizer.betas", "[0.9, .inf]"), ["model.optimizer.betas is a finite number, not inf"]),
        (
            fit("--data.augment.rand_augment", "rand-mfoo"),
            ["data.augment.rand_augment 'rand-mfoo'"],
        ),
        (
            fit("--data.augment", "null"),
            ["data.augment is a group of settings"],
        ),
        (fit("--model.eps", "1e-6"), ["model.eps is named model.optimizer.eps now"]),
        (fit("--model.optimizer", "sgd"), ["model.optimizer is named model.optimizer.name now"]),
        (fit("--data.flip", "0.5"), ["data.flip is named data.augment.flip now"]),
        (fit("--data.folds", "5"), ["data.folds is named data.cross_validation.folds now"]),
        (fit("--ckpt_path", "any.ckpt"), ["fit trains from the start and takes no --ckpt_path"]),
        (fit(subcommand="validate"), ["stage 'final' has no val", "validate with --data.stage select"]),
        (fit(subcommand="validate", data__stage="select"), ["validate needs --ckpt_path runs/…/checkpoints/last.ckpt"]),
        (fit(subcommand="test"), ["test needs --ckpt_path runs/…/checkpoints/last.ckpt"]),
        (fit("--ckpt_path", "gone.ckpt", subcommand="test"), ["no checkpoint 'gone.ckpt'", "runs/"]),
        (fit("--ckpt_path", "best", subcommand="test"), ["no checkpoint 'best'"]),
        (fit("--ckpt_path", "x", subcommand="test", data__stage="select"), ["stage 'select' has no test"]),
        (fit(model__checkpoint="embeded"), ["unknown checkpoint 'embeded'; did you mean 'embedded'?"]),
        (["tasks", "vtab/cifr"], ["unknown task 'vtab/cifr'; did you mean 'vtab/cifar'?"]),
        (["tasks", "vtb"], ["unknown suite 'vtb'; did you mean 'vtab'?"]),
        (["tasks", "--all"], ["unknown argument '--all'", "(`svp-bench tasks --help` lists all)"]),
        (["table", "--suit=demo"], ["unknown argument '--suit'; did you mean '--suite'?"]),
        (["predict", "--chkpt", "x", "--images", "y"], ["unknown argument '--chkpt'; did you mean '--ckpt'?"]),
        (["data", "draw", "vtab/cifar", "--rot", "new"], ["unknown argument '--rot'; did you mean '--root'?"]),
        (["sweep", "--suit", "demo", "--methods", "svp"], ["unknown argument '--suit'; did you mean '--suite'?"]),
        (["tune", "--tsk", "demo/count"], ["unknown argument '--tsk'; did you mean '--task'?"]),
        (["rerun", "--runs_rot", "x", "record.json"], ["unknown argument '--runs_rot'; did you mean '--runs_root'?"]),
        (["methods", "lineer"], ["unknown method 'lineer'; did you mean 'linear'?"]),
        (["table", "--suite", "vtb"], ["unknown suite 'vtb'; did you mean 'vtab'?"]),
        (["data"], ["no action: give status or prepare or verify or weights or cache or draw"]),
        (["data", "verfy"], ["unknown action 'verfy'; did you mean 'verify'?"]),
        (["data", "draw", "vtab/cifr", "--root", "new"], ["unknown task 'vtab/cifr'"]),
        (["data", "draw", "demo/digits", "--root", "new"], ["demo/digits is read by 'digits'"]),
        (["predict"], ["the following arguments are required: --ckpt, --images"]),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) and " " in value[0] else "",
)
def test_wrong_usage_is_one_line_and_status_2(argv: list[str], words: list[str], shared: Path) -> None:
    refused(argv, 2, *words)


@pytest.mark.parametrize("flag", ["--model.head_hidden", "--data.image_size"])
def test_a_model_that_no_memory_holds_is_one_line(flag: str, shared: Path) -> None:
    size = {"--model.head_hidden": "1000000000000", "--data.image_size": "30000000"}[flag]
    line = assert_error(command(*fit(flag, size)), 1)
    assert "does not fit into memory" in line
    assert flag.removeprefix("--") in line


def test_no_command_shows_the_help() -> None:
    outcome = command()
    assert outcome.status == 2
    assert outcome.out.startswith("usage: svp-bench COMMAND")


# ---- config files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model:\n  learing_rate: 1",
            "more.yaml:2: unknown config key 'model.learing_rate'; did you mean 'model.learning_rate'?",
        ),
        (
            "trainer:\n  max_epoch: 1",
            "more.yaml:2: unknown config key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?",
        ),
        (
            "\n\nmodle:\n  backbone: x",
            "more.yaml:4: unknown config key 'modle.backbone'; did you mean 'model.backbone'?",
        ),
        ("optimizer: {lr: 1}", "more.yaml:1: unknown config key 'optimizer"),
        ("config: other.yaml", "more.yaml:1: unknown config key 'config'"),
        (
            "model:\n  method:\n    init_args:\n      hiden_dim: 1",
            "more.yaml:4: unknown argument of the method svp 'hiden_dim'",
        ),
        (
            "model:\n  method:\n    hidden_dim: 1",
            "more.yaml:3: model.method.hidden_dim belongs below model.method.init_args",
        ),
        ("model:\n  method: linaer", "unknown method 'linaer'; did you mean 'linear'?"),
        ("method: [linear, 3]", "more.yaml:1: method is a method's name or a list of names, not "),
        ("model:\n  method:", "more.yaml:2: model.method is a method's name or a list of names, not empty"),
        (
            "model:\n  num_classes: 3",
            "more.yaml:2: model.num_classes is not set by hand: it follows from the task's card",
        ),
        ("model:", "more.yaml:1: model is a mapping of keys, not empty; leave it out if nothing is set"),
        ("trainer: none", "more.yaml:1: trainer is a mapping of keys, not 'none'"),
        ("seed_everything: abc", "more.yaml:1: seed_everything: expected int, not 'abc'"),
        ("seed_everything: -3", "more.yaml:1: seed_everything is a whole number of 0 to 4294967295, not -3"),
        ("results_root:", "more.yaml:1: results_root may not be null"),
        ("model:\n  learning_rate: 1e-3x", "more.yaml:2: model.learning_rate: expected float, not '1e-3x'"),
        ("model:\n  learning_rate: yes", "more.yaml:2: model.learning_rate: expected float, not 'True'"),
        ("model:\n  learning_rate:", "more.yaml:2: model.learning_rate may not be null; leave it out for its default"),
        ("model:\n  learning_rate: {a: 1}", "more.yaml:2: unknown config key 'model.learning_rate.a'"),
        ("data:\n  num_workers:", "more.yaml:2: data.num_workers may not be null"),
        (
            "model:\n  method:\n    init_args:\n      hidden_dim:",
            "more.yaml:4: model.method.init_args.hidden_dim may not be null",
        ),
        ("data: {batch_size: 4}\ndata: {batch_size: 5}", "more.yaml:2: key 'data' is given twice (first on line 1)"),
        ("data: !!python/object/apply:os.system ['touch marker']", "more.yaml:1: tag "),
        ("data: [", "more.yaml:2: not YAML"),
        ("- data", "more.yaml:1: a config is a mapping of keys, not a list"),
        ("model:\n  learning_rate: .nan", "more.yaml:2: model.learning_rate is a finite number, not nan"),
        ("model:\n  weight_decay: -1.0", "more.yaml:2: model.weight_decay -1 is out of range, allowed: 0 and above"),
        ("data:\n  augment:\n    flip: 2.0", "more.yaml:3: data.augment.flip 2 is out of range, allowed: 0 to 1"),
        ("trainer:\n  accumulate_grad_batches: 0", "more.yaml:2: trainer.accumulate_grad_batches is at least 1, not 0"),
        ("trainer:\n  gradient_clip_val: -0.5", "more.yaml:2: trainer.gradient_clip_val is at least 0"),
        ("", "more.yaml:1: the file is empty"),
        ("# nothing\n", "more.yaml:1: the file is empty"),
    ],
)
def test_a_mistake_in_a_config_names_file_and_line(text: str, words: str, shared: Path) -> None:
    Path("more.yaml").write_text(f"{text}\n" if text else "")
    argv = small("--config", "more.yaml", data__batch_size=None)
    if "results_root" in text:
        argv = small("--config", "more.yaml")
    refused(argv, 2, words)


def test_a_method_file_without_a_method_is_refused(place: Path) -> None:
    Path("mine.yaml").write_text("model:\n  learning_rate: 1.0\n")
    refused(small("--method", "mine.yaml"), 2, "mine.yaml: a method file must set model.method.class_path")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("svp_bench.methods.svp.Nope", "has no attribute 'Nope'"),
        ("collections.OrderedDict", "does not correspond to a subclass of Method"),
        ("Nope", "mine.yaml:3: "),
    ],
)
def test_a_class_that_is_no_method_is_refused(target: str, words: str, place: Path) -> None:
    Path("mine.yaml").write_text(f"model:\n  method:\n    class_path: {target}\n")
    refused(small("--method", "mine.yaml"), 2, "mine.yaml:3: ", words)


# ---- data


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def line_of_test() -> str:
    """The line of `TEST_IMAGE`, spelled otherwise."""
    lines = Path("data/cifar/test.txt").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("images/test/000003.jpg ")]
    return line.replace("images/", "images//")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda: Path("data").rename("gone"),
            ["no data of vtab/cifar: none of ", "--data.root is data", "svp-bench data draw"],
        ),
        (lambda: Path("data/cifar/test.txt").unlink(), ["has no list 'test' (test.txt); it has: "]),
        (lambda: LIST.unlink(), ["has no list 'train800val200'"]),
        (
            lambda: IMAGE.unlink(),
            ["1 of the 17 images of ", "train800val200.txt are missing, the first is ", IMAGE.name],
        ),
        (lambda: TEST_IMAGE.unlink(), ["1 of the 9 images of ", "test.txt are missing"]),
        (lambda: change(LIST, "000002.jpg ", "000002.jpg,"), ["train800val200.txt:3: found ", "expected `path label`"]),
        (
            lambda: change(LIST, "000002.jpg ", "000002.jpg 99"),
            ["train800val200.txt:3: label 99", "100 classes (0..99)"],
        ),
        (lambda: change(LIST, "000002.jpg ", "000002.jpg -"), ["train800val200.txt:3: label -", "is out of range"]),
        (lambda: change(LIST, "images/", "../images/"), ["train800val200.txt:1: ", "leads out of the task's folder"]),
        (lambda: LIST.write_text(""), ["train800val200.txt: the list is empty"]),
        (
            lambda: LIST.write_text(f"{LIST.read_text()}./{line_of_test()}\n"),
            ["test.txt: 1 of its images are also in ", "which must not see them; the first is ", str(TEST_IMAGE)],
        ),
        (lambda: truncate(IMAGE), [f"{IMAGE}: not a readable image"]),
        (lambda: truncate(TEST_IMAGE), [f"{TEST_IMAGE}: not a readable image"]),
        (
            lambda: TEST_IMAGE.write_text("hello"),
            [f"{TEST_IMAGE}: not a readable image: no known image format"],
        ),
        (lambda: IMAGE.write_bytes(b""), [f"{IMAGE}: not a readable image: an empty file"]),
    ],
)
def test_broken_data_stop_a_run_before_it_begins(damage: Callable[[], Any], words: list[str], place: Path) -> None:
    damage()
    refused(small(), 1, *words)


def test_an_image_that_is_damaged_inside_stops_a_run_before_it_begins(place: Path) -> None:
    """Both ends of the file are right, the middle is not."""
    noise = Image.effect_noise((64, 64), 90)
    noise.save(TEST_IMAGE.with_suffix(".png"))
    raw = bytearray(TEST_IMAGE.with_suffix(".png").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 300] = b"\0" * 300
    TEST_IMAGE.write_bytes(raw)
    refused(small("--method", "linear"), 1, f"{TEST_IMAGE}: not a readable image: ")


def test_a_val_without_images_stops_a_run_and_is_reported_by_data_verify(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tenth of nine official training images is none."""
    card = load_task("fgvc/stanford_cars")
    write_native(card, place / "data", {"train": 6, "val": 3, "test": 4}, 16)
    config = f"configs/{card.name}.yaml"
    told = refused(small(config=config, data__stage="select"), 1, "has no image for the list 'val'; get the data")
    assert "Stanford-cars" in told
    checked = command("data", "verify", card.name, "--root", "data")
    assert "has no image for the list 'val'" in assert_error(checked, 1)
    assert run(*small("--method", "linear", config=config)).record["status"] == "complete"  # final does not need it


def test_data_verify_reports_each_task(place: Path) -> None:
    truncate(IMAGE)
    outcome = command("data", "verify", TASK, "vtab/dtd", "--root", "data")
    assert outcome.status == 1
    rows = outcome.err.splitlines()
    assert [row.split()[0] for row in rows] == ["vtab/cifar:", "vtab/dtd:"]
    assert "not a readable image" in rows[0]
    assert "no data of vtab/dtd" in rows[1]


# ---- checkpoints


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch marker",)


def save(name: str, content: Any) -> str:
    import torch

    torch.save(content, name)
    return name


def other_backbone() -> str:
    import timm

    import svp_bench.models  # noqa: F401

    return save("nano.pth", timm.create_model("vim_nano_patch8_64").state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_backbone, [f"nano.pth: does not fit {BACKBONE}", "in the file", "in the model"]),
        (lambda: save("evil.pth", {"model": {"a": _Evil()}}), ["evil.pth: refused", "nothing of it was run"]),
        (lambda: "gone.pth", ["no checkpoint file 'gone.pth'; --model.checkpoint is hub, embedded, none or PATH"]),
        (lambda: "embedded", [f"no weights of {BACKBONE} are embedded in this package"]),
        (lambda: "hub", [f"no published checkpoint of {BACKBONE} is known; use --model.checkpoint PATH"]),
        (lambda: save("odd.pth", [1, 2]), ["odd.pth: holds list, not a state dict"]),
        (lambda: str(TEST_IMAGE), [f"{TEST_IMAGE}: "]),
    ],
)
def test_weights_that_do_not_fit_are_refused(make: Callable[[], str], words: list[str], place: Path) -> None:
    refused(small(model__checkpoint=make()), 1, *words)
    assert not Path("marker").exists()


@pytest.mark.parametrize("subcommand", ["test", "validate"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: save("evil.ckpt", {"state_dict": {"a": _Evil()}, "svp_bench": {}}), ["evil.ckpt: refused"]),
        (
            other_backbone,
            ["nano.pth: not a checkpoint of svp-bench; weights of a backbone alone go to --model.checkpoint PATH"],
        ),
        (lambda: str(TEST_IMAGE), [f"{TEST_IMAGE}: "]),
    ],
)
def test_a_file_that_is_no_run_of_ours_is_refused(
    make: Callable[[], str], words: list[str], subcommand: str, place: Path
) -> None:
    stage = "final" if subcommand == "test" else "select"
    refused(small("--ckpt_path", make(), subcommand=subcommand, data__stage=stage), 1, *words)
    assert not Path("marker").exists()


def test_without_network_the_hub_tells_what_to_do(place: Path, hub_offline: Path) -> None:
    argv = ["fit", "--config", "configs/vtab/cifar.yaml", "--data.root", "data"]
    text = refused(
        argv, 1, "cannot get the weights of vim_small_patch16_224: hustvl/Vim-small-midclstok", "HF_HUB_OFFLINE"
    )
    assert "--model.checkpoint PATH" in text
    assert "--model.backbone vim_nano_patch8_64 --model.checkpoint embedded" in text
    assert "--model.checkpoint none for random weights" in text


def test_without_data_and_weights_the_data_come_first(
    place: Path, hub_offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SVP_BENCH_DATA", raising=False)
    Path("data").rename("gone")
    refused(["fit", "--config", "configs/vtab/cifar.yaml"], 1, "no data of vtab/cifar", "the default data root is data")


# ---- folders to write to


@pytest.mark.parametrize(
    ("file", "flag"),
    [
        ("results", "--results_root"),
        ("results/records", "--results_root"),
        (f"results/records/{TASK}", "--results_root"),
        ("runs", "--runs_root"),
        ("runs/vtab", "--runs_root"),
    ],
)
def test_a_file_in_the_way_of_a_folder_stops_a_run_before_it_begins(file: str, flag: str, place: Path) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("in the way")
    refused(small(), 1, f"{place / file} is not a folder; choose another folder with {flag} DIR")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("flag", ["--results_root", "--runs_root"])
def test_a_folder_without_permission_stops_a_run_before_it_begins(flag: str, place: Path) -> None:
    Path("locked").mkdir(mode=0o500)
    refused(small(flag, "locked/inside"), 1, "locked is not writable; choose another folder with", flag)


def test_a_folder_that_turns_out_read_only_stops_a_run_before_it_begins(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *rest: Path(path) != place and real(path, *rest))
    refused(small(), 1, f"{place} is not writable; choose another folder with --results_root DIR")


def test_a_results_folder_that_fills_up_leaves_no_half_record(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = command(*small("--method", "linear"))
    assert "No space left on device" in assert_error(outcome, 1)
    assert not [name for name in files() if name.endswith((".json", ".tmp"))]


# ---- records and tables


def test_a_broken_record_is_listed_and_does_not_stop_the_table(place: Path) -> None:
    good = run(*small("--method", "linear"))
    broken = good.record_path.with_name("broken.json")
    broken.write_text(json.dumps({**good.record, "top_1": 3}))
    out = run("table").out
    assert "1/19" in out
    assert "1 unreadable" in out
    (page,) = Path("results/tables").glob("*.md")
    assert "broken.json" in page.read_text()
