"""Synthetic records for tests: complete and consistent, with made-up numbers."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svp_bench.records.digests import canonical_digest, config_digest, setting_digest
from svp_bench.records.record import SCHEMA, Correct, Metrics, Parameters, PerClass, Record, SearchSummary, new_run_id
from svp_bench.records.store import pack
from svp_bench.tasks.cards import load_suite, load_task

WEIGHTS = "sha256:" + "ab" * 32
LIST = "sha256:" + "cd" * 32
OTHER_LIST = "sha256:" + "ef" * 32
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"max_epochs": 100, "accelerator": "cpu", "gradient_clip_val": 5.0, "logger": True},
    "model": {
        "backbone": "vim_small_patch16_224",
        "checkpoint": "hub",
        "num_classes": 10,
        "learning_rate": 1e-3,
        "method": {"class_path": "svp_bench.methods.svp.SVP", "init_args": {"share_layers": 1, "hidden_dim": 64}},
    },
    "data": {"task": "vtab/caltech101", "root": "data", "batch_size": 32},
    "results_root": "results",
}


def make_record(
    task: str = "vtab/caltech101",
    method: str = "svp",
    seed: int = 0,
    right: int = 7,
    count: int = 10,
    changes: dict[str, Any] | None = None,
    search: SearchSummary | None = None,
    number: int = 0,
    **fields: Any,
) -> Record:
    """Return a complete final record with `right` of `count` images classified correctly.

    Args:
        task: Full name.
        method: Its name; also set in the config.
        seed: The seed.
        right: Images classified correctly.
        count: Test images.
        changes: Dotted config key → value.
        search: The search that selected values.
        number: Goes into the run id and, as minutes, into `created`.
        fields: Further fields of the record.
    """
    config = copy.deepcopy(CONFIG)
    config["data"]["task"] = task
    config["seed_everything"] = seed
    config["model"]["method"]["class_path"] = f"svp_bench.methods.{method}"
    for key, value in (changes or {}).items():
        *folders, last = key.split(".")
        node = config
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    digest = setting_digest(config, search)
    bits = np.arange(count) < right
    record = Record(
        schema=SCHEMA,
        run_id=new_run_id(method, seed, digest, entropy=number.to_bytes(4, "big")),
        created=f"2026-01-31T12:{number % 60:02d}:00+00:00",
        task=task,
        task_version=1,
        suite=task.split("/")[0],
        kind="final",
        status="complete",
        status_reason=None,
        method=method,
        method_args={"share_layers": 1, "hidden_dim": 64},
        backbone="vim_small_patch16_224",
        checkpoint="hub",
        checkpoint_digest=WEIGHTS,
        protocol="vtab-final",
        protocol_version=1,
        stage="final",
        splits={"train": "train800val200", "test": "test"},
        data_variant="card",
        data_status="as_card",
        data_notes=[],
        data_digest=LIST,
        seed=seed,
        config=config,
        config_digest=config_digest(config),
        setting_digest=digest,
        search=search,
        package_version="0.1.0",
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        libraries={"python": "3.11.9", "torch": "2.6.0"},
        scan_backend="reference",
        scan_reason="no other backend is installed",
        device="cpu",
        device_count=1,
        precision="32-true",
        metrics=Metrics(top1=100 * right / count, loss=0.75, correct=right, count=count),
        correct=Correct.of(bits, "test", LIST),
        parameters=Parameters(trainable=4_760_000, head=3_000, adapter=4_757_000, total=30_000_000),
        times={"train_seconds": 12.5, "test_seconds": 1.25},
        epochs=100,
        images_per_second=80.5,
        peak_memory_mib=None,
        checkpoint_file=f"{task}/run/last.ckpt",
    )
    return dataclasses.replace(record, **fields)


def synthetic_record(task: str = "vtab/caltech101", method: str = "svp", **fields: Any) -> Record:
    """Return a record of a run on synthetic images; see `make_record`."""
    data = {"data_variant": "synthetic", "data_status": "different", "data_digest": OTHER_LIST}
    return make_record(task, method, **{**data, "data_notes": ["the images are synthetic, not real"], **fields})


def unscored(record: Record, status: str = "unscored", reason: str | None = None) -> Record:
    """Return `record` without scores."""
    return dataclasses.replace(record, status=status, status_reason=reason, metrics=None, correct=None)


_RESOLVED: dict[str, Any] = {  # the size of the config of a run: about 2.5 KB
    "data": {
        "allow_overlap": False,
        "augment": {
            "color_jitter": 0.0,
            "crop": None,
            "crop_aspect": [0.75, 1.3333333333333333],
            "flip": 0.0,
            "mixup": 0.0,
        },
        "batch_size": 32,
        "cross_validation": {"fold": 0, "folds": None, "seed": 0},
        "drop_last": False,
        "image_size": 224,
        "num_workers": "auto",
        "stage": "final",
        "transform": {"crop_ratio": 0.875, "interpolation": "bicubic", "resize": "squash"},
    },
    "model": {
        "drop_path": 0.0,
        "ema": {"decay": None, "evaluate": False},
        "frozen_mode": "eval",
        "grad_checkpointing": False,
        "head": "fresh",
        "label_smoothing": 0.0,
        "optimizer": {"betas": [0.9, 0.999], "eps": 1e-08, "momentum": 0.9, "name": "adamw"},
        "scan_backend": "auto",
        "schedule": {
            "cooldown_epochs": 0.0,
            "cosine_start": "warmup_end",
            "interval": "step",
            "min_learning_rate": 1e-05,
        },
        "warmup_epochs": 10.0,
        "weight_decay": 0.0001,
    },
    "trainer": {
        "max_epochs": 100,
        "precision": "32-true",
        **dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches", "max_time", "profiler")),
        **dict.fromkeys(("barebones", "detect_anomaly", "deterministic", "fast_dev_run", "sync_batchnorm"), False),
        **dict.fromkeys(("enable_progress_bar", "enable_model_summary", "inference_mode", "logger"), True),
    },
}
METHODS = (
    *("linear", "full", "adapter", "bias", "lora", "offset", "svp", "vpt_deep", "vpt_shallow"),
    *(f"method_{number}" for number in range(31)),
)


def write_many(root: Path, count: int, suites: Sequence[str] = ("vtab", "fgvc", "hta"), packed: bool = False) -> int:
    """Write about `count` complete records of the tasks of `suites` below `root`; return their number.

    Up to 40 methods, five seeds and three backbones, with one bit for each image of the task's test split. Seeds of a
    cell share their config; accuracies differ by task, method and seed.
    """
    generator = np.random.default_rng(0)
    tasks = [load_task(task) for suite in suites for task in load_suite(suite).tasks]
    runs = itertools.product(range(5), ("vim_small", "vim_tiny", "vim_base"), METHODS)
    per_task = list(itertools.islice(runs, -(-count // len(tasks))))
    for task, (number, (seed, backbone, method)) in itertools.product(tasks, enumerate(per_task)):
        suite, images = load_suite(task.name.split("/")[0]), task.counts["test"]
        name = f"{backbone}_patch16_224"
        changes = {f"{group}.{key}": value for group, part in _RESOLVED.items() for key, value in part.items()}
        changes |= {"model.backbone": name}
        changes["model.num_classes"] = task.classes
        fields = {
            "backbone": name,
            "checkpoint_digest": canonical_digest(name),
            "protocol": suite.protocol,
            "task_version": task.version,
            "data_digest": canonical_digest(task.name),
        }
        record = make_record(task.name, method, seed, 0, 10, changes, number=number, **fields)
        bits = generator.random(images) < 0.6 + 0.005 * METHODS.index(method) + 0.01 * (len(task.name) % 5)
        right = int(bits.sum())
        classes = np.bincount(np.arange(images) % task.classes, minlength=task.classes)
        right_of = np.bincount(np.arange(images)[bits] % task.classes, minlength=task.classes)
        record = dataclasses.replace(
            record,
            metrics=Metrics(
                top1=100 * right / images,
                loss=0.75,
                correct=right,
                count=images,
                per_class=PerClass(tuple(right_of.tolist()), tuple(classes.tolist())),
            ),
            correct=Correct.of(bits, "test", canonical_digest(task.name)),
        )
        path = root / "records" / task.name / f"{record.run_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.text(), encoding="utf-8")
    if packed:
        for name in suites:
            pack(root, name)
    return len(tasks) * len(per_task)
