"""Layers of configs: which one wins, where each value came from, and that no method's values reach another."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import METHODS, SMALL, TASK, arguments, assert_error, command, run, settle, small
from hypothesis import given
from hypothesis import strategies as st

from svp_bench.config import compose as module
from svp_bench.config.compose import Composed, compose, find_config, split_flags
from svp_bench.core.errors import UsageError
from svp_bench.core.resources import configs_dir
from svp_bench.methods import METHODS as REGISTRY
from svp_bench.tasks.cards import load_protocol, load_suite

NO_TASKS = ("method", "search")
SHIPPED = sorted(path for path in configs_dir().glob("*/*.yaml") if path.parent.name not in NO_TASKS)
SHORT_LISTS = {
    "digits": 5,
    "digits-10shot": 25,
    "digits-5shot": 40,
}  # epochs of the demo's configs, for like numbers of steps
EPOCHS = {name: load_protocol(f"{name}-final").training["trainer"]["max_epochs"] for name in ("vtab", "demo")}
IDS = [f"{path.parent.name}/{path.stem}" for path in SHIPPED]


def layers(*argv: str) -> Composed:
    return compose(split_flags(argv))


def method_file(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((configs_dir() / "method" / f"{name}.yaml").read_text())
    return loaded


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def line_of(path: Path, text: str) -> str:
    lines = path.read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.strip().startswith(text)]
    return f"{path}:{number}"


def write(path: Path, **values: Any) -> str:
    """Write nested YAML from dotted keys with `__` for the dots; return the path as text."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split("__")
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    path.write_text(yaml.safe_dump(nested, sort_keys=False))
    return str(path)


