"""Reading weights safely, and loading them strictly."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import timm
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import SAME_MATHS, relative_error
from torch import Tensor

import svp_bench
from svp_bench.core.errors import CheckpointError, ConfigError, UsageError
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.svp import SVP
from svp_bench.models import VisionMamba, checkpoints
from svp_bench.models.checkpoints import backbone_digest, load_checkpoint, resolve_checkpoint
from svp_bench.models.weight_files import read_weights

State = dict[str, Tensor]


def nano(num_classes: int = 5, **arguments: Any) -> VisionMamba:
    sizes: dict[str, Any] = {"img_size": 48, "embed_dim": 32, "depth": 2, "d_state": 4}
    return VisionMamba(num_classes=num_classes, **{**sizes, **arguments}).eval()


def trained(num_classes: int = 5, **arguments: Any) -> VisionMamba:
    model = nano(num_classes, **arguments)
    reference_vim.fill(model)
    return model


def published(model: VisionMamba, prefix: str = "") -> dict[str, Any]:
    """What Vim's training script saves."""
    state = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, *model.patch_embed.img_size)).sum().backward()
    optimizer.step()
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"_step": 3},
        "epoch": 299,
        "model_ema": {name: torch.zeros_like(value) for name, value in state.items()},
        "scaler": {},
        "args": argparse.Namespace(lr=1e-3, model="vim", data_path=None, betas=(0.9, 0.999)),
    }


def assert_equal(model: VisionMamba, state: State, *, but: tuple[str, ...] = ()) -> None:
    for name, value in model.state_dict().items():
        if not name.startswith(but or ("adapter.",)):
            assert torch.equal(value, state[name]), name


