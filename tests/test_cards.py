"""The shipped cards say what the benchmarks' own sources say, and a wrong card cannot be read."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svp_bench.core import yaml as plain_yaml
from svp_bench.core.errors import CardError, UsageError
from svp_bench.core.resources import tasks_dir
from svp_bench.tasks import cards

# Classes and test images of VTAB-1k's tasks (task_adaptation's own unit tests), in the order of the tables.
VTAB = {
    "cifar": ("natural", 100, 10_000),
    "caltech101": ("natural", 102, 6_084),
    "dtd": ("natural", 47, 1_880),
    "oxford_flowers102": ("natural", 102, 6_149),
    "oxford_iiit_pet": ("natural", 37, 3_669),
    "svhn": ("natural", 10, 26_032),
    "sun397": ("natural", 397, 21_750),
    "patch_camelyon": ("specialized", 2, 32_768),
    "eurosat": ("specialized", 10, 5_400),
    "resisc45": ("specialized", 45, 6_300),
    "diabetic_retinopathy": ("specialized", 5, 42_670),
    "clevr_count": ("structured", 8, 15_000),
    "clevr_dist": ("structured", 6, 15_000),
    "dmlab": ("structured", 6, 22_735),
    "kitti": ("structured", 4, 711),
    "dsprites_loc": ("structured", 16, 73_728),
    "dsprites_ori": ("structured", 16, 73_728),
    "smallnorb_azi": ("structured", 18, 12_150),
    "smallnorb_ele": ("structured", 9, 12_150),
}
DIGITS = {
    "demo/digits": ({"train": 800, "val": 200, "trainval": 1000, "test": 797}, {"margin": 2}),
    "demo/digits-10shot": ({"train": 80, "val": 20, "trainval": 100, "test": 797}, {"per_class": 10, "margin": 2}),
    "demo/digits-5shot": ({"train": 40, "val": 10, "trainval": 50, "test": 797}, {"per_class": 5, "margin": 2}),
}
SYNTHETIC = {"textures": 8, "location": 16, "orientation": 8, "count": 6, "size": 4}  # classes


# --- the shipped cards -----------------------------------------------------------------------------------------------


def test_the_shipped_suites_and_tasks_are_listed_in_table_order() -> None:
    assert {"demo", "vtab"} <= {*cards.list_suites()}
    assert cards.list_suites() == sorted(cards.list_suites())
    assert cards.list_tasks("vtab") == [f"vtab/{task}" for task in VTAB]
    assert cards.list_tasks("demo") == [*DIGITS, *(f"demo/{kind}" for kind in SYNTHETIC)]
    assert {*cards.list_parts()}.isdisjoint(cards.list_suites())
    assert cards.list_tasks() == [task for suite in cards.list_suites() for task in cards.list_tasks(suite)]


@pytest.mark.parametrize("task", VTAB)
def test_vtab_card_states_the_sources_numbers(task: str) -> None:
    group, classes, test = VTAB[task]
    card = cards.load_task(f"vtab/{task}")
    assert (card.name, card.suite, card.id, card.folder) == (f"vtab/{task}", "vtab", task, task)
    assert (card.group, card.classes) == (group, classes)
    assert card.counts == {"train800": 800, "val200": 200, "train800val200": 1000, "test": test}
    assert card.reader == cards.ReaderSpec("split_files", {})


def test_vtab_sums_and_groups() -> None:
    all_cards = [cards.load_task(name) for name in cards.list_tasks("vtab")]
    assert sum(card.classes for card in all_cards) == 940
    assert Counter(card.group for card in all_cards) == {"natural": 7, "specialized": 4, "structured": 8}
    suite = cards.load_suite("vtab")
    assert list(suite.groups) == ["natural", "specialized", "structured"]
    assert (suite.title, suite.table, suite.folder, suite.protocol) == ("VTAB-1k", "vtab1k", "vtab-1k", "vtab-final")
    repeated = sum(len(tasks) - 1 for tasks in suite.same_images)
    assert len(all_cards) - repeated == 16  # independent sources


def test_only_caltech101_has_a_variant_and_it_overrides_the_cards_counts() -> None:
    variants = {name: cards.load_task(name).variants for name in [*DIGITS, *cards.list_tasks("vtab")]}
    assert {name for name, known in variants.items() if known} == {"vtab/caltech101"}
    full = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 6085}
    assert variants["vtab/caltech101"] == {"zip": full}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_cards(name: str) -> None:
    counts, options = DIGITS[name]
    card = cards.load_task(name)
    assert (card.counts, card.classes, card.reader) == (counts, 10, cards.ReaderSpec("digits", options))


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_synthetic_cards(kind: str) -> None:
    card = cards.load_task(f"demo/{kind}")
    assert card.counts == {"train": 240, "val": 60, "trainval": 300, "test": 1000}
    assert card.classes == SYNTHETIC[kind]
    assert card.reader == cards.ReaderSpec("synthetic", {"kind": kind, "seed": 0, "generator": 1})
    assert (card.source, card.digest is not None) == ("synthetic", True)


def test_vtab_protocol() -> None:
    protocol = cards.load_protocol("vtab-final")
    assert (protocol.image_size, protocol.resize, protocol.interpolation) == (224, "squash", "bicubic")
    assert (protocol.augmentation, protocol.normalisation) == ("none", "backbone")
    assert protocol.stages == {
        "select": {"train": "train800", "val": "val200"},
        "final": {"train": "train800val200", "test": "test"},
    }
    assert protocol.training["trainer"] == {"max_epochs": 100, "gradient_clip_val": 5.0}
    assert protocol.training["data"] == {"batch_size": 32}
    assert protocol.training["model"]["warmup_epochs"] == 10
    # YAML 1.1 reads 1e-5 as a text; the card has to write 1.0e-5
    assert protocol.training["model"]["schedule"]["min_learning_rate"] == pytest.approx(1e-5)


@pytest.mark.parametrize("name", [*DIGITS, *cards.list_tasks("vtab"), *cards.list_tasks("fgvc")])
def test_final_training_list_is_train_and_val_together(name: str) -> None:
    card = cards.load_task(name)
    stages = cards.load_protocol(cards.load_suite(card.suite).protocol).stages
    select = stages["select"]
    assert card.counts[stages["final"]["train"]] == card.counts[select["train"]] + card.counts[select["val"]]


def test_every_citation_is_in_the_bibliography_and_every_key_is_there_once() -> None:
    keys = re.findall(r"^@\w+\{([^,\s]+),$", (tasks_dir() / "references.bib").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(keys) == len(set(keys))
    suites = [cards.load_suite(name) for name in cards.list_suites()]
    cited = {suite.citation for suite in suites}
    cited |= {cards.load_protocol(suite.protocol).citation for suite in suites}
    cited |= {cards.load_task(name).citation for name in cards.list_tasks()}
    assert cited == set(keys)


def test_every_shipped_protocol_is_used_by_a_suite() -> None:
    used = {cards.load_suite(name).protocol for name in cards.list_suites()}
    assert {path.stem for path in (tasks_dir() / "protocols").glob("*.yaml")} == used


def test_both_yaml_parsers_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["vtab/caltech101", "demo/digits-5shot"]
    fast = [cards.load_task(name) for name in names], cards.load_protocol("vtab-final")
    monkeypatch.setattr(plain_yaml, "_LOADER", yaml.SafeLoader)
    assert ([cards.load_task(name) for name in names], cards.load_protocol("vtab-final")) == fast


def test_reading_all_cards_imports_nothing_heavy() -> None:
    program = (
        "import sys; from svp_bench.tasks import cards; [cards.load_task(name) for name in cards.list_tasks()]\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'lightning', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- unknown names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("vtab/caltech", "vtab/caltech101"), ("caltech101", "vtab/caltech101"), ("VTAB/DTD", "vtab/dtd")],
)
def test_unknown_task_suggests_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(UsageError) as caught:
        cards.load_task(name)
    assert str(caught.value) == f"unknown task {name!r}; did you mean {suggestion!r}? (`svp-bench tasks` lists all)"


def test_unknown_suite_and_protocol_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match=re.escape("unknown suite 'vtabb'; did you mean 'vtab'?")):
        cards.list_tasks("vtabb")
    with pytest.raises(UsageError, match=re.escape("unknown protocol 'vtab-finale'; did you mean 'vtab-final'?")):
        cards.load_protocol("vtab-finale")


@pytest.mark.parametrize("name", ["", "vtab", "vtab/", "/dtd", "vtab/../demo", "protocols/vtab-final"])
def test_a_name_is_never_used_as_a_path(name: str) -> None:
    with pytest.raises(UsageError, match="unknown task"):
        cards.load_task(name)


# --- wrong cards -----------------------------------------------------------------------------------------------------

TOY = {
    "toy.yaml": """\
