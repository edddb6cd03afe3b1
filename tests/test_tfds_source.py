"""The source tfds, against data sets that TensorFlow Datasets itself wrote to a temporary folder."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svp_bench.core.errors import CardError, DataError, SvpBenchError, UnavailableError, UsageError
from svp_bench.data.manifest import read_manifest
from svp_bench.data.sources import inspect, open_source
from svp_bench.data.split_files import read_list
from svp_bench.prepare import labels, tfds_source
from svp_bench.prepare.known import known_sources
from svp_bench.prepare.labels import RULES, label_of
from svp_bench.prepare.sources import Request, get_source, prepare
from svp_bench.tasks.cards import load_suite, load_task

pytest.importorskip("tensorflow_datasets", reason="needs the extra vtab")
pytest.importorskip("array_record", reason="its wheels are for Linux and macOS")
google_crc32c = pytest.importorskip("google_crc32c", reason="needs the extra vtab")

from tfds_builders import F, encoded, pixels, simple, stored_order  # noqa: E402
from tfds_builders import prepare as prepare_tfds  # noqa: E402

VTAB = load_suite("vtab")
SIMPLE = {"image": F.Image(), "label": F.ClassLabel(num_classes=100)}


@pytest.fixture(autouse=True)
def no_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.delenv("SVP_BENCH_DATA", raising=False)


def request_of(location: Path | str | None, tmp_path: Path, *, offline: bool = True) -> Request:
    place = None if location is None else str(location)
    return Request(place, None, offline, (), 2, tmp_path / "downloads", lambda line: None)


def build(task: str, location: Path | None, tmp_path: Path, **options: Any) -> Path:
    card = load_task(task)
    prepare(card, VTAB, "tfds", request_of(location, tmp_path), tmp_path / "data", **options)
    return tmp_path / "data" / "vtab-1k" / card.folder


def lines(folder: Path, split: str, classes: int) -> list[tuple[bytes, int]]:
    images = read_list(folder / f"{split}.txt", classes)
    return [
        ((folder / path).read_bytes(), label) for path, label in zip(images.paths, images.labels.tolist(), strict=True)
    ]


# ---- splits


def test_splits_are_the_first_images_in_stored_order(tmp_path: Path) -> None:
    source = prepare_tfds(
        tmp_path / "tfds", "cifar100", "3.0.2", SIMPLE, {"train": simple(2000, 100), "test": simple(30, 100)}
    )
    folder = build("vtab/cifar", tmp_path / "tfds", tmp_path)
    train, val, test = (stored_order(source, part) for part in ("train[:90%]", "train[90%:]", "test"))
    assert lines(folder, "train800", 100) == train[:800]
    assert lines(folder, "val200", 100) == val[:200]
    assert lines(folder, "train800val200", 100) == train[:800] + val[:200]
    assert lines(folder, "test", 100) == test
    images = [path for path in folder.rglob("*") if path.parent.parent.name == "images"]
    assert len(images) == 1030  # no image is stored twice
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest.source, manifest.variant, manifest.task) == ("tfds", "tfds", "vtab/cifar")
    assert manifest.origin["builder"] == "cifar100"
    assert (manifest.origin["version"], manifest.origin["format"]) == ("3.0.2", "array_record")


def test_the_pixels_are_those_of_the_builder(tmp_path: Path) -> None:
    examples = simple(1000, 100)
    prepare_tfds(tmp_path / "tfds", "cifar100", "3.0.2", SIMPLE, {"train": examples * 3, "test": simple(7, 100)})
    folder = build("vtab/cifar", tmp_path / "tfds", tmp_path)
    card = load_task("vtab/cifar")
    found = open_source(card, tmp_path / "data").get("test")
    expected = Counter(pixels(number).tobytes() for number in range(7))
    assert Counter(np.asarray(found.load(index)).tobytes() for index in range(7)) == expected
    assert (folder / "images" / "test" / "000000.png").is_file()


def test_val_of_smallnorb_is_the_first_half_of_the_test_split(tmp_path: Path) -> None:
    features = {
        "image": F.Image(shape=(6, 6, 1)),
        "image2": F.Image(shape=(6, 6, 1)),
        "label_azimuth": F.ClassLabel(num_classes=18),
        "label_elevation": F.ClassLabel(num_classes=9),
    }

    def examples(count: int, seed: int) -> list[dict[str, Any]]:
        return [
            {
                "image": encoded(pixels(seed + number, channels=1)),
                "image2": encoded(pixels(0, channels=1)),
                "label_azimuth": number % 18,
                "label_elevation": number % 9,
            }
            for number in range(count)
        ]

    source = prepare_tfds(
        tmp_path / "tfds", "smallnorb", "2.0.0", features, {"train": examples(900, 0), "test": examples(500, 5000)}
    )
    folder = build("vtab/smallnorb_azi", tmp_path / "tfds", tmp_path)
    test = stored_order(source, "test", "label_azimuth")
    assert lines(folder, "val200", 18) == test[:200]
    assert lines(folder, "test", 18) == test[250:]
    assert open_source(load_task("vtab/smallnorb_azi"), tmp_path / "data").get("test").load(0).mode == "RGB"
    elevation = build("vtab/smallnorb_ele", tmp_path / "tfds", tmp_path)
    assert lines(elevation, "test", 9) == stored_order(source, "test", "label_elevation")[250:]


def test_dsprites_are_black_and_white(tmp_path: Path) -> None:
    features = {
        "image": F.Image(shape=(8, 8, 1)),
        "label_x_position": F.ClassLabel(num_classes=32),
        "label_orientation": F.ClassLabel(num_classes=40),
    }

    def bits(number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 2, (8, 8, 1), dtype=np.uint8)

    examples = [
        {"image": encoded(bits(number)), "label_x_position": number % 32, "label_orientation": number % 40}
        for number in range(2500)
    ]
    source = prepare_tfds(tmp_path / "tfds", "dsprites", "2.0.0", features, {"train": examples})
    folder = build("vtab/dsprites_ori", tmp_path / "tfds", tmp_path)
    stored = stored_order(source, "train[80%:90%]", "label_orientation")[:200]
    written = lines(folder, "val200", 16)
    for (before, value), (after, label) in zip(stored, written, strict=True):
        assert label == value * 2 // 5
        original, copy = (np.asarray(Image.open(io.BytesIO(one))) for one in (before, after))
        assert np.array_equal(copy, original * 255)
    assert len(lines(folder, "test", 16)) == 250


def test_jpeg_files_are_not_encoded_again(tmp_path: Path) -> None:
    examples = [{"image": encoded(pixels(number), "JPEG"), "label": number % 6} for number in range(900)]
    features = {"image": F.Image(encoding_format="jpeg"), "label": F.ClassLabel(num_classes=6)}
    source = prepare_tfds(
        tmp_path / "tfds",
        "dmlab",
        "2.0.1",
        features,
        {"train": examples, "validation": examples[:250], "test": examples[:9]},
    )
    folder = build("vtab/dmlab", tmp_path / "tfds", tmp_path)
    assert lines(folder, "test", 6) == stored_order(source, "test")
    assert (folder / "images" / "test" / "000000.jpg").is_file()


def test_kitti_with_and_without_vehicles(tmp_path: Path) -> None:
    objects = {"type": F.ClassLabel(num_classes=8), "location": F.Tensor(shape=(3,), dtype=np.float32)}
    features = {"image": F.Image(), "objects": F.Sequence(objects)}

    def example(number: int, things: list[tuple[int, float]]) -> dict[str, Any]:
        rows = [{"type": kind, "location": np.array([0, 0, z], np.float32)} for kind, z in things]
        return {"image": encoded(pixels(number)), "objects": rows}

    scenes = [
        ([(0, 7.5), (3, 1.0)], 0),
        ([(0, 8.0), (1, 30.0)], 0),  # on the edge: the nearer bin
        ([(2, 8.5)], 1),
        ([(0, 25.0), (1, 21.0)], 2),
        ([(3, 2.0), (7, 4.0)], 3),
        ([(3, 2.0)], 3),
    ]
    many = [example(number, scenes[number % 6][0]) for number in range(900)]
    source = prepare_tfds(
        tmp_path / "tfds", "kitti", "3.2.0", features, {"train": many, "validation": many[:200], "test": many[:6]}
    )
    folder = build("vtab/kitti", tmp_path / "tfds", tmp_path)
    label_of_image = {encoded(pixels(number)): scenes[number % 6][1] for number in range(900)}
    for split in ("train800", "val200", "test"):
        assert all(label_of_image[image] == label for image, label in lines(folder, split, 4))
    assert source.name == "3.2.0"


# ---- label rules, against the expressions of the paper's code in NumPy


@given(st.lists(st.floats(-50, 120, width=32), min_size=1, max_size=6))
def test_the_depth_bin_is_the_last_edge_below(depths: list[float]) -> None:
    edges = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])
    below = np.where((edges - min(depths)) < 0)[0]
    example = {"objects": {"pixel_coords": np.array([[1, 2, z] for z in depths], np.float32)}}
    if below.size:
        assert label_of(example, "nearest_object_depth") == below.max()
    else:
        with pytest.raises(ValueError, match="not above"):
            label_of(example, "nearest_object_depth")


@given(st.lists(st.tuples(st.integers(0, 7), st.floats(-20, 200, width=32)), max_size=6))
def test_the_distance_bin_is_that_of_the_nearest_vehicle(things: list[tuple[int, float]]) -> None:
    example = {
        "objects": {
            "type": np.array([kind for kind, _ in things], np.int64),
            "location": np.array([[0, 0, z] for _, z in things], np.float32).reshape(-1, 3),
        }
    }
    nearest = min([*(z for kind, z in things if kind < 3), 1000.0])
    expected = 3 if nearest > 999 else 2 if nearest > 20 else 1 if nearest > 8 else 0
    assert label_of(example, "nearest_vehicle_distance") == expected


def test_positions_and_orientations_in_16_bins() -> None:
    positions = [label_of({"label_x_position": value}, "x_position_in_16") for value in range(32)]
    assert positions == [value for value in range(16) for _ in range(2)]
    sizes = Counter(label_of({"label_orientation": value}, "orientation_in_16") for value in range(40))
    assert [sizes[label] for label in range(16)] == [3, 2] * 8
    assert label_of({"objects": {"size": np.zeros(10)}}, "object_count") == 7


def test_each_rule_is_used_by_a_task_and_each_label_is_known() -> None:
    used = {spec.label for name in VTAB.tasks if (spec := known_sources(load_task(name), VTAB).tfds)}
    assert {*RULES} <= used
    assert used - {*RULES} == {"label", "label_azimuth", "label_elevation"}
    assert all(rule.__doc__ for rule in labels.RULES.values())


# ---- TFRecord, the default format


def as_tfrecord(folder: Path, shards: int = 3) -> None:
    """Rewrite a prepared data set as TFRecord files, several shards a split."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    parts = {name: [*builder.as_data_source(split=name, deserialize_method=raw)] for name in builder.info.splits}
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        records = parts[split["name"]]
        cuts = [round(position * len(records) / shards) for position in range(shards + 1)]
        split["shardLengths"] = [str(end - start) for start, end in itertools.pairwise(cuts)]
        for shard, (start, end) in enumerate(itertools.pairwise(cuts)):
            name = f"{info['name']}-{split['name']}.tfrecord-{shard:05d}-of-{shards:05d}"
            (folder / name).write_bytes(b"".join(map(framed, records[start:end])))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for path in folder.glob("*.array_record-*"):
        path.unlink()


