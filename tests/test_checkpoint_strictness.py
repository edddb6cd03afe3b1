"""A load copies exactly what it should or changes nothing: hostile, odd and mutated state dicts."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoints import State, nano, refusal, resized, trained
from tolerances import SAME_MATHS, relative_error
from torch import Tensor, nn

from svp_bench.core.errors import CheckpointError, UsageError
from svp_bench.methods.build import adapt
from svp_bench.methods.linear import Linear
from svp_bench.methods.svp import SVP
from svp_bench.models.checkpoints import load_checkpoint, save_weights
from svp_bench.models.weight_files import read_weights


def filled(**arguments: Any) -> State:
    return {name: value.clone() for name, value in trained(**arguments).state_dict().items()}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def without_head(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


# --------------------------------------------------------------------------------------------- grids of positions


@pytest.mark.parametrize("size", [(32, 128), (128, 32), (16, 256)])
def test_equal_count_and_another_grid_is_resized(size: tuple[int, int], tmp_path: Path) -> None:
    source = trained(img_size=64)
    with torch.no_grad():
        source.pos_embed[0, 8] = 1e4  # the class token's row
    model = nano(img_size=size)
    assert model.pos_embed.shape == source.pos_embed.shape
    report = load_checkpoint(model, saved(source.state_dict(), tmp_path / "vim.pth"))
    grid = (size[0] // 16, size[1] // 16)
    assert report.pos_embed_resized == ((4, 4), grid)
    assert report.for_record() == {"resized": [f"pos_embed 4x4 -> {grid[0]}x{grid[1]}"]}
    assert f"resized pos_embed 4x4 -> {grid[0]}x{grid[1]}" in str(report.describe())
    assert torch.equal(model.pos_embed[0, 8], torch.full((32,), 1e4))
    others = [row for row in range(17) if row != 8]
    expected = resized(source.pos_embed.detach(), 4, *grid)
    assert relative_error(model.pos_embed[:, others], expected[:, others]) <= SAME_MATHS


@pytest.mark.parametrize("size", [64, (32, 128), (48, 32), (16, 16)])
def test_a_saved_file_states_its_grid(size: Any, tmp_path: Path) -> None:
    source = trained(img_size=size)
    path = tmp_path / "vim.safetensors"
    save_weights(source, path)
    model = nano(img_size=size)
    report = load_checkpoint(model, path, "keep")
    assert report.pos_embed_resized is None
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_of_a_wide_grid_fit_a_square_model_and_back(tmp_path: Path) -> None:
    wide = trained(img_size=(32, 128))
    save_weights(wide, tmp_path / "wide.safetensors")
    assert load_checkpoint(nano(img_size=64), tmp_path / "wide.safetensors").pos_embed_resized == ((2, 8), (4, 4))
    next_to_it = saved({"model": wide.state_dict(), "pos_embed_grid": [2, 8]}, tmp_path / "wide.pth")
    assert load_checkpoint(nano(img_size=(32, 128)), next_to_it).pos_embed_resized is None


@pytest.mark.parametrize("stated", ["4x5", "x", "4", [2], [2, 8, 1], [2.0, 8.0], [-2, -8], "0x16", 16, "2x8\n", {}])
def test_a_grid_that_is_none_is_one_line(stated: Any, tmp_path: Path) -> None:
    path = saved({"model": filled(img_size=64), "pos_embed_grid": stated}, tmp_path / "vim.pth")
    assert "pos_embed_grid" in refusal(nano(img_size=64), path)


def test_a_grid_that_is_neither_square_nor_stated_says_how_to_state_it(tmp_path: Path) -> None:
    path = saved(filled(img_size=(32, 48)), tmp_path / "vim.pth")
    for size in (48, (32, 48)):
        text = refusal(nano(img_size=size), path)
        assert "6 patches, which is not a square grid" in text
        assert "save_weights" in text
        assert "pos_embed_grid" in text


@pytest.mark.parametrize(
    "shape", [(0,), (10, 32), (1, 10, 32, 1), (1, 10, 31), (2, 10, 32), (0, 10, 32), (1, 0, 32), (1, 1, 32), ()]
)
def test_odd_shapes_of_positions_are_one_line(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = {**filled(), "pos_embed": torch.ones(shape)}
    assert "pos_embed" in refusal(nano(), saved(state, tmp_path / "vim.pth"))


def test_positions_without_end_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    began = time.perf_counter()
    row = torch.ones(1, 1, 32)
    state = {**filled(), "pos_embed": row.expand(1, 6000 * 6000 + 1, 32)}
    assert "overlap in memory" in refusal(nano(), saved(state, tmp_path / "vim.pth"))
    state["pos_embed"] = torch.ones(1, 300 * 300 + 1, 32)
    assert "65536" in refusal(nano(), saved(state, tmp_path / "vim.pth"))
    assert time.perf_counter() - began < 20


def test_weights_of_another_stride_are_reported(tmp_path: Path) -> None:
    path = saved(filled(img_size=96, stride=8), tmp_path / "vim.pth")
    assert load_checkpoint(nano(img_size=96), path).resized == ("pos_embed 11x11 -> 6x6",)


# ----------------------------------------------------------------------------------------- what is not weights


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


ODD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "complex": (lambda w: w.to(torch.complex64), "complex64"),
    "bool": (lambda w: w > 0, "bool"),
    "int64": (lambda w: w.to(torch.int64), "int64"),
    "int8": (lambda w: w.to(torch.int8), "int8"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "nan": (lambda w: w.clone().index_fill_(0, torch.tensor([1]), float("nan")), "NaN"),
    "inf": (lambda w: w.clone().index_fill_(0, torch.tensor([0]), float("-inf")), "infinite"),
    "too large": (lambda w: w.double().index_fill_(0, torch.tensor([0]), 1e300), "beyond float32"),
    "sparse": (lambda w: w.to_sparse(), "sparse"),
    "csr": (lambda w: torch.ones(3, 64).to_sparse_csr(), "sparse"),
    "meta": (lambda w: w.to("meta"), "meta"),
    "quantised": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "quantised"),
    "nested": (lambda w: nested(), "nested"),
    "expanded": (lambda w: w[:1].expand(64), "overlap"),
    "overlapping": (lambda w: torch.as_strided(torch.ones(65), (64, 2), (1, 1)), "overlap"),
    "text": (lambda w: "x", "str"),
    "dict": (lambda w: {}, "dict"),
    "none": (lambda w: None, "NoneType"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["layers.0.mixer.D", "norm_f.weight"])
def test_what_is_not_weights_is_refused_by_name(kind: str, name: str, tmp_path: Path) -> None:
    make, word = ODD[kind]
    state: dict[str, Any] = filled()
    state[name] = make(torch.linspace(-2, 2, 64 if name.endswith("D") else 32))
    text = refusal(nano(), saved({"model": state}, tmp_path / "vim.pth"))
    assert name in text
    assert word in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_cast_and_reported(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in filled().items()}
    model = nano()
    report = load_checkpoint(model, saved(state, tmp_path / "vim.pth"))
    count = len(without_head(state))
    text = f"{str(dtype).removeprefix('torch.')} -> float32 ({count} tensors)"
    assert report.cast == (text,)
    assert report.for_record() == {"cast": [text]}
    assert all(
        torch.equal(value, state[name].float()) for name, value in model.state_dict().items() if "head" not in name
    )


def test_positions_of_half_precision_are_resized_in_single(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in filled().items()}
    model = nano(img_size=80)
    load_checkpoint(model, saved(state, tmp_path / "vim.pth"))
    expected = resized(state["pos_embed"].float(), 3, 5, 5)
    others = [row for row in range(26) if row != 12]
    assert relative_error(model.pos_embed[:, others], expected[:, others]) <= SAME_MATHS


def test_a_copy_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = nano()
    model.norm_f.weight = nn.Parameter(torch.ones(1).expand(32), requires_grad=False)  # cannot be written to
    text = refusal(model, saved(filled(), tmp_path / "vim.pth"))
    assert "norm_f.weight could not be copied" in text
    assert "the model is unchanged" in text


def test_a_model_without_numbers_takes_none(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nano()
    with pytest.raises(CheckpointError, match="the model is on the meta device"):
        load_checkpoint(model, saved(filled(), tmp_path / "vim.pth"))


# ------------------------------------------------------------------------------------------------ safetensors


def safetensors_file(path: Path, entries: list[tuple[str, str, list[int], bytes]]) -> Path:
    parts, at = [], 0
    for name, dtype, shape, content in entries:
        place = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        parts.append(f"{json.dumps(name)}:{json.dumps(place)}")
        at += len(content)
    header = ("{" + ",".join(parts) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(content for *_, content in entries))
    return path


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("F8_E4M3", 1), ("F8_E5M2", 1), ("I64", 8), ("BOOL", 1), ("U8", 1), ("C64", 8), ("F8_E8M0", 1), ("F4", 1)],
)
def test_safetensors_of_other_types_are_refused_by_name(dtype: str, size: int, tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "a.safetensors", [("layers.0.mixer.D", dtype, [2], bytes(2 * size))])
    text = refusal(nano(), path)
    assert "layers.0.mixer.D" in text
    assert dtype in text


def test_safetensors_with_a_name_twice_and_with_nan(tmp_path: Path) -> None:
    twice = [("w", "F32", [1], bytes(4)), ("w", "F32", [1], bytes(4))]
    assert "w appears 2 times" in refusal(nano(), safetensors_file(tmp_path / "a.safetensors", twice))
    state = filled()
    state["layers.1.mixer.D"][3] = float("nan")
    save_file(state, tmp_path / "b.safetensors")
    assert "layers.1.mixer.D holds NaN" in refusal(nano(), tmp_path / "b.safetensors")


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    save_file(filled(), tmp_path / "a.bin")
    assert read_weights(tmp_path / "a.bin").tensors.keys() == filled().keys()


# ------------------------------------------------------------------------------------------ names and containers


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "backbone.", "module._orig_mod.", "model.module."]
)
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    state = filled()
    path = saved({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "vim.pth")
    model = nano()
    load_checkpoint(model, path, "keep")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model_state_dict": s, "epoch": 3},
        lambda s: {"model_ema": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"state_dict": s, "model_ema": {k: v + 1 for k, v in s.items()}},
        lambda s: {"state_dict": s, "model": {"width": 32}, "optimizer": {"state": {}}},
    ],
)
def test_containers_are_opened(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    state = filled()
    model = nano()
    load_checkpoint(model, saved(wrap(state), tmp_path / "vim.pth"), "keep")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_two_spellings_of_a_name_are_refused(tmp_path: Path) -> None:
    for other in ("module.norm_f.weight", "model._orig_mod.norm_f.weight", "backbone.norm_f.weight"):
        for order in (1, -1):
            items = [*filled().items(), (other, torch.ones(32))][::order]
            text = refusal(nano(), saved(dict(items), tmp_path / "vim.pth"))
            assert "norm_f.weight" in text
            assert other in text
            assert "two spellings" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": filled(), "state_dict": filled()}, ["'model'", "'state_dict'", "save one of them"]),
        ({"weights": filled()}, ["'weights' is a dict", "weights are under weights", "model_state_dict"]),
        ({f"encoder.{k}": v for k, v in without_head(filled()).items()}, ["names begin with encoder.", "module."]),
        ({"model": {}}, ["an empty dict under ['model']"]),
        ({"epoch": 3, "w": torch.ones(1)}, ["not a state dict: 'epoch' is a int"]),
        ({"model": {"model": {"model": {"model": {"model": filled()}}}}}, ["is a dict"]),
        ({3: torch.ones(1)}, ["the name 3 is a int"]),
        ({("a", 1): torch.ones(1)}, ["the name ('a', 1) is a tuple"]),
        ({None: torch.ones(1)}, ["the name None is a NoneType"]),
        ({"x" * 10**6: torch.ones(1)}, ["left over"]),
        ({"a\nb\x1b[31m": torch.ones(1)}, ["a\\nb"]),
        ({"layers." + "9" * 5000 + ".mixer.A_b_log": torch.ones(1), "norm_f.weight": torch.tensor(1.0)}, ["missing"]),
        ([filled()], ["holds list"]),
        ("weights", ["holds str"]),
        (None, ["holds NoneType"]),
        (7, ["holds int"]),
    ],
)
def test_other_layouts_are_one_line_that_names_them(content: Any, words: list[str], tmp_path: Path) -> None:
    text = refusal(nano(), saved(content, tmp_path / "vim.pth"))
    assert all(word in text for word in words), text
    assert len(text) < 1500
    assert text.isprintable()


def test_a_container_of_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    assert "is a dict" in refusal(nano(), saved(content, tmp_path / "vim.pth"))


@pytest.mark.parametrize("method", [SVP, Linear])
def test_the_trained_part_of_a_run_is_no_backbone(method: Any, tmp_path: Path) -> None:
    model = adapt(trained(), method())
    part = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    text = refusal(nano(), saved({"state_dict": part, "svp_bench": {"task": "x"}}, tmp_path / "last.ckpt"))
    assert "predict --ckpt" in text


def test_weights_with_an_adapter_are_not_saved_as_a_backbone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="adapter"):
        save_weights(adapt(nano(), SVP()), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="safetensors"):
        save_weights(nano(), tmp_path / "a.pth")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        save_weights(nano(), tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!doctype html><title>404</title>", "HTML"),
        (b"hello", "neither torch.save nor safetensors"),
        (b"\x89PNG\r\n\x1a\n", "neither torch.save nor safetensors"),
        (b"PK\x03\x04", "not a checkpoint"),
    ],
)
def test_junk_and_pickled_code_are_told_apart(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "vim.pth"
    path.write_bytes(content)
    text = refusal(nano(), path)
    assert words in text
    assert "pickled code" not in text


# ------------------------------------------------------------------------------------------------------- fuzzing

_STATE = filled()
_NAMES = sorted(without_head(_STATE))


def _mutations() -> st.SearchStrategy[tuple[str, str, Callable[[Tensor], Any]]]:
    values: list[tuple[str, Callable[[Tensor], Any]]] = [(kind, make) for kind, (make, _) in ODD.items()]
    values += [
        ("double", lambda w: w.double()),
        ("half", lambda w: w.half()),
        ("transposed", lambda w: w.t().contiguous().t() if w.ndim == 2 else w),
        ("strided", lambda w: torch.stack([w, w], dim=-1)[..., 0]),
        ("another shape", lambda w: w[..., :-1]),
        ("one more axis", lambda w: w[None]),
        ("no axis", lambda w: w.flatten()[0]),
        ("empty", lambda w: w[..., :0]),
        ("gone", lambda w: ...),
        ("elsewhere", lambda w: ...),
        ("prefixed", lambda w: w),
        ("twice", lambda w: w),
    ]
    return st.tuples(st.sampled_from(_NAMES), st.sampled_from(values)).map(lambda pair: (pair[0], *pair[1]))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(_mutations(), max_size=3), data=st.data())
def test_a_load_is_exact_or_changes_nothing(mutations: list[Any], data: st.DataObject, tmp_path: Path) -> None:
    state: dict[Any, Any] = dict(_STATE)
    for name, kind, make in mutations:
        if not isinstance(state.get(name), Tensor):
            continue
        prefix = data.draw(st.sampled_from(["module.", "model.", "_orig_mod.", "encoder."]))
        try:
            value = make(state[name])
        except (RuntimeError, IndexError):  # an axis that is not there
            continue
        if kind in ("gone", "elsewhere", "prefixed"):
            value = state.pop(name)
        if kind == "elsewhere":
            state["elsewhere"] = value
        elif kind in ("prefixed", "twice"):
            state[prefix + name] = value
        elif kind != "gone":
            state[name] = value
    wrap = data.draw(st.sampled_from([lambda s: s, lambda s: {"model": s}, lambda s: {"model_state_dict": s}]))
    try:
        torch.save(wrap(state), tmp_path / "vim.pth")
    except (RuntimeError, NotImplementedError):  # not everything can be saved
        return
    model = nano()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = ""
    try:
        report = load_checkpoint(model, tmp_path / "vim.pth")
    except CheckpointError as error:
        text = str(error)
    if text:
        assert text.isprintable()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    assert report.resized == ()
    plain = {str(name).split("module.")[-1].split("model.")[-1].split("_orig_mod.")[-1]: v for name, v in state.items()}
    for name, value in model.state_dict().items():
        expected = before[name] if name.startswith("head.") else plain[name].to(torch.float32)
        assert torch.equal(value, expected), name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 40), size=st.tuples(st.integers(16, 80), st.integers(16, 80)))
def test_any_number_of_rows_fits_or_is_refused(rows: int, size: tuple[int, int], tmp_path: Path) -> None:
    state = {**_STATE, "pos_embed": reference_vim.sample("pos_embed", torch.Size([1, rows, 32]))}
    path = saved(state, tmp_path / "vim.pth")
    model = nano(img_size=size)
    if rows - 1 in (1, 4, 9, 16, 25, 36):
        side = round((rows - 1) ** 0.5)
        report = load_checkpoint(model, path)
        grid = (size[0] // 16, size[1] // 16)
        assert report.pos_embed_resized == (None if grid == (side, side) else ((side, side), grid))
        assert torch.equal(model.pos_embed[0, model.cls_index], state["pos_embed"][0, (rows - 1) // 2])
    else:
        assert "pos" in refusal(model, path)
