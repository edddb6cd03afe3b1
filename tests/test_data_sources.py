from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svp_bench.core.errors import CardError, DataError
from svp_bench.data import sources
from svp_bench.data.sources import FileImages, Source, in_threads, inspect, open_source
from svp_bench.data.split_files import combined_digest, read_list, split_digest
from svp_bench.data.synthetic import draw_task
from svp_bench.tasks.cards import ReaderSpec, TaskCard, load_suite, load_task

COUNTS = {"train800": 6, "val200": 3, "test": 5}
DTD = load_task("vtab/dtd")


def small(card: TaskCard = DTD, **changes: object) -> TaskCard:
    """Return a card that states what `synthetic` holds."""
    return replace(card, counts={"train800": 6, "val200": 3, "train800val200": 9, "test": 5}, **changes)  # type: ignore[arg-type]


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    folder = draw_task(DTD, tmp_path, counts=COUNTS, size=16)
    (folder / "SYNTHETIC.txt").unlink()  # as if they were real
    return folder


def images(folder: Path, name: str = "train800") -> FileImages:
    return FileImages(folder, name, read_list(folder / f"{name}.txt", DTD.classes))


# --- lists -----------------------------------------------------------------------------------------------------------


def test_the_reader_lists_offers_labels_digests_and_images(synthetic: Path) -> None:
    source = open_source(DTD, synthetic.parent)
    assert list(source.splits) == list(DTD.counts)
    assert source.origin == str(synthetic)
    train = source.get("train800")
    lines = read_list(synthetic / "train800.txt", DTD.classes)
    assert train.labels.tolist() == lines.labels.tolist()
    assert train.digest == split_digest("train800", lines)
    assert source.digest == combined_digest({name: source.get(name).digest for name in DTD.counts})
    image = train.load(2)
    assert image.mode == "RGB"
    with Image.open(synthetic / lines.paths[2]) as stored:
        assert np.array_equal(np.asarray(image), np.asarray(stored.convert("RGB")))
    assert train.where(2) == str(synthetic / "images/train800/000002.jpg")


def test_a_grey_file_comes_back_in_rgb(synthetic: Path) -> None:
    Image.new("L", (4, 4), 9).save(synthetic / "images/test/000000.jpg")
    image = open_source(DTD, synthetic.parent).get("test").load(0)
    assert image.mode == "RGB"


def test_a_list_that_is_not_there_is_named(synthetic: Path) -> None:
    (synthetic / "test.txt").unlink()
    source = open_source(DTD, synthetic.parent)
    with pytest.raises(DataError, match=r"/dtd has no list 'test' \(test\.txt\); it has: train800, val200"):
        source.get("test")


def test_a_label_out_of_range_names_the_card(synthetic: Path) -> None:
    (synthetic / "val200.txt").write_text("images/val200/000000.jpg 47\n")
    with pytest.raises(DataError, match=r"val200\.txt:1: label 47 is out of range, the card of vtab/dtd has 47"):
        open_source(DTD, synthetic.parent)


def test_the_reader_lists_has_no_options() -> None:
    card = replace(DTD, reader=ReaderSpec("split_files", {"size": 3}))
    with pytest.raises(CardError, match=r"dtd\.yaml:1: reader 'split_files': unknown reader key 'size'"):
        open_source(card)


def test_an_unknown_reader_names_the_nearest() -> None:
    with pytest.raises(CardError, match=r"dtd\.yaml:1: unknown reader 'list'; allowed: class_folders, digits"):
        open_source(replace(DTD, reader=ReaderSpec("list", {})))


# --- leaks -----------------------------------------------------------------------------------------------------------


def add(folder: Path, name: str, line: str) -> None:
    path = folder / f"{name}.txt"
    path.write_text(f"{path.read_text()}{line}\n")


def line_of(folder: Path, name: str, number: int = 0) -> str:
    return (folder / f"{name}.txt").read_text().splitlines()[number]


@pytest.mark.parametrize("name", ["train800", "val200", "train800val200"])
@pytest.mark.parametrize("spell", ["{}", "./{}"])
def test_a_test_image_that_is_trained_or_chosen_on_is_refused(synthetic: Path, name: str, spell: str) -> None:
    add(synthetic, name, spell.format(line_of(synthetic, "test")))
    with pytest.raises(DataError) as caught:
        open_source(DTD, synthetic.parent)
    first = synthetic / "images/test/000000.jpg"
    text = f"{synthetic / 'test.txt'}: 1 of its images are also in {synthetic / name}.txt, "
    assert str(caught.value).startswith(text)
    assert f"the first is {first}; " in str(caught.value)