def framed(record: bytes) -> bytes:
    def masked(content: bytes) -> bytes:
        crc = google_crc32c.value(content)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(record))
    return length + masked(length) + record + masked(record)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A prepared copy of cifar100."""
    splits = {"train": simple(2000, 100), "test": simple(30, 100)}
    return prepare_tfds(tmp_path / "tfds", "cifar100", "3.0.2", SIMPLE, splits)


def test_tfrecord_files_are_read_without_tensorflow(small: Path, tmp_path: Path) -> None:
    build("vtab/cifar", small, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.txt")}
    digest = read_manifest(tmp_path / "data" / "vtab-1k" / "cifar")
    as_tfrecord(small)
    folder = build("vtab/cifar", small, tmp_path, replace=True)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert digest is not None
    assert manifest.digest == digest.digest
    assert manifest.origin["format"] == "tfrecord"
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.txt")} == before


@pytest.mark.parametrize(
    ("at", "message"), [(3, "damaged length"), (40, "another checksum"), (-1, "cut off"), (None, "missing")]
)
def test_a_damaged_record_is_named(small: Path, tmp_path: Path, at: int | None, message: str) -> None:
    as_tfrecord(small, shards=1)
    path = small / "cifar100-test.tfrecord-00000-of-00001"
    content = bytearray(path.read_bytes())
    if at is None:
        content = content[:0]
    elif at < 0:
        content = content[:at]
    else:
        content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}.*record .*{message}"):
        build("vtab/cifar", small, tmp_path)
    assert not (tmp_path / "data" / "vtab-1k" / "cifar").exists()


# ---- versions and places


def test_the_preferred_version_is_taken_and_another_builder_refused(tmp_path: Path) -> None:
    splits = {"train": simple(900, 47), "validation": simple(250, 47), "test": simple(20, 47)}
    folders = {
        version: prepare_tfds(tmp_path / "tfds", "dtd", version, SIMPLE, splits)
        for version in ("3.0.0", "3.0.1", "3.10.0", "2.0.0")
    }
    source, card = get_source("tfds"), load_task("vtab/dtd")
    plan = source.plan(card, VTAB, request_of(tmp_path / "tfds", tmp_path))
    assert plan["version"] == "3.0.1"
    assert source.plan(card, VTAB, request_of(folders["3.0.0"], tmp_path))["version"] == "3.0.0"
    (folders["3.0.1"] / "dataset_info.json").unlink()
    assert source.plan(card, VTAB, request_of(tmp_path / "tfds", tmp_path))["version"] == "3.10.0"
    with pytest.raises(DataError, match=r"dtd:2\.0\.0, needed: dtd, version 3\.0\.1 or 3\.\*\.\*"):
        source.plan(card, VTAB, request_of(folders["2.0.0"], tmp_path))
    with pytest.raises(DataError, match=r"holds dtd:3\.0\.0, needed: cifar100"):
        source.plan(load_task("vtab/cifar"), VTAB, request_of(folders["3.0.0"], tmp_path))
    with pytest.raises(DataError, match=r"no prepared version of kitti, needed: 3\.2\.0"):
        source.plan(load_task("vtab/kitti"), VTAB, request_of(tmp_path / "tfds", tmp_path))


def test_the_default_folder_is_found(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert (build("vtab/cifar", None, tmp_path) / "test.txt").is_file()


def test_probing_states_versions_and_counts(small: Path, tmp_path: Path) -> None:
    source = get_source("tfds")
    line = source.probe(load_task("vtab/cifar"), VTAB, request_of(small, tmp_path))
    assert "cifar100:3.0.2" in line
    assert "train 2000" in line
    assert "test 30" in line
    line = source.probe(load_task("vtab/eurosat"), VTAB, request_of(None, tmp_path, offline=False))
    assert "eurosat/rgb:2.0.0 is not prepared" in line


def test_a_config_is_part_of_the_folder(tmp_path: Path) -> None:
    splits = {"train": simple(2000, 10)}
    features = {"image": F.Image(), "label": F.ClassLabel(num_classes=10)}
    source = prepare_tfds(tmp_path / "tfds", "eurosat", "2.0.0", features, splits, config="rgb")
    assert source == tmp_path / "tfds" / "eurosat" / "rgb" / "2.0.0"
    folder = build("vtab/eurosat", tmp_path / "tfds", tmp_path)
    assert len(lines(folder, "test", 10)) == 400
    assert get_source("tfds").plan(load_task("vtab/eurosat"), VTAB, request_of(source, tmp_path))["version"] == "2.0.0"


# ---- errors


def test_offline_without_prepared_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar100 is not prepared.*--offline.*--from") as caught:
        build("vtab/cifar", None, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_builder_that_cannot_be_built_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    card = load_task("vtab/resisc45")  # its archive is fetched by hand
    with pytest.raises(SvpBenchError, match="other sources") as caught:
        prepare(card, VTAB, "tfds", request_of(None, tmp_path, offline=False), tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "vtab-1k" / "resisc45").exists()


def test_other_suites_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no builder for fgvc/cub"):
        get_source("tfds").plan(load_task("fgvc/cub"), load_suite("fgvc"), request_of(None, tmp_path))


def test_too_few_images_and_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    few = {"train": simple(500, 47), "validation": simple(250, 47), "test": simple(20, 47)}
    few_folder = prepare_tfds(tmp_path / "few", "dtd", "3.0.1", SIMPLE, few)
    with pytest.raises(DataError, match="'train' has 500 images, needed: 800"):
        build("vtab/dtd", few_folder, tmp_path)
    wide = {"train": simple(900, 47), "validation": simple(250, 60), "test": simple(20, 47)}
    wide_folder = prepare_tfds(tmp_path / "wide", "dtd", "3.0.1", SIMPLE, wide)
    with pytest.raises(DataError, match=r"'validation' has label \d+, vtab/dtd has 0\.\.46"):
        build("vtab/dtd", wide_folder, tmp_path)
    assert not (tmp_path / "data" / "vtab-1k" / "dtd").exists()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(UnavailableError, match=r"svp-bench\[vtab\]"):
        tfds_source._tfds()
    assert os.listdir(tmp_path) == []


def test_an_interrupted_build_continues(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build("vtab/cifar", small, tmp_path)
    expected = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.suffix == ".png"}
    written: list[str] = []
    original = tfds_source.Stage.write

    def write(self: Any, path: str, content: bytes) -> None:
        if len(written) == 500:
            raise KeyboardInterrupt
        written.append(path)
        original(self, path, content)

    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(tfds_source.Stage, "write", write)
        with pytest.raises(KeyboardInterrupt):
            build("vtab/cifar", small, other)
    assert not (other / "data" / "vtab-1k" / "cifar").exists()
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(tfds_source.Stage, "write", lambda self, path, content: (written.append(path), original(self, path, content))[1])  # fmt: skip  # noqa: E501
        again = build("vtab/cifar", small, other)
    assert {
        path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.suffix == ".png"
    } == expected
    assert len([path for path in written if path.endswith(".png")]) == len(expected) - 500
    first, second = read_manifest(whole), read_manifest(again)
    assert first is not None
    assert second is not None
    assert first.digest == second.digest


def test_a_run_reads_the_variant(small: Path, tmp_path: Path) -> None:
    build("vtab/cifar", small, tmp_path)
    card = load_task("vtab/cifar")
    source = open_source(card, tmp_path / "data")
    report = inspect(card, source, ["train800val200", "test"])
    assert report.variant == "tfds"
    assert report.status == "different"  # 30 test images, not 10,000
    manifest = read_manifest(tmp_path / "data" / "vtab-1k" / "cifar")
    assert manifest is not None
    assert report.manifest_digest == manifest.digest


def test_a_suite_that_states_no_split_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svp_bench.prepare.known import SuiteSources

    monkeypatch.setattr(tfds_source, "suite_sources", lambda suite: SuiteSources())
    with pytest.raises(CardError, match="do not state what its split 'train800' holds"):
        build("vtab/cifar", small, tmp_path)