def refusal(model: VisionMamba, path: Path, head: Any = None) -> str:
    """The one-line message of a refused load, which must leave the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path, head)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed by a refused load"
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


# ---------------------------------------------------------------------------------------- what can be read


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", ["published", "module", "plain", "state_dict", "half"])
def test_forms_of_pickled_files(form: str, legacy: bool, tmp_path: Path) -> None:
    source = trained()
    state = {name: value.clone() for name, value in source.state_dict().items()}
    if form == "half":
        state = {name: value.half() for name, value in state.items()}
    content: Any = {
        "published": lambda: published(source),
        "module": lambda: published(source, prefix="module."),
        "plain": lambda: state,
        "state_dict": lambda: {"state_dict": state, "epoch": 3},
        "half": lambda: state,
    }[form]()
    path = tmp_path / "vim.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    model = nano()
    report = svp_bench.load_checkpoint(model, path)
    assert (report.path, report.head_replaced, report.pos_embed_resized) == (path, True, None)
    assert report.dropped == ("head.bias", "head.weight")
    assert model.load_report == report
    assert_equal(model, {name: value.float() for name, value in state.items()}, but=("head.",))
    kept = svp_bench.load_checkpoint(model, path, head="keep")
    assert (kept.kept, kept.head_replaced) == (("head.bias", "head.weight"), False)
    assert_equal(model, {name: value.float() for name, value in state.items()})
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_weights_loaded_under_a_method_leave_its_part_alone(tmp_path: Path) -> None:
    source = trained()
    path = tmp_path / "vim.pth"
    torch.save(published(source), path)
    state = {name: value.clone() for name, value in torch.load(path, weights_only=False)["model"].items()}
    model = adapt(nano(), SVP())
    adapter = {name: reference_vim.sample(name, value.shape) for name, value in model.adapter.state_dict().items()}  # type: ignore[union-attr]
    model.adapter.load_state_dict(adapter)  # type: ignore[union-attr]
    load_checkpoint(model, path, head="keep")
    assert_equal(model, state)
    assert all(torch.equal(value, adapter[name]) for name, value in model.adapter.state_dict().items())  # type: ignore[union-attr]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith(("adapter.", "head."))
    }


def test_timm_loads_a_file_by_itself(tmp_path: Path) -> None:
    source = timm.create_model("vim_nano_patch8_64")
    reference_vim.fill(source)
    path = tmp_path / "nano.pth"
    torch.save({"model": source.state_dict()}, path)
    overlay = {"file": str(path), "custom_load": True}
    model = timm.create_model("vim_nano_patch8_64", pretrained=True, pretrained_cfg_overlay=overlay)
    assert_equal(model, source.state_dict())


# -------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize(("theirs", "ours"), [(5, 5), (7, 5), (7, 1), (7, 0)])
@pytest.mark.parametrize("head", [None, "fresh"])
def test_the_head_of_a_file_is_left_out(head: Any, theirs: int, ours: int, tmp_path: Path) -> None:
    source = trained(theirs)
    path = tmp_path / "vim.pth"
    torch.save(source.state_dict(), path)
    model = nano(ours)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_checkpoint(model, path, head)
    assert report.head_replaced
    assert (report.dropped, report.kept) == (("head.bias", "head.weight"), ())
    assert report.for_record() is None  # as usual: hub weights have a head of a thousand classes
    assert_equal(model, source.state_dict(), but=("head.",))
    for name in ("head.weight", "head.bias") if ours else ():
        assert torch.equal(model.state_dict()[name], before[name])


def test_the_head_of_a_file_is_kept_when_asked_for(tmp_path: Path) -> None:
    source = trained(5)
    path = tmp_path / "vim.pth"
    torch.save(source.state_dict(), path)
    model = nano(5)
    report = load_checkpoint(model, path, "keep")
    assert_equal(model, source.state_dict())
    assert report.for_record() == {"kept": [f"head {report.head_digest}"]}
    with torch.no_grad():
        source.get_parameter("head.bias")[2] += 1
    torch.save(source.state_dict(), tmp_path / "other.pth")
    assert load_checkpoint(model, tmp_path / "other.pth", "keep").head_digest != report.head_digest


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (7, 5, ["the file has a head of 7 classes", "the model has a head of 5 classes"]),
        (0, 5, ["the file has no head", "the model has a head of 5 classes"]),
        (5, 0, ["the file has a head of 5 classes", "the model has no head"]),
    ],
)
def test_a_head_that_cannot_be_kept_is_refused(theirs: int, ours: int, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "vim.pth"
    torch.save(trained(theirs).state_dict(), path)
    text = refusal(nano(ours), path, "keep")
    assert all(word in text for word in [*words, "--model.head keep"])


def test_create_model_takes_the_head_only_when_asked_for(tmp_path: Path) -> None:
    name = "vim_nano_patch8_64"
    source = timm.create_model(name, num_classes=3)
    reference_vim.fill(source)
    path = tmp_path / "nano.pth"
    torch.save(source.state_dict(), path)
    for head in (None, "fresh"):
        made = svp_bench.create_model(name, num_classes=3, method="linear", checkpoint=path, head=head)
        assert not torch.equal(made.get_parameter("head.weight"), source.get_parameter("head.weight"))
    made = svp_bench.create_model(name, num_classes=3, method="linear", checkpoint=path, head="keep")
    assert torch.equal(made.get_parameter("head.weight"), source.get_parameter("head.weight"))
    with pytest.raises(UsageError, match=r"unknown head 'kept'; did you mean 'keep'\?"):
        svp_bench.create_model(name, num_classes=3, checkpoint=path, head="kept")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.checkpoint none has no file"):
        svp_bench.create_model(name, num_classes=3, head="keep")
    with pytest.raises(CheckpointError, match="the file has no head"):
        svp_bench.create_model(name, num_classes=3, checkpoint="embedded", head="keep")


def test_a_two_layer_head_is_dropped(tmp_path: Path) -> None:
    source = trained()
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
    state |= {"head.0.weight": torch.ones(16, 32), "head.0.bias": torch.ones(16)}
    state |= {"head.1.weight": torch.ones(5, 16), "head.1.bias": torch.ones(5)}
    path = tmp_path / "svp.pth"
    torch.save({"model": state}, path)
    model = nano()
    head = model.head.weight.clone()  # type: ignore[operator, union-attr]
    assert load_checkpoint(model, path).head_replaced
    assert_equal(model, state, but=("head.",))
    assert torch.equal(model.head.weight, head)  # type: ignore[arg-type]


def test_a_file_without_head(tmp_path: Path) -> None:
    source = trained(0)
    path = tmp_path / "vim.pth"
    torch.save(source.state_dict(), path)
    model = nano(5)
    assert not load_checkpoint(model, path).head_replaced
    assert_equal(model, source.state_dict(), but=("head.",))


# -------------------------------------------------------------------------------------- position embeddings


def resized(rows: Tensor, side: int, height: int, width: int) -> Tensor:
    """An own computation: (1, side² + 1, D), class token in the middle, to a grid of height × width."""
    middle = side * side // 2
    grid = torch.empty(1, rows.shape[2], side, side)
    k = 0
    for index in range(side * side + 1):
        if index != middle:
            grid[0, :, k // side, k % side] = rows[0, index]
            k += 1
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    out = [grid[0, :, k // width, k % width] for k in range(height * width)]
    out.insert(height * width // 2, rows[0, middle])
    return torch.stack(out).unsqueeze(0)


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ({"stride": 8}, (5, 5)),
        ({"img_size": 80}, (5, 5)),
        ({"img_size": 32}, (2, 2)),
        ({"img_size": (32, 80)}, (2, 5)),
        ({"img_size": 96, "stride": 8}, (11, 11)),
    ],
    ids=str,
)
def test_positions_are_resized_with_the_class_token_apart(
    arguments: dict[str, Any], grid: tuple[int, int], tmp_path: Path
) -> None:
    source = trained()
    with torch.no_grad():
        source.pos_embed[0, 4] = 1e4  # the class token's row: in any other row it would show
    path = tmp_path / "vim.pth"
    torch.save(source.state_dict(), path)
    model = nano(**arguments)
    report = load_checkpoint(model, path)
    assert report.pos_embed_resized == ((3, 3), grid)
    middle = grid[0] * grid[1] // 2
    assert torch.equal(model.pos_embed[0, middle], torch.full((32,), 1e4))
    others = [k for k in range(grid[0] * grid[1] + 1) if k != middle]
    expected = resized(source.pos_embed.detach(), 3, *grid)
    assert relative_error(model.pos_embed[:, others], expected[:, others]) <= SAME_MATHS
    assert_equal(model, source.state_dict(), but=("pos_embed", "head."))


# ------------------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"layers.1.mixer.A_b_log": None},
            "does not fit this model (width 32, depth 2): 1 missing (layers.1.mixer.A_b_log)",
        ),
        (
            {"layers.1.mixer.D_c": torch.ones(64), "dist_token": torch.ones(1, 1, 32)},
            ": 2 left over (dist_token, layers.1.mixer.D_c)",
        ),
        (
            {"layers.0.mixer.D": torch.ones(65)},
            "1 of another shape (first layers.0.mixer.D: (65,) in the file, (64,) in the model)",
        ),
    ],
    ids=["missing", "left over", "shape"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_tensor_that_does_not_fit_is_named(
    changed: dict[str, Tensor | None], text: str, suffix: str, tmp_path: Path
) -> None:
    merged = {**trained().state_dict(), **changed}
    state = {name: value for name, value in merged.items() if value is not None}
    path = tmp_path / f"vim{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, path)
    message = refusal(adapt(nano(), SVP()), path)
    assert message.count(text) == 1
    assert len([word for word in ("missing", "left over", "another shape") if word in message]) == 1


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "vim.pth"
    torch.save(trained(depth=1).state_dict(), path)
    text = refusal(nano(), path)
    assert re.search(r"17 missing \(layers\.1\.mixer\.A_b_log, .* and 13 more\)", text)
    assert text.endswith("the file looks like a Vim of width 32 and depth 1")


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vim_nano_patch8_64", "vim_tiny (width 192, depth 24)"),
        ("vim_tiny_patch16_224", "vim_nano (width 64, depth 8)"),
    ],
)
def test_another_architecture_is_named(name: str, theirs: str, tmp_path: Path) -> None:
    other = "vim_tiny_patch16_224" if name == "vim_nano_patch8_64" else "vim_nano_patch8_64"
    path = tmp_path / "other.safetensors"
    save_file(timm.create_model(other).state_dict(), path)
    text = refusal(timm.create_model(name), path)
    assert f"does not fit {name}: " in text
    assert text.endswith(f"; the file looks like {theirs}")


def test_weights_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.ones(3), "fc.bias": torch.ones(3)}, path)
    text = refusal(nano(), path)
    assert "missing" in text
    assert "2 left over (conv1.weight, fc.bias)" in text
    assert "looks like" not in text


# ---------------------------------------------------------------------------------- files that must not be trusted


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def save_evil(path: Path, marker: Path, form: str) -> None:
    content = {"model": trained().state_dict(), "args": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    save_evil(path, marker, form)
    text = refusal(nano(), path)
    assert not marker.exists()
    assert re.search(r"refused: it holds pickled code or objects \((posix|nt)\.mkdir\)", text)
    assert "nothing of it was run" in text
    assert "not a checkpoint" not in text
    if form != "pickle":
        torch.load(path, weights_only=False)
        assert marker.exists()  # the file is as evil as it should be


def test_namespace_is_allowed_only_while_loading(tmp_path: Path) -> None:
    path = tmp_path / "vim.pth"
    torch.save(published(trained()), path)
    assert read_weights(path).tensors
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("keep", [0, 1, 18, 40, 1000, -1000, -1])  # 18: within a number of the legacy format
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files(form: str, keep: int, tmp_path: Path) -> None:
    path = tmp_path / ("vim.safetensors" if form == "safetensors" else "vim.pth")
    state = trained().state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[:keep])
    text = refusal(nano(), path)
    if form == "safetensors":
        assert "not a readable safetensors file" in text
    else:
        assert "truncated or not a checkpoint" in text
        assert "pickled code" not in text


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("small")
    state = {"model": {"w": torch.arange(6.0)}, "args": argparse.Namespace(lr=0.1)}
    torch.save(state, folder / "zip.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state["model"], folder / "safe.safetensors")  # type: ignore[arg-type]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_files_give_one_line(data: st.DataObject, small_files: dict[str, bytes], tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(small_files)))
    content = bytearray(small_files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message, values = "", []
    try:
        values = list(read_weights(path).tensors.values())  # the damage may be in a number or a name
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message
    assert values or message.startswith(str(path))
    assert all(isinstance(value, Tensor) for value in values)


def test_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.pth"
    text = refusal(nano(), path)
    assert f"no checkpoint file '{path}': it does not exist; --model.checkpoint takes a path" in text
    assert "is a folder" in refusal(nano(), tmp_path)


# -------------------------------------------------------------------------------------------------- digests


def test_the_digest_is_of_the_backbones_weights(tmp_path: Path) -> None:
    model = trained()
    digest = backbone_digest(model)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    path = tmp_path / "vim.safetensors"
    save_file(model.state_dict(), path)
    other = adapt(nano(9), SVP())
    assert backbone_digest(other) != digest
    load_checkpoint(other, path)
    assert backbone_digest(other) == digest
    with torch.no_grad():
        other.get_parameter("layers.0.mixer.D_b")[3] += 1e-6
    assert backbone_digest(other) != digest


# ------------------------------------------------------------------------------------- where weights come from


def test_sources_by_name(tmp_path: Path) -> None:
    assert resolve_checkpoint(None, "vim_nano_patch8_64") is None
    assert resolve_checkpoint("none", "vim_nano_patch8_64") is None
    path = tmp_path / "a.pth"
    path.touch()
    assert resolve_checkpoint(str(path), "vim_nano_patch8_64") == path
    with pytest.raises(UsageError, match=r"unknown checkpoint 'hubb'; did you mean 'hub'\?"):
        resolve_checkpoint("hubb", "vim_nano_patch8_64")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint file '.*b\.pth'; --model\.checkpoint is hub, embedded, none or"
    ):
        resolve_checkpoint(tmp_path / "b.pth", "vim_nano_patch8_64")
    with pytest.raises(CheckpointError, match=r"no weights of vim_base_patch16_224 are embedded in this package; use"):
        resolve_checkpoint("embedded", "vim_base_patch16_224")
    with pytest.raises(CheckpointError, match="no published checkpoint of vim_nano_patch8_64 is known; use --model"):
        resolve_checkpoint("hub", "vim_nano_patch8_64")


def test_embedded_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "embedded" / "vim_nano_patch8_64.safetensors"
    path.parent.mkdir()
    source = timm.create_model("vim_nano_patch8_64")
    reference_vim.fill(source)
    save_file(source.state_dict(), path)
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "checkpoints.py"))
    model = create_backbone("vim_nano_patch8_64", num_classes=10, checkpoint="embedded")
    assert_equal(model, source.state_dict(), but=("head.",))