def test_an_image_of_val_in_train_is_refused(synthetic: Path) -> None:
    add(synthetic, "train800", line_of(synthetic, "val200"))
    with pytest.raises(DataError, match=r"val200\.txt: 1 of its images are also in .+train800\.txt, which must not"):
        open_source(DTD, synthetic.parent)


def test_lists_that_join_others_may_repeat_them(synthetic: Path) -> None:
    lines = [line_of(synthetic, "train800", number) for number in range(6)]
    lines += [line_of(synthetic, "val200", number) for number in range(3)]
    (synthetic / "train800val200.txt").write_text("".join(f"{line}\n" for line in lines))
    report = inspect(small(), open_source(small(), synthetic.parent), ["train800val200", "test"])
    assert (report.status, report.notes) == ("as_card", ())


@pytest.mark.parametrize(("first", "second"), [("train800", "train800"), ("train800val200", "train800")])
def test_one_image_with_two_labels_is_refused(synthetic: Path, first: str, second: str) -> None:
    path, label = line_of(synthetic, first).split()
    add(synthetic, second, f"{path} {(int(label) + 1) % 47}")
    with pytest.raises(DataError, match=rf"{second}|{first}\.txt: .+ has label \d+, in .+ it has \d+; get the lists"):
        open_source(DTD, synthetic.parent)


def test_a_repeated_line_is_noted(synthetic: Path) -> None:
    add(synthetic, "test", line_of(synthetic, "test"))
    source = open_source(DTD, synthetic.parent)
    note = f"{synthetic / 'test.txt'} repeats 1 image, the first is {synthetic / 'images/test/000000.jpg'}"
    assert note in inspect(DTD, source, ["test"]).notes


def test_the_digits_are_identified_by_number() -> None:
    source = open_source(load_task("demo/digits"))
    leaking = replace(source, splits={**source.splits, "test": source.get("val")})
    stages = {"final": {"train": "trainval", "test": "test"}}
    with pytest.raises(DataError, match=r"the split 'val': 200 of its images are also in the split '(val|trainval)'"):
        leaking.checked(stages)


def test_an_empty_list_in_use_is_refused() -> None:
    card = load_task("demo/digits")
    source = open_source(card)
    none = sources.ArrayImages("val", np.zeros((1, 8, 8), np.uint8), np.zeros(1, np.int64), np.zeros(0, np.int64))
    empty = replace(source, splits={**source.splits, "val": none})
    with pytest.raises(DataError, match="scikit-learn's digits has no image for the list 'val'; get the data again"):
        inspect(card, empty, ["train", "val"])
    assert inspect(card, empty, ["trainval", "test"]).status == "different"  # it is not in use


# --- integrity -------------------------------------------------------------------------------------------------------