@pytest.fixture
def own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped configs that is taken for them."""
    copy = tmp_path / "shipped"
    shutil.copytree(configs_dir(), copy)
    monkeypatch.setattr(module, "configs_dir", lambda: copy)
    return copy


# ---- merging


NAMES = st.sampled_from(["a", "b", "class_path"])
LAYERS = st.lists(
    st.recursive(st.dictionaries(NAMES, st.integers(0, 3), max_size=3), lambda inner: st.dictionaries(NAMES, inner)),
    max_size=4,
)


@given(LAYERS)
def test_every_leaf_knows_the_layer_that_set_it(drawn: list[dict[str, Any]]) -> None:
    composed = Composed()
    for number, layer in enumerate(drawn):
        composed.merge(layer, {key: str(number) for key, _ in leaves(layer)})
    found = dict(leaves(composed.values))
    assert set(composed.origins) == set(found)
    for key, value in found.items():
        layer = dict(leaves(drawn[int(composed.origins[key])]))
        assert key in layer
        assert layer[key] == value


def test_another_class_path_replaces_the_node_whole() -> None:
    composed = Composed()
    composed.merge({"n": {"class_path": "A", "init_args": {"rank": 1, "x": 2}, "y": 3}}, {})
    composed.merge({"n": {"class_path": "B", "init_args": {"rank": 4}}}, {})
    assert composed.values == {"n": {"class_path": "B", "init_args": {"rank": 4}}}
    composed.merge({"n": {"class_path": "B", "init_args": {"z": 5}}}, {})
    composed.merge({"n": {"init_args": {"rank": 6}}}, {})
    assert composed.values == {"n": {"class_path": "B", "init_args": {"rank": 6, "z": 5}}}
    assert set(composed.origins) == {"n.class_path", "n.init_args.rank", "n.init_args.z"}


# ---- precedence


def test_each_layer_stands_on_those_below(own_configs: Path, tmp_path: Path) -> None:
    def learning_rate(*argv: str) -> tuple[Any, str]:
        composed = layers(*argv)
        return composed.get("model.learning_rate"), composed.origins["model.learning_rate"]

    base = own_configs / "base.yaml"
    base.write_text(base.read_text().replace("model:\n", "model:\n  learning_rate: 1.0\n  weight_decay: 7.0\n"))
    task = write(tmp_path / "task.yaml", data__task=TASK, model__learning_rate=2.0)
    more = write(tmp_path / "more.yaml", model__learning_rate=5.0)
    most = write(tmp_path / "most.yaml", model__learning_rate=6.0)
    bare = write(tmp_path / "bare.yaml", model__method={"class_path": "svp_bench.methods.linear.Linear"})
    recipe = write(
        tmp_path / "recipe.yaml",
        model__method={"class_path": "svp_bench.methods.linear.Linear"},
        model__learning_rate=3.0,
    )
    assert learning_rate("--data.task", TASK, "--method", bare) == (1.0, line_of(base, "learning_rate"))
    assert learning_rate("--config", task, "--method", bare) == (2.0, f"{task}:4")
    assert learning_rate("--config", task, "--method", recipe) == (3.0, line_of(Path(recipe), "learning_rate"))
    own = own_configs / "method" / "svp.yaml"
    assert learning_rate("--config", task) == (1e-3, line_of(own, "learning_rate"))
    assert learning_rate("--config", task, "--config", more) == (5.0, f"{more}:2")
    assert learning_rate("--config", task, "--config", more, "--config", most) == (6.0, f"{most}:2")
    assert learning_rate("--config", task, "--config", most, "--config", more) == (5.0, f"{more}:2")
    assert layers("--config", task, "--method", bare).get("model.weight_decay") == 7.0


def test_the_protocol_stands_between_base_and_task(own_configs: Path, tmp_path: Path) -> None:
    base = own_configs / "base.yaml"
    base.write_text(base.read_text().replace("trainer:\n", "trainer:\n  max_epochs: 3\n"))
    plain = layers("--data.task", TASK)
    assert plain.get("trainer.max_epochs") == EPOCHS["vtab"]
    assert plain.origins["trainer.max_epochs"].endswith("vtab-final.yaml")
    task = write(tmp_path / "task.yaml", data__task=TASK, trainer__max_epochs=77)
    assert layers("--config", task).get("trainer.max_epochs") == 77
    demo = layers("--data.task", "demo/digits")
    assert demo.get("trainer.max_epochs") == EPOCHS["demo"]
    assert demo.origins["trainer.max_epochs"].endswith("demo-final.yaml")


def test_the_last_task_selects_the_protocol(tmp_path: Path) -> None:
    more = write(tmp_path / "more.yaml", data__task="vtab/dtd")
    given = ("--config", "configs/demo/count.yaml", "--config", more)
    assert layers(*given).get("trainer.max_epochs") == EPOCHS["vtab"]
    assert layers(*given, "--data.task", "demo/size").get("trainer.max_epochs") == EPOCHS["demo"]


def test_the_command_line_stands_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    more = write(tmp_path / "more.yaml", model__learning_rate=0.5, trainer__max_epochs=7)
    printed = printed_config(*small("--config", more, "--model.learning_rate", "0.25"))
    assert printed["model"]["learning_rate"] == 0.25
    assert printed["trainer"]["max_epochs"] == 1
    assert printed["data"]["batch_size"] == 4


def test_a_recipe_that_changes_the_task_config_says_so(tmp_path: Path) -> None:
    task = write(tmp_path / "task.yaml", data__task=TASK, model__learning_rate=0.02, model__weight_decay=1e-4)
    (notice,) = layers("--config", task).notices
    assert f"model.learning_rate = 0.02 of {task}:4" in notice
    assert "method svp (0.001)" in notice
    assert "--model.learning_rate" in notice
    assert layers("--data.task", TASK, "--config", "configs/vtab/cifar.yaml").notices == []


# ---- one method's values never reach another


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("path", SHIPPED, ids=IDS)
def test_the_method_is_that_of_its_file_whatever_the_task(path: Path, name: str) -> None:
    composed = layers("--config", str(path), "--method", name)
    expected = method_file(name)["model"]
    assert composed.get("model.method") == expected["method"]
    assert composed.get("model.learning_rate") == expected["learning_rate"]
    assert composed.method == name
    assert set(composed.origins) == {key for key, _ in leaves(composed.values)}
    assert all(composed.origins.values())


def test_svp_is_the_default() -> None:
    assert layers("--data.task", TASK).values == layers("--data.task", TASK, "--method", "svp").values


def test_method_files_are_those_of_the_registry() -> None:
    assert sorted(path.stem for path in (configs_dir() / "method").glob("*.yaml")) == sorted(REGISTRY.names())
    assert REGISTRY.names() == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_holds_the_recipe_and_the_defaults_of_its_class(name: str) -> None:
    values = dict(method_file(name)["model"])
    node = values.pop("method")
    assert set(values) == {"learning_rate", "weight_decay"}
    assert node["class_path"] == REGISTRY.entry(name).target.replace(":", ".")
    defaults = {key: p.default for key, p in inspect.signature(REGISTRY.get(name)).parameters.items()}
    assert node["init_args"] == defaults


# ---- through the real parser


def printed_config(*argv: str) -> dict[str, Any]:
    outcome = run(*argv, "--print_config")
    values: dict[str, Any] = yaml.safe_load(outcome.out)
    return values


@pytest.mark.parametrize("path", SHIPPED, ids=IDS)
def test_every_shipped_config_parses(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = printed_config("fit", "--config", str(path))
    assert values["data"]["task"] == f"{path.parent.name}/{path.stem}"
    assert values["model"]["method"] == method_file("svp")["model"]["method"]
    protocol = load_protocol(load_suite(path.parent.name).protocol)
    assert values["trainer"]["gradient_clip_val"] == protocol.training["trainer"].get("gradient_clip_val")
    epochs = protocol.training["trainer"]["max_epochs"]
    assert values["trainer"]["max_epochs"] == SHORT_LISTS.get(path.stem, epochs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_parses(name: str) -> None:
    values = printed_config("fit", "--config", "configs/vtab/dtd.yaml", "--method", name)
    expected = method_file(name)["model"]["method"]
    assert values["model"]["method"] == {key: value for key, value in expected.items() if value != {}}
    assert values["model"]["learning_rate"] == method_file(name)["model"]["learning_rate"]


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_the_other_subcommands_parse_the_same(subcommand: str) -> None:
    given = ("--config", "configs/vtab/dtd.yaml", "--method", "vpt_deep", "--model.method.length", "3")
    fit, other = (printed_config(name, *given) for name in ("fit", subcommand))
    assert {key: other[key] for key in ("model", "data", "trainer")} == {
        key: fit[key] for key in ("model", "data", "trainer")
    }


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001", "1.0e-3", "'1e-3'"])
def test_a_float_may_be_written_without_a_dot(text: str, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(f"model:\n  learning_rate: {text}\n")
    values = printed_config("fit", "--config", "configs/vtab/dtd.yaml", "--config", str(more))
    assert values["model"]["learning_rate"] == 0.001
    assert isinstance(values["model"]["learning_rate"], float)


def test_a_resolved_config_runs_again_as_the_same_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    first = run(*small("--method", "vpt_deep", "--model.method.length", "3", "--seed_everything", "4"))
    saved = str(first.folder / "config.yaml")
    again = run("fit", "--config", saved)
    same = ("setting_digest", "config_digest", "config", "method", "method_args", "seed", "correct")
    assert [again.record[key] for key in same] == [first.record[key] for key in same]
    assert (again.folder / "config.yaml").read_bytes() == Path(saved).read_bytes()
    assert layers("--config", saved).method == "(as in the config)"


def test_a_resolved_config_of_svp_with_another_method_has_nothing_of_svp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    given = ("--model.method.hidden_dim", "2", "--model.method.dropout", "0.5", "--model.learning_rate", "0.3")
    saved = str(run(*small(*given)).folder / "config.yaml")
    other = run("fit", "--config", saved, "--method", "linear")
    fresh = run(*small("--method", "linear"))
    assert other.record["setting_digest"] == fresh.record["setting_digest"]
    assert other.record["method_args"] == {}
    text = yaml.safe_dump(other.record["config"])
    assert [word for word in ("svp.", "SVP", "hidden_dim", "dropout", "share_layers") if word in text] == []
    assert any("model.learning_rate = 0.3" in line and "recipe of the method linear" in line for line in other.notices)
    # dropout is an argument of both
    vpt = run("fit", "--config", saved, "--method", "vpt_shallow").record
    assert vpt["method_args"] == method_file("vpt_shallow")["model"]["method"]["init_args"]


# ---- a method of one's own: one file, one config, one command

OWN = """
from svp_bench.methods.base import Method

