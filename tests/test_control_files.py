"""Controls of equal size or cost as method files: their counts on Vim-S, and the head on random features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_error, command, run, settle, small

from svp_bench.config.compose import method_layer
from svp_bench.core.registry import import_object
from svp_bench.core.resources import configs_dir
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.checks import trained_parameters
from svp_bench.train.efficiency import count_macs

FILES = "configs/method/controls"


def cost(method: str) -> tuple[int, int]:
    """Trained parameters without the head on Vim-S, and multiplications of inference beyond those of the backbone."""
    node: dict[str, Any] = method_layer(method)[0]["model"]["method"]
    with torch.device("meta"):
        plain, model = (create_backbone("vim_small_patch16_224", num_classes=10) for _ in range(2))
    adapt(model, import_object(node["class_path"])(**node["init_args"]))
    adapt(plain, import_object("svp_bench.methods.linear.Linear")())
    count = sum(p.numel() for name, p in trained_parameters(model).items() if not name.startswith("head."))
    return count, count_macs(model)[0] - count_macs(plain)[0]


def test_the_costs_of_the_controls() -> None:
    found = {path.stem: cost(f"{FILES}/{path.name}") for path in (configs_dir() / "method/controls").iterdir()}
    svp = cost("svp")
    assert svp == (1_644_288, 929_562_624)
    assert found == {
        "lora_in_out_64": (4_718_592, 929_562_624),
        "adapter_svp_parameters": (1_651_800, 323_168_256),
        "adapter_svp_macs": (4_733_952, svp[1]),
        "linear_random_features": (0, 0),
    }
    narrower = 24 * (2 * 384 * 88 + 88 + 384)
    assert abs(found["adapter_svp_parameters"][0] - svp[0]) < abs(narrower - svp[0])  # the nearest width
    assert cost("offset")[1] == 0  # no size of it has SVP's multiplications


@pytest.mark.parametrize("path", sorted((configs_dir() / "method/controls").iterdir()), ids=lambda path: path.stem)
def test_a_control_differs_from_its_method_in_its_settings_alone(path: Path) -> None:
    ours = method_layer(str(path))[0]["model"]
    name = ours["method"]["class_path"].split(".")[-2]
    theirs = method_layer(name)[0]["model"]
    assert {key: ours[key] for key in ("learning_rate", "weight_decay")} == {
        k: theirs[k] for k in theirs if k != "method"
    }
    assert ours["method"]["init_args"].keys() == theirs["method"]["init_args"].keys()


def test_the_head_on_random_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    method = ("--method", f"{FILES}/linear_random_features.yaml")
    record = run(*small(*method, model__checkpoint=None)).record
    assert record["config"]["model"]["checkpoint"] == "none"
    assert (record["method"], record["parameters"]["adapter"]) == ("linear", 0)
    same = run(*small("--method", "linear")).record  # the same setting: --model.checkpoint none
    assert record["setting_digest"] == same["setting_digest"]
    message = assert_error(command(*small(*method, model__checkpoint="embedded")), 2)
    assert "is a control with random weights; leave out model.checkpoint embedded" in message