def test_a_large_split_is_decoded_once_until_a_file_changes(synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVP_BENCH_CACHE", str(synthetic.parent / "cache"))
    monkeypatch.setattr(sources, "_WORTH_CACHING", 1)
    decoded: list[object] = []
    read = sources.read_image
    monkeypatch.setattr(sources, "read_image", lambda *given: decoded.append(given) or read(*given))
    first = images(synthetic).examine()
    again = images(synthetic).examine()
    assert len(decoded) == len(first.digests) == 6
    assert np.array_equal(first.digests, again.digests)
    assert (first.problems, first.notes) == (again.problems, again.notes)
    path = synthetic / "images/train800/000003.jpg"
    path.write_bytes(in_format("PNG"))
    changed = images(synthetic).examine()
    assert len(decoded) == 12
    assert [index for index in range(6) if (changed.digests[index] != first.digests[index]).any()] == [3]
    path.write_bytes(b"no image")
    assert [index for index, _ in images(synthetic).examine().problems] == [3]
    assert [index for index, _ in images(synthetic).examine().problems] == [3]  # what is broken is not cached


def test_missing_images_are_counted_and_the_first_named(synthetic: Path) -> None:
    for number in (1, 4):
        (synthetic / f"images/train800/{number:06d}.jpg").unlink()
    (synthetic / "images/train800/000000.jpg").write_bytes(b"")  # a second trouble does not hide the first
    with pytest.raises(DataError) as caught:
        images(synthetic).verify()
    assert str(caught.value).startswith(f"2 of the 6 images of {synthetic / 'train800.txt'} are missing, ")
    assert f"the first is {synthetic / 'images/train800/000001.jpg'}; " in str(caught.value)
    assert str(synthetic / "images/train800/000004.jpg") in str(caught.value)
    assert f"{synthetic / 'images/train800/000000.jpg'}: not a readable image: an empty file" in str(caught.value)


def test_a_path_through_a_file_is_missing(synthetic: Path) -> None:
    (synthetic / "train800.txt").write_text("train800.txt/a.jpg 0\n")
    with pytest.raises(DataError, match=r"1 of the 1 images of .* are missing"):
        images(synthetic).verify()


def in_format(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


def cut(kind: str, share: float = 0.6, **options: object) -> Callable[[], bytes]:
    return lambda: (whole := in_format(kind, **options))[: int(len(whole) * share)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "an empty file"),
        (lambda: b"<html>404 Not Found</html>", "no known image format"),
        (lambda: in_format("JPEG")[:2], "no known image format"),
        (cut("JPEG"), "truncated"),
        (lambda: in_format("JPEG")[:-2], "truncated"),
        (cut("PNG"), "truncated"),
        (cut("GIF"), "truncated"),
        (cut("WEBP", lossless=True), ".+"),
        (cut("BMP"), "truncated"),
    ],
    ids=["empty", "html", "stub", "jpeg", "jpeg-end", "png", "gif", "webp", "bmp"],
)
def test_broken_images_are_named_with_the_reason(synthetic: Path, content: Callable[[], bytes], reason: str) -> None:
    path = synthetic / "images/train800/000003.jpg"
    path.write_bytes(content())
    with pytest.raises(DataError, match=rf"000003\.jpg: not a readable image: .*{reason}.*; get the file") as caught:
        images(synthetic).verify()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"000003\.jpg: cannot be decoded \(.+\); get the file again"):
        images(synthetic).load(3)


def test_further_broken_images_are_counted(synthetic: Path) -> None:
    for number in (2, 3, 5):
        (synthetic / f"images/train800/{number:06d}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000002\.jpg: not a .*; .*000003\.jpg: not a .*; .*000005\.jpg: not a"):
        images(synthetic).verify()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("padding", [b"", b"\0\0\0\0"])
def test_whole_files_pass_also_with_something_behind_their_end(synthetic: Path, kind: str, padding: bytes) -> None:
    (synthetic / "images/train800/000003.jpg").write_bytes(in_format(kind) + padding)
    images(synthetic).verify()


def test_a_folder_in_place_of_an_image_is_named(synthetic: Path) -> None:
    path = synthetic / "images/train800/000003.jpg"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"000003\.jpg: not a readable image: a folder, not a file"):
        images(synthetic).verify()


# --- card against disk -----------------------------------------------------------------------------------------------


def test_data_as_on_the_card(synthetic: Path) -> None:
    card = small(digest=open_source(small(), synthetic.parent).digest)
    source = open_source(card, synthetic.parent)
    report = inspect(card, source, ["train800", "test"])
    assert (report.variant, report.status, report.notes) == ("card", "as_card", ())
    assert report.counts == card.counts