name: toy
version: 1
title: Toy
table: toy
folder: toy-data
protocol: toy-final
reader: {kind: split_files}
groups:
  easy: [one, two]
  hard:
    - three
same_images:
  - [one, three]
citation: someone2020toy
notes: For tests.
""",
    "protocols/toy-final.yaml": """\
name: toy-final
version: 1
title: Toy
image_size: 32
resize: squash
interpolation: bicubic
augmentation: none
normalisation: backbone
stages:
  select: {train: train, val: val}
  final: {train: trainval, test: test}
training:
  trainer: {max_epochs: 2}
selection: On val.
citation: someone2020toy
""",
}
TASK = """\
name: toy/one
version: 1
group: easy
title: One
classes: 3
counts: {train: 4, val: 2, trainval: 6, test: 5}
folder: one
source: https://example.org/one
licence: CC0 1.0
citation: someone2020toy
digest: null
"""


def write_toy(root: Path) -> Path:
    for name, text in TOY.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "toy").mkdir()
    for task, group in (("one", "easy"), ("two", "easy"), ("three", "hard")):
        text = TASK.replace("toy/one", f"toy/{task}").replace("group: easy", f"group: {group}")
        (root / "toy" / f"{task}.yaml").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def load_all(root: Path) -> list[cards.TaskCard]:
    return [cards.load_task(name, root) for name in cards.list_tasks(root=root)]


def test_cards_of_another_folder(toy: Path) -> None:
    one, two, three = load_all(toy)
    assert [card.name for card in (one, two, three)] == ["toy/one", "toy/two", "toy/three"]
    assert (one.group, three.group, one.digest, one.notes, one.variants) == ("easy", "hard", None, "", {})
    assert one.path == toy / "toy" / "one.yaml"
    assert cards.list_suites(toy) == ["toy"]
    assert cards.load_suite("toy", toy).same_images == (("one", "three"),)
    with pytest.raises(UsageError, match="unknown task 'toy/four'"):
        cards.load_task("toy/four", toy)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path / 'nowhere'} is not a folder; give the folder")):
        cards.list_tasks(root=tmp_path / "nowhere")


def test_optional_keys_of_a_task(toy: Path) -> None:
    path = toy / "toy" / "one.yaml"
    path.write_text(
        TASK.replace("digest: null", "digest: sha256:" + "0af9" * 16)
        + "variants: {zip: {counts: {test: 7}}}\n"
        + "reader: {kind: digits, options: {per_class: 5, flat: true, scale: 0.5, mode: L}}\n"
        + "notes: >-\n  Two lines\n  of text.\n",
        encoding="utf-8",
    )
    card = cards.load_task("toy/one", toy)
    assert card.digest == "sha256:" + "0af9" * 16
    assert card.variants == {"zip": {"train": 4, "val": 2, "trainval": 6, "test": 7}}
    assert card.counts["test"] == 5
    assert card.reader == cards.ReaderSpec("digits", {"per_class": 5, "flat": True, "scale": 0.5, "mode": "L"})
    assert card.notes == "Two lines of text."


def test_anchors_are_welcome(toy: Path) -> None:
    path = toy / "toy" / "one.yaml"
    path.write_text(
        TASK.replace("title: One", "title: &it One").replace("folder: one", "folder: *it"), encoding="utf-8"
    )
    assert cards.load_task("toy/one", toy).folder == "One"


ONE, SUITE, PROTOCOL = "toy/one.yaml", "toy.yaml", "protocols/toy-final.yaml"
COUNTS = "{train: 4, val: 2, trainval: 6, test: 5}"
WRONG = [
    # keys
    (ONE, "licence:", "license:", 9, "unknown card key 'license'; did you mean 'licence'?"),
    (ONE, "classes: 3", "classes: 3\nzzz: 1", 6, "unknown card key 'zzz'; allowed: citation, class_names, classes,"),
    (ONE, "digest: null\n", "", 1, "the key 'digest' is missing"),
    (ONE, "title: One", "title: One\nversion: 2", 5, "key 'version' is given twice (first on line 2)"),
    (ONE, "title: One", "title: One\nno: 2", 5, "a key must be a text, not False (put it in quotes?)"),
    (ONE, "title: One", "title: One\n[a]: 2", 5, "a key must be a text, not a list"),
    (SUITE, "table: toy", "tables: toy", 4, "unknown card key 'tables'; did you mean 'table'?"),
    (PROTOCOL, "resize:", "resise:", 5, "unknown card key 'resise'; did you mean 'resize'?"),
    # types and values
    (ONE, "title: One", "title: ''", 4, "'title' must be a line of text, not ''"),
    (ONE, "title: One", "title:", 4, "'title' must be a line of text, not None"),
    (ONE, "title: One", "title: 101", 4, "'title' must be a line of text, not 101"),
    (ONE, "title: One", 'title: "One\\nTwo"', 4, r"'title' must be a line of text, not 'One\nTwo'"),
    (ONE, "title: One", "title: [One]", 4, "'title' must be a line of text, not ['One']"),
    (ONE, "classes: 3", "classes: 0", 5, "'classes' must be int >= 1, not 0"),
    (ONE, "classes: 3", "classes: found", 5, "classes and counts are both 'found', or neither is"),
    (ONE, COUNTS, "found", 6, "classes and counts are both 'found', or neither is"),
    (ONE, "classes: 3", "classes: true", 5, "'classes' must be int, not True"),
    (ONE, "classes: 3", "classes: 3.0", 5, "'classes' must be int, not 3.0"),
    (ONE, "classes: 3", "classes: [cat, dog]", 5, "'classes' must be int, not ['cat', 'dog']"),
    (ONE, "version: 1", "version: '1'", 2, "'version' must be int, not '1'"),
    (ONE, "test: 5", "test: -5", 6, "'counts.test' must be int >= 1, not -5"),
    (ONE, COUNTS, "{}", 6, "counts lacks the split 'train'"),
    (ONE, COUNTS, "[4, 2]", 6, "'counts' must be a mapping of keys, not [4, 2]"),
    (ONE, "{train: 4", "{Train 1: 4, train: 4", 6, "'counts.Train 1' must be a name of a-z, 0-9, _ and -"),
    (ONE, "folder: one", "folder: ../one", 7, "'folder' must be a single file or folder name, not '../one'"),
    (ONE, "https://example.org/one", "example.org", 8, "'source' must be an address (https://…), synthetic or your"),
    (ONE, "someone2020toy", "some one", 10, "'citation' must be a key of references.bib, not 'some one'"),
    (ONE, "digest: null", "digest: sha256:12", 11, "'digest' must be 'sha256:' and 64 hexadecimal digits or null, not"),
    (ONE, "digest: null", "digest: null\nreader: {kind: [a]}", 12, "'reader.kind' must be a name of a-z, 0-9, _ and -"),
    (ONE, "digest: null", "digest: null\nreader: {kind: a, options: {b: [c]}}", 12, "'reader.options.b' must be bool"),
    (ONE, "digest: null", "digest: null\nreader: lists", 12, "'reader' must be a mapping of keys, not 'lists'"),
    (ONE, "digest: null", "digest: null\nother_folders: [a/b]", 12, "'other_folders[0]' must be a single file or"),
    (ONE, "digest: null", "digest: null\nvariants: {zip: {}}", 12, "the variant 'zip' must be {counts: {split:"),
    (
        ONE,
        "digest: null",
        "digest: null\nvariants:\n  zip:\n    counts: {tests: 3}",
        14,
        "unknown split of toy/one 'tests'; did you mean 'test'?",
    ),
    (ONE, "digest: null", "digest: null\nclass_names: names.txt", 12, "there is no file 'names.txt' next to the card"),
    # what cards say of each other
    (ONE, "name: toy/one", "name: toy/won", 1, "name is 'toy/won', but a card in this place is called 'toy/one'"),
    (ONE, "group: easy", "group: eazy", 3, "unknown group 'eazy'; did you mean 'easy'?"),
    (ONE, "group: easy", "group: hard", 3, "group is 'hard', but toy.yaml lists the task under 'easy'"),
    (ONE, "val: 2", "valid: 2", 6, "counts lacks the split 'val' (val of stage 'select' in protocol 'toy-final'); it"),
    (SUITE, "name: toy", "name: toys", 1, "name is 'toys', but a card in this place is called 'toy'"),
    (SUITE, "[one, two]", "[one, tow]", 9, "task 'tow' has no card toy/tow.yaml; did you mean 'two'?"),
    (SUITE, "- three", "- one", 11, "task 'one' is listed twice (already in group 'easy')"),
    (SUITE, "- three", "- THREE", 11, "'groups.hard[0]' must be a name of a-z, 0-9, _ and -, not 'THREE'"),
    (SUITE, "[one, two]", "[]", 9, "'groups.easy' must be a list of task ids, not []"),
    (SUITE, "toy-final", "toy-finale", 6, "unknown protocol 'toy-finale'; did you mean 'toy-final'?"),
    (SUITE, "[one, three]", "[one, for]", 13, "unknown task 'for'"),
    (SUITE, "[one, three]", "[one]", 13, "'same_images[0]' must be a list of two or more task ids"),
    (SUITE, "- [one, three]", "- [one, three]\n  - [two, one]", 14, "same_images lists the task 'one' twice"),
    (PROTOCOL, "name: toy-final", "name: toy", 1, "name is 'toy', but a card in this place is called 'toy-final'"),
    (PROTOCOL, "bicubic", "bicubical", 6, "'interpolation' must be one of bicubic, not 'bicubical'"),
    (PROTOCOL, "resize: squash", "resize: crop", 5, "'resize' must be one of squash, centre_crop, not 'crop'"),
    (PROTOCOL, "val: val}", "val: val, test: test}", 10, "stages must be {select: {train, val}, final: {train, test}}"),
    (PROTOCOL, "train: trainval, ", "", 11, "stages must be {select: {train, val}, final: {train, test}}"),
    (PROTOCOL, "val: val}", "val: test}", 10, "val of stage 'select' is the test split 'test'; use a split without it"),
    (PROTOCOL, "train: trainval", "train: test", 11, "train of stage 'final' is the test split 'test'"),
    (PROTOCOL, "{max_epochs: 2}", "100", 13, "'training.trainer' must be a mapping of keys, not 100"),
    (PROTOCOL, "image_size: 32", "image_size: large", 4, "'image_size' must be int >= 1, backbone or null, not"),
    # YAML
    (ONE, "title: One", "title: !!python/object:os.system One", 4, "tag '!!python/object:os.system' is not allowed"),
    (ONE, "title: One", "title: !!str One", 4, "is not allowed; write plain YAML"),
    (ONE, COUNTS, f"!!python/name:os.system {COUNTS}", 6, "is not allowed; write plain YAML"),
    (ONE, "title: One", "title: [One", 5, "not YAML: "),
    (ONE, "title: One", "title: *one", 4, "not YAML: found undefined alias"),
    (ONE, COUNTS, "&a {train: *a}", 6, "nested deeper than 16 levels"),
    (ONE, "title: One", "title: " + "[" * 20 + "]" * 20, 4, "nested deeper than 16 levels"),
    (ONE, "title: One", "<<: {title: One}", 4, "'<<' has a special meaning in YAML"),
    (ONE, "title: One", "title: 2020-01-01", 4, "'2020-01-01' has a special meaning in YAML; put it in quotes"),
    (ONE, "classes: 3", "classes: 0b_", 5, "'0b_' is not a number; put it in quotes if it is a text"),
    (ONE, "title: One", "title: One\x07", 4, r"the character '\x07' is not allowed in YAML"),
    (ONE, TASK, "", 1, "the file is empty"),
    (ONE, TASK, "# nothing\n", 1, "the file is empty"),
    (ONE, TASK, "- name: toy/one\n", 1, "the card must be a mapping of keys, not ["),
    (ONE, TASK, TASK + "---\n" + TASK, 12, "not YAML: but found another document"),
]


@pytest.mark.parametrize("parser", ["fast", "pure"])
@pytest.mark.parametrize(("file", "old", "new", "line", "message"), WRONG, ids=[case[4][:40] for case in WRONG])
def test_a_wrong_card_is_one_line_that_names_file_and_line(
    toy: Path, monkeypatch: pytest.MonkeyPatch, parser: str, file: str, old: str, new: str, line: int, message: str
) -> None:
    if parser == "pure":  # PyYAML without libyaml
        monkeypatch.setattr(plain_yaml, "_LOADER", yaml.SafeLoader)
    path = toy / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(CardError) as caught:
        load_all(toy)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_card_that_no_suite_lists(toy: Path) -> None:
    stray = toy / "toy" / "four.yaml"
    stray.write_text(TASK.replace("toy/one", "toy/four"), encoding="utf-8")
    message = f"{stray}:1: this card is not in the groups of {toy / 'toy.yaml'}; list it there or move it away"
    with pytest.raises(CardError, match=re.escape(message)):
        cards.list_tasks(root=toy)


def test_a_folder_of_cards_without_a_suite(toy: Path) -> None:
    (toy / "toy.yaml").rename(toy / "toy2.yaml")
    with pytest.raises(CardError, match=re.escape(f"{toy / 'toy' / 'one.yaml'}:1: this card belongs to no suite")):
        cards.list_suites(toy)


@pytest.mark.parametrize("name", ["One.yaml", "a b.yaml", "one.yml"])
def test_a_file_name_that_is_no_id(toy: Path, name: str) -> None:
    (toy / "toy" / name).write_text(TASK, encoding="utf-8")
    with pytest.raises(CardError, match=re.escape(f"{toy / 'toy' / name}:1: a card's file is called <id>.yaml")):
        cards.list_tasks(root=toy)


def test_no_suite_is_called_protocols(toy: Path) -> None:
    (toy / "protocols.yaml").write_text(TOY["toy.yaml"], encoding="utf-8")
    with pytest.raises(CardError, match="'protocols' cannot name a suite"):
        cards.list_suites(toy)


def test_a_file_that_is_not_utf8(toy: Path) -> None:
    path = toy / "toy" / "one.yaml"
    path.write_bytes(TASK.encode().replace(b"title: One", b"title: \xff\xfe"))
    with pytest.raises(CardError, match=re.escape(f"{path}:4: not UTF-8 text")):
        cards.load_task("toy/one", toy)


def test_a_card_that_cannot_be_read(toy: Path) -> None:
    path = toy / "toy" / "one.yaml"
    path.unlink()
    path.mkdir()
    with pytest.raises(CardError, match=re.escape(f"{path}:1: cannot be read (")):
        cards.load_task("toy/one", toy)


# --- class names -----------------------------------------------------------------------------------------------------


def with_names(toy: Path, text: str) -> cards.TaskCard:
    (toy / "toy" / "one.txt").write_text(text, encoding="utf-8")
    (toy / "toy" / "one.yaml").write_text(TASK + "class_names: one.txt\n", encoding="utf-8")
    return cards.load_task("toy/one", toy)


def test_class_names(toy: Path) -> None:
    assert cards.class_names(cards.load_task("toy/two", toy)) is None
    assert cards.class_names(with_names(toy, "cat\ngreat dane\nant\n")) == ["cat", "great dane", "ant"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("cat\ndog\n", 2, "2 class names, but toy/one has 3 classes"),
        ("", 1, "0 class names, but toy/one has 3 classes"),
        ("cat\n\nant\n", 2, "empty line; write one class name a line"),
        ("cat\nant\ncat\n", 3, "class name 'cat' stands on line 1 already"),
    ],
)
def test_wrong_class_names(toy: Path, text: str, line: int, message: str) -> None:
    card = with_names(toy, text)
    with pytest.raises(CardError, match="^" + re.escape(f"{toy / 'toy' / 'one.txt'}:{line}: {message}")):
        cards.class_names(card)


# --- anything at all -------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
FILES = st.sampled_from([ONE, SUITE, PROTOCOL])
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def shared_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("cards"))


def read_with(root: Path, file: str, text: str) -> list[cards.TaskCard] | None:
    """Read all cards with `text` in the place of one file; None if that was a well-formed CardError."""
    path = root / file
    good = path.read_bytes()
    try:
        path.write_bytes(text.encode())
        return load_all(root)
    except CardError as error:
        refusal = str(error)
    finally:
        path.write_bytes(good)
    assert re.match(rf"{re.escape(str(root))}/[a-z/-]+\.yaml:[1-9][0-9]*: \S", refusal), refusal
    assert len(refusal.splitlines()) == 1
    return None


@QUICK
@given(file=FILES, changes=st.dictionaries(st.integers(0, 20) | st.text(max_size=8), VALUES, min_size=1, max_size=3))
def test_a_changed_card_is_read_or_refused(shared_toy: Path, file: str, changes: dict[Any, Any]) -> None:
    card: dict[Any, Any] = yaml.safe_load((shared_toy / file).read_text(encoding="utf-8"))
    keys = list(card)
    for key, value in changes.items():
        card[keys[key % len(keys)] if isinstance(key, int) else key] = value
    read = read_with(shared_toy, file, yaml.safe_dump(card, allow_unicode=True))
    assert read is None or [task.name for task in read] == ["toy/one", "toy/two", "toy/three"]


@given(
    classes=st.integers(1, 10**6),
    test=st.integers(1, 10**9),
    title=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_what_is_read(shared_toy: Path, classes: int, test: int, title: str) -> None:
    card = yaml.safe_load(TASK) | {"classes": classes, "title": title}
    card["counts"]["test"] = test
    read = read_with(shared_toy, ONE, yaml.safe_dump(card, allow_unicode=True))
    assert read is not None
    assert (read[0].classes, read[0].counts["test"], read[0].title) == (classes, test, title)


# ---- suites that are a part of another


def a_part(toy: Path, **changes: str) -> str:
    """Write a part of the suite toy, named half; return its name."""
    lines = (toy / "toy.yaml").read_text(encoding="utf-8").splitlines()
    task = cards.load_suite("toy", toy).tasks[0].split("/")[1]
    text = "\n".join(
        line for line in lines if line.split(":")[0] in ("version", "title", "folder", "protocol", "citation")
    )
    values = {
        "name": "half",
        "table": "half",
        "tasks_of": "toy",
        "reader": "{kind: split_files}",
        "groups": f"{{all: [{task}]}}",
    }
    text += "\n" + "\n".join(f"{key}: {value}" for key, value in {**values, **changes}.items()) + "\n"
    (toy / "half.yaml").write_text(text, encoding="utf-8")
    return "half"


def test_a_part_of_a_suite_has_its_tasks_and_no_cards(toy: Path) -> None:
    part, whole = cards.load_suite(a_part(toy), toy), cards.load_suite("toy", toy)
    assert part.tasks == whole.tasks[:1]
    assert (part.owner, part.name, whole.owner) == ("toy", "half", "toy")
    assert cards.list_suites(toy) == ["toy"]
    assert cards.list_parts("toy", toy) == ["half"]
    assert cards.list_tasks(root=toy) == whole.tasks
    assert cards.list_tasks("half", toy) == part.tasks
    assert cards.load_task(part.tasks[0], toy).suite == "toy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks_of": "tyo"}, r"half.yaml:\d+: .*toy"),
        ({"tasks_of": "half"}, r"half.yaml:\d+: .*toy"),
        ({"groups": "{all: [nothing]}"}, r"task 'nothing' has no card toy/nothing.yaml"),
    ],
)
def test_a_wrong_part_is_one_line(toy: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(CardError, match=message) as caught:
        cards.load_suite(a_part(toy, **changes), toy)
    assert "\n" not in str(caught.value)


def test_a_part_with_cards_of_its_own_is_refused(toy: Path) -> None:
    name = a_part(toy)
    (toy / name).mkdir()
    (toy / name / "mine.yaml").write_text("name: half/mine\n", encoding="utf-8")
    with pytest.raises(CardError, match=r"a part of the suite 'toy' has no task cards of its own"):
        cards.load_suite(name, toy)