class {name}(Method):
    identity_at_start = True

    def __init__(self, tail: int = 1) -> None:
        self.tail = tail

    def attach(self, model):
        self._last = tuple(f"layers.{{i}}." for i in range(model.depth - self.tail, model.depth))

    def trains(self, name):
        return name.startswith((*self._last, "head."))

    def adapter_parameters(self, model):
        return sum(p.numel() for n, p in model.named_parameters() if n.startswith(self._last))
"""


def own_method(folder: Path, stem: str, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.py").write_text(OWN.format(name=name))
    return write(
        folder / f"{stem}.yaml",
        model__method={"class_path": f"{stem}.{name}", "init_args": {"tail": 2}},
        model__learning_rate=0.01,
    )


@pytest.mark.parametrize("beside", [True, False], ids=["beside the file", "in the working directory"])
def test_a_method_of_ones_own_runs(beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    stem = f"own_tail_{'beside' if beside else 'cwd'}"
    file = own_method(tmp_path / "away" if beside else tmp_path, stem, "LastBlocks")
    record = run(*small("--method", file)).record
    assert record["method"] == "last_blocks"
    assert record["method_args"] == {"tail": 2}
    assert record["config"]["model"]["method"] == {"class_path": f"{stem}.LastBlocks", "init_args": {"tail": 2}}
    assert record["config"]["model"]["learning_rate"] == 0.01
    assert record["parameters"]["adapter"] > 0
    other = run(*small("--method", file, "--model.method.tail", "1")).record
    assert other["method_args"] == {"tail": 1}
    assert other["parameters"]["adapter"] * 2 == record["parameters"]["adapter"]
    assert "last_blocks" in run("table").out


def test_a_method_of_ones_own_runs_from_the_console_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    file = own_method(tmp_path / "mine", "own_console", "LastBlocks")
    script = Path(sys.executable).with_name("svp-bench")
    values = {
        **SMALL,
        "model.backbone": "vim_nano_patch8_64",
        "data.image_size": "64",
        "trainer.limit_train_batches": "1",
    }
    given = ["fit", "--config", "vtab/cifar", "--method", file, *arguments(values)]
    done = subprocess.run([script, *given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("results/records/vtab/cifar").glob("last_blocks-*.json"))) == 1


def test_a_method_that_cannot_be_imported_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    file = write(tmp_path / "m.yaml", model__method={"class_path": "nowhere_at_all.Mine"})
    line = assert_error(command(*small("--method", file)), 2)
    assert f"{file}:3: model.method" in line
    assert "No module named 'nowhere_at_all'" in line
    assert "next to the method file" in line


def test_a_module_of_ones_own_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    file = own_method(tmp_path / "mine", "own_broken", "LastBlocks")
    with (tmp_path / "mine/own_broken.py").open("a") as module:
        module.write("\nx = (\n")
    line = assert_error(command(*small("--method", file)), 2)
    assert "the module of the method 'own_broken.LastBlocks' fails" in line
    assert "SyntaxError: '(' was never closed" in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("return sum(", "return 1 + sum(", "parameters train outside the head; correct the formula"),
        ("self.tail = tail", "self.size = tail", "keep each constructor argument as an attribute of its name"),
        ("self.tail = tail", "self.tail = {tail}", "its settings must be plain numbers, texts, lists and mappings"),
        ("def adapter_parameters", "def other", "must define adapter_parameters(model)"),
    ],
)
def test_a_method_of_ones_own_is_held_to_its_promises(
    old: str, new: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    stem = f"own_{abs(hash(new))}"
    file = own_method(tmp_path / "mine", stem, "LastBlocks")
    module = tmp_path / f"mine/{stem}.py"
    text = module.read_text()
    assert old in text
    module.write_text(text.replace(old, new).replace("model.depth - self.tail", "model.depth - 1"))
    line = assert_error(command(*small("--method", file)), 2)
    assert words in line
    assert "LastBlocks" in line
    assert not Path("runs").exists()


# ---- names of configs


def test_a_mistyped_task_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    Path("mine.yaml").write_text("data:\n  taks: vtab/dtd\n")
    line = assert_error(command("fit", "--config", "mine.yaml"), 2)
    assert "mine.yaml:2: unknown config key 'data.taks'; did you mean 'data.task'?" in line


@pytest.mark.parametrize(
    "name", ["configs/vtab/dtd.yaml", "./configs/vtab/dtd.yaml", "vtab/dtd.yaml", "vtab/dtd", "configs/vtab/dtd"]
)
def test_a_shipped_config_is_found_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == configs_dir() / "vtab" / "dtd.yaml"


def test_a_file_at_hand_goes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs/vtab").mkdir(parents=True)
    Path("configs/vtab/dtd.yaml").write_text("data: {task: vtab/svhn}\n")
    assert layers("--config", "configs/vtab/dtd.yaml").get("data.task") == "vtab/svhn"
    assert layers("--config", "vtab/dtd").get("data.task") == "vtab/dtd"


@pytest.mark.parametrize("name", ["", ".", "vtab", "../configs/vtab/dtd", "vtab/dtdd", "/vtab/dtd", "configs"])
def test_what_is_no_config_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^unknown config file "):
        find_config(name)


def test_a_mistyped_config_gets_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, hint in (("configs/vtab/dtdd.yaml", "configs/vtab/dtd.yaml"), ("vtab/svh", "vtab/svhn")):
        with pytest.raises(UsageError, match=rf"^unknown config file '{name}'; did you mean '{hint}'\?$"):
            find_config(name)


# ---- the command line


def test_flags_are_split() -> None:
    flags = split_flags(
        [
            "--config",
            "a",
            "--data.task=b",
            "--method=c",
            "-c",
            "d",
            "--no_test",
            "--trainer.max_epochs",
            "-1",
            "--x",
            "y z",
        ]
    )
    assert flags.configs == ("a", "d")
    assert flags.method == "c"
    assert flags.rest == ("--data.task=b", "--no_test", "--trainer.max_epochs", "-1", "--x", "y z")
    assert flags.values == {"data.task": "b", "no_test": "", "trainer.max_epochs": "-1", "x": "y z"}


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=6))
def test_any_command_line_is_split_or_refused_in_one_line(argv: list[str]) -> None:
    try:
        flags = split_flags(argv)
    except UsageError:
        return
    taken = 2 * len(flags.configs) + 2 * bool(flags.method)
    assert len(argv) - taken <= len(flags.rest) <= len(argv)


def test_a_saved_config_gives_nothing_of_its_recipe_to_another_method(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(
        "model:\n  method:\n    class_path: svp_bench.methods.vpt.VPTDeep\n    init_args: {length: 3}\n"
        "  label_smoothing: 0.3\n  learning_rate: 7.0\n  backbone: vim_tiny_patch16_224\n"
        "data:\n  task: vtab/dtd\n",
        encoding="utf-8",
    )
    composed = compose(split_flags(["--config", str(saved), "--method", "svp"]))
    fresh = compose(split_flags(["--config", "configs/vtab/dtd.yaml", "--method", "svp"]))
    assert composed.get("model.label_smoothing") == fresh.get("model.label_smoothing") == 0.0
    assert composed.get("model.learning_rate") == fresh.get("model.learning_rate")
    assert composed.get("model.method") == fresh.get("model.method")
    assert composed.get("model.backbone") == "vim_tiny_patch16_224"
    assert any("--method brings its own recipe" in notice for notice in composed.notices)


def test_one_batch_is_one_batch_whatever_was_imported_before() -> None:
    """scikit-learn's types make typing spell Optional[Union[int, float]] the other way round."""
    code = (
        "import sklearn.linear_model\n"
        "from svp_bench.config.compose import compose, split_flags\n"
        "from svp_bench.train.parser import resolve\n"
        "given = ['--config', 'configs/demo/size.yaml', '--trainer.limit_train_batches', '1']\n"
        "print(repr(resolve(compose(split_flags([*given, '--trainer.limit_test_batches', '0.5']))).config['trainer']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'limit_train_batches': 1," in done.stdout
    assert "'limit_test_batches': 0.5," in done.stdout
