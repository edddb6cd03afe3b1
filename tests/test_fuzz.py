"""Any content of a file: success, or one clear line. Never another exception, and never a wrong acceptance.

A few hundred cases run with the other tests; `make fuzz` runs 10,000 (SVP_BENCH_FUZZ: how many in all).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_files import write_json_split, write_native
from PIL import Image
from safetensors.torch import save_file
from synthetic_records import make_record

import svp_bench
from svp_bench.config.compose import compose, split_flags
from svp_bench.core.errors import SvpBenchError
from svp_bench.core.resources import configs_dir, tasks_dir
from svp_bench.data.sources import open_source
from svp_bench.data.split_files import read_list
from svp_bench.data.synthetic import draw_task
from svp_bench.models.checkpoints import load_checkpoint
from svp_bench.records.bits import unpack_bits
from svp_bench.records.digests import setting_digest
from svp_bench.records.store import read_record, read_records, write_record
from svp_bench.tasks.cards import load_protocol, load_suite, load_task

KINDS = 8  # of the properties below, which share the cases
CASES = max(10, int(os.environ.get("SVP_BENCH_FUZZ", "400")) // KINDS)
many = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
T = TypeVar("T")

ODD_TEXT = st.sampled_from(
    [
        *("", " ", "\t", "null", "~", "yes", "true", "-1", "0", "1", "1e3", "1e400", "nan", ".inf", "-.inf", "0x10"),
        *("2026-01-01", "*a", "&a b", "!!python/object:os.system x", "!!int 3", "{", "}", "[", "]", "[1, 2]", "{a: 1}"),
        *("'", '"', "a: b", "- a", "#", "|", ">", "%", "@", "é", "\u202e", "\ufeff", "\x00", "\x7f", "\U0001f40d"),
        *("9" * 400, "-" * 50, "../../etc/passwd", "/etc/passwd", "a\\b", "C:\\x", "?", ": ", "<<: {a: 1}"),
    ]
)


def accepted(work: Callable[[], T]) -> T | None:
    """The result, or None if the work was refused with one clear line."""
    try:
        return work()
    except SvpBenchError as error:
        text = str(error)
        assert text.strip(), "an empty message"
        assert len(" ".join(text.split())) < 2000, text
        assert "Traceback" not in text
        assert "object at 0x" not in text, text
        return None


@st.composite
def changed_text(draw: st.DrawFn, text: str) -> str:
    """A text with some lines dropped, doubled, moved, or with parts replaced by odd ones."""
    lines = text.split("\n")
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["drop", "double", "swap", "value", "key", "insert", "indent", "cut"]))
        line = lines[at]
        if kind == "drop" and len(lines) > 1:
            del lines[at]
        elif kind == "double":
            lines.insert(at, line)
        elif kind == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "value":
            head, colon, _ = line.partition(":")
            lines[at] = f"{head}{colon} {draw(ODD_TEXT)}"
        elif kind == "key":
            _, colon, tail = line.partition(":")
            lines[at] = f"{draw(ODD_TEXT)}{colon}{tail}"
        elif kind == "insert":
            place = draw(st.integers(0, len(line)))
            lines[at] = line[:place] + draw(ODD_TEXT) + line[place:]
        elif kind == "indent":
            lines[at] = " " * draw(st.integers(0, 5)) + line.lstrip()
        elif kind == "cut":
            lines[at] = line[: draw(st.integers(0, len(line)))]
    return "\n".join(lines)


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some flipped, a part cut out or put in, or the end missing."""
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "put", "end", "zero"]))
        if kind == "flip" and raw:
            raw[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del raw[at : at + draw(st.integers(1, 64))]
        elif kind == "put":
            raw[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "end":
            del raw[at:]
        elif kind == "zero":
            size = draw(st.integers(1, 32))
            raw[at : at + size] = bytes(len(raw[at : at + size]))
    return bytes(raw)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One for all cases of a test: each case writes its files anew."""
    place = Path(tempfile.mkdtemp())
    yield place
    shutil.rmtree(place)


# ------------------------------------------------------------------------------------------------- cards and configs


@many
@given(data=st.data())
def test_cards(folder: Path, data: st.DataObject) -> None:
    root = folder / "tasks"
    if not root.exists():
        shutil.copytree(tasks_dir(), root)
    name = data.draw(st.sampled_from(["vtab/cifar.yaml", "vtab.yaml", "protocols/vtab-final.yaml", "demo/digits.yaml"]))
    path, original = root / name, (tasks_dir() / name).read_text(encoding="utf-8")
    path.write_text(data.draw(changed_text(original)), encoding="utf-8", errors="surrogatepass")
    try:
        card = accepted(lambda: load_task(name.removesuffix(".yaml") if "/" in name else "vtab/cifar", root))
        suite = accepted(lambda: load_suite("vtab", root))
        protocol = accepted(lambda: load_protocol("vtab-final", root))
    finally:
        path.write_text(original, encoding="utf-8")
    if card is not None:
        assert card.classes >= 1
        assert all(isinstance(count, int) and count >= 0 for count in card.counts.values())
        assert f"{card.suite}/" in card.name
    if suite is not None:
        tasks = [task for group in suite.groups.values() for task in group]
        assert len(set(tasks)) == len(tasks)
    if protocol is not None:
        assert protocol.image_size >= 1
        assert protocol.stages


@many
@given(data=st.data())
def test_configs(folder: Path, data: st.DataObject) -> None:
    names = ["vtab/cifar.yaml", "method/svp.yaml", "method/vpt_deep.yaml", "base.yaml"]
    original = (configs_dir() / data.draw(st.sampled_from(names))).read_text(encoding="utf-8")
    path = folder / "more.yaml"
    path.write_text(data.draw(changed_text(original)), encoding="utf-8", errors="surrogatepass")
    argv = ["--config", "configs/vtab/cifar.yaml", "--config", str(path)]
    extra = data.draw(st.lists(st.one_of(ODD_TEXT, st.sampled_from(["--method", "--config", "--data.root", "--"]))))
    composed = accepted(lambda: compose(split_flags([*argv, *extra])))
    if composed is not None:
        json.dumps(composed.values, default=str)  # plain values: nothing was built from a tag


# ---------------------------------------------------------------------------------------------------------- the data


@many
@given(data=st.data())
def test_list_files(folder: Path, data: st.DataObject) -> None:
    text = "".join(f"images/test/{i:03d}.jpg {i % 7}\n" for i in range(12))
    path = folder / "list.txt"
    if data.draw(st.booleans()):
        path.write_text(data.draw(changed_text(text)), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(data.draw(changed_bytes(text.encode())))
    found = accepted(lambda: read_list(path, 7))
    if found is not None:
        assert len(found) == len(found.labels) > 0
        assert found.labels.min() >= 0
        assert found.labels.max() < 7
        for name in found.paths:
            assert not Path(name).is_absolute()
            assert ".." not in Path(name).parts
            assert (folder / name).resolve().is_relative_to(folder.resolve())


@many
@given(data=st.data())
def test_json_splits(folder: Path, data: st.DataObject) -> None:
    root, card = folder / "data", load_task("fgvc/cub")
    if not root.exists():
        write_json_split(card, root, {"train": 6, "val": 3, "test": 4})
    (place,) = {path.parent for path in root.rglob("train.json")}
    path = place / data.draw(st.sampled_from(["train.json", "val.json", "test.json"]))
    original = path.read_bytes()
    try:
        if data.draw(st.booleans()):
            text = original.decode().replace(", ", ",\n")
            path.write_text(data.draw(changed_text(text)), encoding="utf-8", errors="surrogatepass")
        else:
            path.write_bytes(data.draw(changed_bytes(original)))

        def read() -> Any:
            source = open_source(card, root)
            for images in source.splits.values():
                images.verify()
            return source

        source = accepted(read)
        if source is not None:
            for images in source.splits.values():
                assert len(images.labels) == 0 or 0 <= images.labels.min() <= images.labels.max() < card.classes
    finally:
        path.write_bytes(original)


@many
@given(data=st.data())
def test_own_text_files(folder: Path, data: st.DataObject) -> None:
    root, card = folder / "data", load_task("fgvc/cub")
    if not root.exists():
        write_native(card, root, {"train": 6, "val": 3, "test": 4})
        (path,) = root.rglob("images.txt")
        (path.parent / "classes.txt").write_text("".join(f"{number} {number:03d}.Bird\n" for number in range(1, 201)))
    names = ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"]
    (path,) = root.rglob(data.draw(st.sampled_from(names)))
    original = path.read_bytes()
    try:
        if data.draw(st.booleans()):
            path.write_text(data.draw(changed_text(original.decode())), encoding="utf-8", errors="surrogatepass")
        else:
            path.write_bytes(data.draw(changed_bytes(original)))
        source = accepted(lambda: open_source(card, root))
        if source is not None:
            assert not {*source.get("test").keys()} & {*source.get("trainval").keys()}
            assert source.class_names is None or len(source.class_names) == card.classes
    finally:
        path.write_bytes(original)


def encoded_image(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    if kind == "GIF":
        image = image.convert("P")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


IMAGES = {kind: encoded_image(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")}


@many
@given(data=st.data())
def test_images(folder: Path, data: st.DataObject) -> None:
    root, card = folder / "data", load_task("vtab/cifar")
    if not root.exists():
        draw_task(card, root, counts={"train800": 2, "val200": 1, "test": 1}, size=12)
    path = next(iter(sorted(root.rglob("*.jpg"))))
    kind = data.draw(st.sampled_from(sorted(IMAGES)))
    path.write_bytes(data.draw(changed_bytes(IMAGES[kind])))

    def read() -> list[Image.Image]:
        found = []
        for images in open_source(card, root).splits.values():
            images.verify()
            found += [images.load(index) for index in range(len(images.labels))]
        return found

    for image in accepted(read) or []:
        assert image.mode == "RGB"
        assert np.asarray(image).ndim == 3


# ------------------------------------------------------------------------------------------- checkpoints and records


def test_checkpoints(folder: Path) -> None:
    model = svp_bench.create_model("vim_nano_patch8_64", num_classes=3, method="linear")
    state = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, folder / "a.pth")
    save_file(state, folder / "b.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    @many
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(["a.pth", "b.safetensors"]))
        path = folder / f"changed{Path(name).suffix}"
        path.write_bytes(data.draw(changed_bytes((folder / name).read_bytes())))
        if accepted(lambda: load_checkpoint(model, path)) is None:
            after = model.state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before), "a refused file left its traces"
        else:
            model.load_state_dict(before)

    check()


@many
@given(data=st.data())
def test_records(folder: Path, data: st.DataObject) -> None:
    for old in folder.rglob("*.json"):
        old.unlink()
    path = write_record(make_record(), folder)
    original = path.read_text(encoding="utf-8")
    if data.draw(st.booleans()):
        path.write_text(data.draw(changed_text(original)), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(data.draw(changed_bytes(original.encode())))
    record = accepted(lambda: read_record(path))
    records, problems = read_records(folder)  # one bad file never stops the others
    assert len(records) + len(problems) == 1
    if record is not None:
        assert record.setting_digest == setting_digest(record.config, record.search)
        if record.metrics is not None:
            assert 0 <= record.metrics.correct <= record.metrics.count
            assert record.metrics.top1 == pytest.approx(100 * record.metrics.correct / record.metrics.count, abs=0.01)
        if record.correct is not None and record.metrics is not None:
            bits = unpack_bits(record.correct.bits, record.correct.count)
            assert int(bits.sum()) == record.metrics.correct


@many
@given(values=st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), st.lists, max_leaves=5))
def test_record_fields_of_another_kind(folder: Path, values: Any) -> None:
    """Any JSON value in the place of any field."""
    for old in folder.rglob("*.json"):
        old.unlink()
    path = write_record(make_record(), folder)
    fields = json.loads(path.read_text(encoding="utf-8"))
    for key in fields:
        path.write_text(json.dumps({**fields, key: values}), encoding="utf-8", errors="surrogatepass")
        record = accepted(lambda: read_record(path))
        assert (
            record is None
            or type(getattr(record, key)) is type(getattr(make_record(), key))
            or values is None
            or (isinstance(values, (int, float, str)) and not isinstance(values, bool))
        )