def reverse_lines(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def test_the_digest_is_over_the_lists_in_use_and_the_cards_over_all(synthetic: Path) -> None:
    card = small(digest=open_source(small(), synthetic.parent).digest)
    source = open_source(card, synthetic.parent)
    used = ["train800val200", "test"]
    whole, final = inspect(card, source, sorted(source.splits)), inspect(card, source, used)
    assert (whole.digest, whole.status) == (card.digest, "as_card")
    assert final.digest == combined_digest({name: source.get(name).digest for name in used}) != card.digest
    assert final.status == "as_card"
    (synthetic / "val200.txt").unlink()
    assert inspect(card, open_source(card, synthetic.parent), used).digest == final.digest
    (synthetic / "test.txt").write_text(
        "".join(reversed((synthetic / "test.txt").read_text().splitlines(keepends=True)))
    )
    assert inspect(card, open_source(card, synthetic.parent), used).digest != final.digest


def test_a_list_that_is_not_in_use_still_has_to_be_as_pinned(synthetic: Path) -> None:
    card = small(digest=open_source(small(), synthetic.parent).digest)
    (synthetic / "val200.txt").write_text(
        "".join(reversed((synthetic / "val200.txt").read_text().splitlines(keepends=True)))
    )
    source = open_source(card, synthetic.parent)
    report = inspect(card, source, ["train800val200", "test"])
    assert report.notes == (f"the digest is {source.digest}, the card states {card.digest}",)


def test_an_unpinned_digest_is_not_compared(synthetic: Path) -> None:
    assert inspect(small(digest=None), open_source(small(), synthetic.parent), []).status == "as_card"


def test_another_digest_is_a_difference(synthetic: Path) -> None:
    card = small(digest="sha256:" + "0" * 64)
    report = inspect(card, open_source(card, synthetic.parent), list(card.counts))
    assert report.status == "different"
    assert len(report.notes) == 1
    assert report.notes[0] == f"the digest is {report.digest}, the card states {card.digest}"


def test_the_counts_of_a_variant_are_recognised(synthetic: Path) -> None:
    as_zip = dict(small().counts)
    card = small(digest="sha256:" + "0" * 64, variants={"other": {**as_zip, "test": 4}, "zip": as_zip})
    card = replace(card, counts={**as_zip, "test": 6})
    report = inspect(card, open_source(card, synthetic.parent), [])
    assert (report.variant, report.status, report.notes) == ("zip", "as_card", ())


def test_other_counts_are_differences_named_with_card_and_variants(synthetic: Path) -> None:
    card = replace(DTD, variants={"zip": {**DTD.counts, "test": 1881}})
    report = inspect(card, open_source(card, synthetic.parent), ["test"])
    assert (report.variant, report.status) == ("card", "different")
    assert report.notes == (
        "train800 has 6 images, the card states 800",
        "val200 has 3 images, the card states 200",
        "train800val200 has 9 images, the card states 1000",
        "test has 5 images, the card states 1880 (variant zip 1881)",
    )


def test_a_missing_list_that_is_not_used_is_a_difference_one_that_is_used_stops(synthetic: Path) -> None:
    (synthetic / "val200.txt").unlink()
    source = open_source(small(), synthetic.parent)
    report = inspect(small(), source, ["train800val200", "test"])
    assert report.status == "different"
    assert report.notes == (f"{synthetic} lacks val200 (not needed in this stage)",)
    with pytest.raises(DataError, match="has no list 'val200'"):
        inspect(small(), source, ["train800", "val200"])


def test_synthetic_images_never_pass_for_real_ones(tmp_path: Path) -> None:
    folder = draw_task(small(), tmp_path, counts=COUNTS, size=16)
    report = inspect(small(), open_source(small(), tmp_path), [])
    assert (report.variant, report.status) == ("synthetic", "different")
    assert report.notes == (f"the images in {folder} are synthetic, not real",)
    other_counts = inspect(DTD, open_source(DTD, tmp_path), [])
    assert other_counts.variant == "synthetic"
    assert "test has 5 images, the card states 1880" in other_counts.notes


# --- digits ----------------------------------------------------------------------------------------------------------


def digits(**options: int | str) -> Source:
    card = load_task("demo/digits")
    return open_source(replace(card, reader=ReaderSpec("digits", options)), suite=load_suite("demo"))


def test_digits_are_scikit_learns_in_file_order() -> None:
    from sklearn.datasets import load_digits

    digits_there = load_digits()
    source = digits()
    parts = {"train": slice(0, 800), "val": slice(800, 1000), "trainval": slice(0, 1000), "test": slice(1000, 1797)}
    for name, part in parts.items():
        assert source.get(name).labels.tolist() == digits_there.target[part].tolist()
        pixels = np.asarray(source.get(name).load(3))
        assert pixels.shape == (8, 8, 3)
        assert np.array_equal(pixels[..., 1], np.rint(digits_there.images[part][3] * 255 / 16))
        source.get(name).verify()
    assert source.get("test").where(0) == "digit 1000"
    assert np.asarray(source.get("trainval").load(0)).max() > 200


@pytest.mark.parametrize(("per_class", "train"), [(5, 4), (10, 8), (3, 2)])
def test_few_digits_of_each_class_are_spread_over_the_writers(per_class: int, train: int) -> None:
    labels = digits().get("trainval").labels
    source = digits(per_class=per_class)

    def numbers(name: str) -> list[int]:
        found = [int(source.get(name).where(index).removeprefix("digit ")) for index in range(len(source.get(name)))]
        assert found == sorted(found)
        return found

    assert sorted(numbers("train") + numbers("val")) == numbers("trainval")
    assert np.bincount(source.get("train").labels).tolist() == [train] * 10
    assert np.bincount(source.get("val").labels).tolist() == [per_class - train] * 10
    for digit in range(10):
        of_class = np.flatnonzero(labels == digit)
        ranks = np.flatnonzero(np.isin(of_class, numbers("trainval")))
        assert len(ranks) == per_class
        gaps = np.diff(ranks)
        assert gaps.max() - gaps.min() <= 1  # evenly spaced
        assert ranks[0] <= len(of_class) / per_class
        assert len(of_class) - ranks[-1] <= len(of_class) / per_class + 1
    assert source.get("test").digest == digits().get("test").digest
    assert source.get("train").digest != digits().get("train").digest


@pytest.mark.parametrize("name", ["demo/digits", "demo/digits-5shot", "demo/digits-10shot"])
def test_the_shipped_digit_cards_are_true(name: str) -> None:
    card = load_task(name)
    report = inspect(card, open_source(card), list(card.counts))
    assert (report.variant, report.status, report.notes) == ("card", "as_card", ())
    assert report.digest == card.digest  # as `svp-bench data verify` compares it


@pytest.mark.parametrize("margin", [0, 2, 16])
def test_a_margin_stands_around_the_digits_and_changes_nothing_else(margin: int) -> None:
    bare = np.asarray(digits().get("test").load(7))
    framed = np.asarray(digits(margin=margin).get("test").load(7))
    assert framed.shape == (8 + 2 * margin, 8 + 2 * margin, 3)
    inside = slice(margin, margin + 8)
    assert np.array_equal(framed[inside, inside], bare)
    assert framed.sum() == bare.sum()


@pytest.mark.parametrize("margin", [-1, 17])
def test_margin_out_of_range(margin: int) -> None:
    with pytest.raises(CardError, match=rf"digits\.yaml:1: .*'margin' must be 0 to 16 \(pixels\), not {margin}"):
        digits(margin=margin)


@pytest.mark.parametrize("per_class", [2, 0, -1, 1000])
def test_per_class_out_of_range(per_class: int) -> None:
    with pytest.raises(CardError, match=rf"digits\.yaml:1: .*per_class'? .*{per_class}"):
        digits(per_class=per_class)


def test_unknown_and_mistyped_options_of_digits() -> None:
    with pytest.raises(CardError, match="unknown reader key 'per_clas'; did you mean 'per_class'"):
        digits(per_clas=5)
    with pytest.raises(CardError, match=r"'per_class' must be int .*not 'five'"):
        digits(per_class="five")
    with pytest.raises(CardError, match=r"'per_class' must be int .*not True"):
        digits(per_class=True)


def test_digit_cards_with_other_lists_or_classes_are_refused() -> None:
    card = load_task("demo/digits")
    with pytest.raises(CardError, match="unknown split 'tests'; did you mean 'test'"):
        open_source(replace(card, counts={"tests": 797}))
    with pytest.raises(CardError, match="the digits have 10 classes, the card states 9"):
        open_source(replace(card, classes=9))


# --- threads and imports ---------------------------------------------------------------------------------------------


def test_results_come_in_order_and_progress_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PATIENCE_S", 0.0)
    notes: list[str] = []
    assert in_threads(lambda index: index * 2, 1000, "doubling", notes.append) == list(range(0, 2000, 2))
    assert notes[0] == "doubling: 64 of 1,000"
    assert len(notes) == 15  # none when all is done


def test_a_quick_job_prints_nothing() -> None:
    notes: list[str] = []
    in_threads(lambda index: index, 200, "counting", notes.append)
    assert notes == []


def test_the_first_error_comes_through() -> None:
    def work(index: int) -> int:
        if index in (70, 500):
            raise DataError(f"image {index}")
        return index

    with pytest.raises(DataError, match="image 70"):
        in_threads(work, 1000, "working")


def test_reading_and_drawing_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from svp_bench.data import samplers, sources, synthetic, transforms\n"
        "heavy = {'torch', 'lightning', 'sklearn', 'pandas', 'timm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
