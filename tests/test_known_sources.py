"""`tasks/sources/<suite>.yaml`: where the data of tasks come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cards import write_toy

from svp_bench.core.errors import CardError
from svp_bench.core.resources import tasks_dir
from svp_bench.prepare.known import known_sources, suite_sources
from svp_bench.tasks.cards import load_suite, load_task

SOURCES = "splits:\n  train: {train: 2}\ntasks:\n  one:\n    tfds:\n      builder: b\n      versions: [1.0.0]\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def write_sources(root: Path, text: str, suite: str = "toy") -> Path:
    path = root / "sources" / f"{suite}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_all_tasks_of_vtab_state_a_builder_and_its_parts() -> None:
    suite = load_suite("vtab")
    sources = suite_sources(suite)
    assert [f"vtab/{task}" for task in sources.tasks] == suite.tasks
    for name in suite.tasks:
        card = load_task(name)
        assert {*sources.splits} == {*card.counts}
        spec = known_sources(card, suite).tfds
        assert spec is not None
        assert {*spec.parts} == {"train", "val", "test"}
        firsts = {split: sum(count for count in parts.values() if count != "all") for split, parts in
                  sources.splits.items()}  # fmt: skip
        assert {split: count for split, count in card.counts.items() if split != "test"} == {
            split: count for split, count in firsts.items() if split != "test"
        }


def test_builders_are_those_of_the_facts() -> None:
    """Builder and config, as VTAB's own code names them (google-research/task_adaptation, task_adaptation/data)."""
    sources = suite_sources(load_suite("vtab")).tasks
    names = {task: known.tfds.name for task, known in sources.items() if known.tfds}
    assert names["svhn"] == "svhn_cropped"
    assert names["sun397"] == "sun397/tfds"
    assert names["eurosat"] == "eurosat/rgb"
    assert names["diabetic_retinopathy"] == "diabetic_retinopathy_detection/btgraham-300"
    assert {task for task, name in names.items() if task == name} == {
        *("caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "patch_camelyon", "resisc45", "dmlab", "kitti")
    }


def test_a_suite_without_the_file_has_no_sources(root: Path) -> None:
    assert known_sources(load_task("toy/one", root), load_suite("toy", root)).tfds is None
    assert not (tasks_dir() / "sources" / "custom.yaml").exists()
    assert known_sources(load_task("custom/images"), load_suite("custom")).tfds is None


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            SOURCES.replace("one", "onee") + "      parts: {train: train}\n",
            4,
            "unknown task 'onee'; did you mean 'one'",
        ),
        (SOURCES + "      parts: {tain: train}\n", 8, "tain"),
        (SOURCES + "      part: {train: train}\n", 8, "part"),
        (SOURCES.replace("1.0.0", "new") + "      parts: {train: train}\n", 7, "a version such as 3.0.1"),
        (SOURCES.replace("[1.0.0]", "[]") + "      parts: {train: train}\n", 7, "a list of versions"),
        (SOURCES.replace("2}", "0}") + "      parts: {train: train}\n", 2, "train"),
        (SOURCES, 5, "parts"),
    ],
)
def test_a_mistake_names_its_line(root: Path, text: str, line: int, message: str) -> None:
    path = write_sources(root, text)
    with pytest.raises(CardError) as caught:
        suite_sources(load_suite("toy", root))
    assert str(caught.value).startswith(f"{path}:{line}:")
    assert message in str(caught.value)


def test_no_suite_is_called_sources(root: Path) -> None:
    (root / "sources.yaml").write_text((root / "toy.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(CardError, match=r"sources\.yaml:1: 'sources' cannot name a suite"):
        load_suite("toy", root)
