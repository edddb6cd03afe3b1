"""Multiplications per image: the formulas against counted multiplications, and whole models against sums by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import run, settle, small

from svp_bench import load_results
from svp_bench.core.errors import ConfigError
from svp_bench.core.registry import import_object
from svp_bench.core.resources import configs_dir
from svp_bench.methods import METHODS, create_model, list_methods
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.ops import causal_conv1d, selective_scan
from svp_bench.ops.macs import counting, scan_macs
from svp_bench.train.efficiency import count_macs


class Counted:
    """A number that counts the multiplications it takes part in."""

    count = 0

    def __init__(self, value: float = 0.5) -> None:
        self.value = value

    def __mul__(self, other: Counted) -> Counted:
        Counted.count += 1
        return Counted(self.value * other.value)

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.value + other.value)

    def exp(self) -> Counted:
        return Counted(2.718**self.value)


def numbers(*shape: int) -> Any:
    return [numbers(*shape[1:]) for _ in range(shape[0])] if shape else Counted()


def written_out(length: int, channels: int, states: int, trains_a: bool) -> tuple[int, int]:
    """Return the multiplications of a scan forward and backward, one number at a time."""
    u, delta, A = numbers(length, channels), numbers(length, channels), numbers(channels, states)
    B, C, D, dy = numbers(length, states), numbers(length, states), numbers(channels), numbers(length, channels)
    saved: Any = {}
    Counted.count = 0
    for e in range(channels):
        h = [Counted(0.0)] * states
        for t in range(length):
            du = delta[t][e] * u[t][e]
            y = D[e] * u[t][e]
            for n in range(states):
                decay = (delta[t][e] * A[e][n]).exp()
                before, h[n] = h[n], decay * h[n] + du * B[t][n]
                y = y + C[t][n] * h[n]
                saved[e, t, n] = decay, before, h[n], du
    forward, Counted.count = Counted.count, 0
    for e in range(channels):
        g = [Counted(0.0)] * states  # gradient of h from the next step
        for t in reversed(range(length)):
            d_delta, d_du = Counted(0.0), Counted(0.0)
            for n in range(states):
                decay, before, h_now, du = saved[e, t, n]
                dh = g[n] + dy[t][e] * C[t][n]
                _ = dy[t][e] * h_now  # of C
                d_decay = dh * before
                d_exponent = d_decay * decay
                d_delta = d_delta + d_exponent * A[e][n]
                if trains_a:
                    _ = d_exponent * delta[t][e]  # of A
                _ = dh * du  # of B
                d_du = d_du + dh * B[t][n]
                g[n] = dh * decay
            _ = d_delta + d_du * u[t][e]
            _ = d_du * delta[t][e] + dy[t][e] * D[e]  # of u
            _ = dy[t][e] * u[t][e]  # of D
    return forward, Counted.count


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 4), (5, 3, 2)])
@pytest.mark.parametrize("trains_a", [False, True])
def test_the_scan_formula_is_a_count_of_multiplications(sizes: tuple[int, int, int], trains_a: bool) -> None:
    forward, backward = written_out(*sizes, trains_a)
    assert scan_macs(*sizes) == forward
    assert scan_macs(*sizes, backward=True, trains_a=trains_a) == backward


def test_operations_are_counted_and_not_computed() -> None:
    u, B, A = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 3, 5), -torch.rand(6, 3)
    with counting() as counter:
        y = selective_scan(u, torch.rand(2, 6, 5), A, B, B, torch.ones(6), torch.rand(2, 6, 5))
        assert y.shape == u.shape
        assert counter.macs == 2 * (scan_macs(5, 6, 3) + 5 * 6)
        y.sum().backward()
        assert counter.macs == 2 * (scan_macs(5, 6, 3) + scan_macs(5, 6, 3, backward=True) + 3 * 5 * 6)
        before = counter.macs
        assert causal_conv1d(u, torch.randn(6, 4)).shape == u.shape
        assert counter.macs - before == u.numel() * 4
    assert u.grad is not None
    assert selective_scan(u, torch.rand(2, 6, 5), A, B, B).abs().sum() > 0  # computed again


def test_vim_nano_by_hand() -> None:
    """Width 64, inner width 128, 8 states, rank 4, depth 8, 65 tokens, 64 patches of 8 × 8, 10 classes."""
    model = create_backbone("vim_nano_patch8_64", num_classes=10)
    one_way = 4 * 128 + 128 * (4 + 16) + 4 * 128 + 4 * 8 * 128 + 2 * 128  # convolution, x_proj, dt_proj, scan
    block = 65 * (64 * 256 + 2 * one_way + 128 + 128 * 64)
    expected = 64 * 192 * 64 + 8 * block + 64 * 10
    assert count_macs(model)[0] == expected


def test_deit_small_has_the_published_4_6_giga_macs() -> None:
    model = create_backbone("deit_small_patch16_224", num_classes=1000)
    assert count_macs(model)[0] == pytest.approx(4.6e9, rel=0.01)


def test_the_nano_models_cost_the_same() -> None:
    """The ViT was sized before any result: parameters and MACs within 10 % of the Vim's."""
    vim, vit = (create_backbone(f"{family}_nano_patch8_64", num_classes=10) for family in ("vim", "vit"))
    assert count_macs(vit)[0] == pytest.approx(count_macs(vim)[0], rel=0.1)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (vim, vit)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_training_costs_follow_what_trains() -> None:
    costs = {}
    for method in ("linear", "svp", "lora", "full"):
        model = create_model("vim_nano_patch8_64", num_classes=10, method=method)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        costs[method] = count_macs(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert costs["linear"][1] == costs["linear"][0] + 64 * 10  # the head's gradient alone
    assert costs["full"][0] == costs["linear"][0] < costs["svp"][0]
    assert 2.4 < costs["full"][1] / costs["full"][0] < 3.2
    late = create_model("vim_nano_patch8_64", num_classes=10, method="svp", depths=[7])
    assert count_macs(late)[1] < costs["svp"][1] / 1.5  # seven blocks need no gradient


def test_the_cost_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    record = run(*small("--method", "lora")).record
    assert record["efficiency"]["mergeable"] is True
    assert record["efficiency"]["stored_bytes"] == 4 * record["parameters"]["trainable"]
    assert record["efficiency"]["training_macs"] > record["efficiency"]["inference_macs"] > 0


def test_tables_and_report_have_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    for method in ("lora", "offset"):
        run(*small("--method", method, model__checkpoint="none"))
    run("table")
    page = (tmp_path / "results" / "tables" / "vtab1k.md").read_text(encoding="utf-8")
    block = page.partition("### Cost")[2]
    assert "| method | trainable w/o head | head | stored | merges | inference MACs | training MACs |" in block
    assert {line.split("|")[5].strip() for line in block.splitlines() if line.startswith(("| lora", "| offset"))} == {
        "yes",
        "no",
    }
    lines = list(csv.DictReader((tmp_path / "results" / "tables" / "vtab1k.csv").open(encoding="utf-8")))
    by_method = {line["method"]: line for line in lines}
    assert by_method["lora"]["mergeable"] == "yes"
    frame = load_results(tmp_path / "results").set_index("method")
    assert frame.loc["lora", "backbone_family"] == "vim"
    assert frame.loc["lora", "mergeable"]
    assert int(by_method["lora"]["training_macs_max"]) > int(by_method["lora"]["inference_macs_min"]) > 0


@pytest.mark.parametrize("backbone", ["vim_nano_patch8_64", "vit_nano_patch8_64"])
def test_every_shipped_method_and_recipe_is_counted(backbone: str) -> None:
    """A count that fails is null in the record; none of ours may."""
    folder = configs_dir() / "method"
    fitting = {METHODS.entry(name).target.replace(":", ".") for name in list_methods(backbone)}
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.yaml"))]
    counted = 0
    for recipe in recipes:
        given = recipe["model"]["method"]
        if given["class_path"] not in fitting:
            continue
        method = import_object(given["class_path"])(**given.get("init_args", {}))
        try:
            model = adapt(create_backbone(backbone, num_classes=10), method)
        except ConfigError:  # a row of MambaPEFT on a ViT, or more blocks or tokens than this small model has
            continue
        inference, training = count_macs(model)
        assert training > inference > 0
        counted += 1
    assert counted >= (30 if backbone.startswith("vim") else 15)
