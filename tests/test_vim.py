"""The backbone against an independent float64 implementation, against transformers, and as a timm model."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import timm
import torch
from tolerances import BACKBONE, SAME_MATHS, relative_error
from torch import Tensor, nn

import svp_bench
from svp_bench.core.errors import ConfigError, UsageError
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.svp import SVP
from svp_bench.models import VisionMamba
from svp_bench.models.vim import LINEAR_POINTS, TENSOR_POINTS, Mixer
from svp_bench.ops import backend_statuses

BACKENDS = [status.name for status in backend_statuses() if status.available]
NANO: dict[str, Any] = {"embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 6}


def nano(**arguments: Any) -> VisionMamba:
    return VisionMamba(**{"img_size": 48, **NANO, **arguments}).eval()


# --------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        ((48, 48), {}),
        ((48, 48), {"stride": 8}),
        ((48, 48), {"patch_size": 8, "d_state": 8}),
        ((32, 64), {}),  # eight patches, wider than high
        ((64, 40), {"stride": 12, "depth": 2}),  # the last rows and columns of the image belong to no patch
        ((48, 48), {"embed_dim": 40, "d_conv": 3, "expand": 3}),  # rank 40 / 16 rounded up
        ((16, 16), {"depth": 1, "d_state": 1}),  # one patch, behind the class token
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_gradients_equal_the_independent_implementation(
    backend: str, size: tuple[int, int], arguments: dict[str, Any]
) -> None:
    model = nano(img_size=size, scan_backend=backend, **arguments)
    state = reference_vim.fill(model)
    images = reference_vim.make_images(2, 3, *size)
    leaves = {name: value.requires_grad_() for name, value in state.items()}
    stride = arguments.get("stride") or arguments.get("patch_size", 16)
    expected = reference_vim.logits(leaves, images.double(), stride=stride)
    given = model(images)
    assert given.shape == (2, 6)
    assert relative_error(given, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(2, 6)
    given.backward(cotangent)
    wanted = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values()), cotangent.double()), strict=True))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, wanted[name]) <= BACKBONE.backward, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_vim_tiny_equals_the_independent_implementation(backend: str) -> None:
    model = timm.create_model("vim_tiny_patch16_224", scan_backend=backend).eval()
    state = reference_vim.fill(model)
    images = reference_vim.make_images(1, 3, 224, 224)
    with torch.no_grad():
        given, expected = model(images), reference_vim.logits(state, images.double(), stride=16)
    assert relative_error(given, expected) <= BACKBONE.forward


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim_tiny_patch16_stride8_224", "vim_small_patch16_224"])
def test_larger_models_equal_the_independent_implementation(name: str) -> None:
    model = timm.create_model(name).eval()
    state = reference_vim.fill(model)
    images = reference_vim.make_images(1, 3, 224, 224)
    with torch.no_grad():
        given, expected = model(images), reference_vim.logits(state, images.double(), stride=model.patch_embed.stride)
    assert relative_error(given, expected) <= BACKBONE.forward


@pytest.mark.parametrize("depth", [1, 3])
def test_another_norm_epsilon_would_be_seen(depth: int) -> None:
    model = nano(depth=depth)
    state = reference_vim.fill(model)
    images = reference_vim.make_images(2, 3, 48, 48)
    with torch.no_grad():
        given = model(images)
        assert relative_error(given, reference_vim.logits(state, images.double(), stride=16)) <= BACKBONE.forward
        other = reference_vim.logits(state, images.double(), stride=16, eps=1e-6)
    assert relative_error(given, other) > 20 * BACKBONE.forward


def test_a_batch_is_its_images_one_by_one() -> None:
    model = nano()
    reference_vim.fill(model)
    images = reference_vim.make_images(3, 3, 48, 48)
    with torch.no_grad():
        together, apart = model(images), torch.cat([model(image[None]) for image in images])
        assert model(images[:0]).shape == (0, 6)
    assert relative_error(together, apart) <= SAME_MATHS


# ------------------------------------------------------------------------- a mixer that is not ours


@pytest.mark.parametrize("suffix", ["", "_b"], ids=["forward", "backward"])
def test_one_direction_is_the_mamba_of_transformers(suffix: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer = Mixer(32, d_state=4)
    reference_vim.fill(mixer)
    config = transformers.MambaConfig(
        hidden_size=32,
        state_size=4,
        expand=2,
        conv_kernel=4,
        time_step_rank=2,
        num_hidden_layers=1,
        use_bias=False,
        use_conv_bias=True,
        hidden_act="silu",
    )
    theirs = MambaMixer(config, layer_idx=0).eval()
    own = mixer.state_dict()
    names = {name: name.replace("conv1d", f"conv1d{suffix}") for name in ("conv1d.weight", "conv1d.bias")}
    names |= {
        name: name.replace("_proj", f"_proj{suffix}") for name in ("x_proj.weight", "dt_proj.weight", "dt_proj.bias")
    }
    names |= {"A_log": f"A{suffix}_log", "D": f"D{suffix}"}
    names |= {name: name for name in ("in_proj.weight", "out_proj.weight")}
    theirs.load_state_dict({name: own[ours] for name, ours in names.items()})
    # Silence the other direction: without B, C and D its output is zero.
    other = "_b" if suffix == "" else ""
    with torch.no_grad():
        mixer.get_parameter(f"x_proj{other}.weight").zero_()
        mixer.get_parameter(f"D{other}").zero_()
        hidden = reference_vim.make_images(2, 11, 32)
        slow = getattr(theirs, "slow_forward", theirs.forward)  # its only path without kernels, since 5.x
        expected = slow(hidden.flip(1)).flip(1) if suffix else slow(hidden)
        given = 2 * mixer(hidden)  # the mean of two directions, one of them zero
    assert relative_error(given, expected) <= SAME_MATHS


# ------------------------------------------------------------------------------------ names and counts

COUNTS = {  # without head, with a head of 1000 classes: facts of the published checkpoints
    "vim_tiny_patch16_224": (6_955_008, 7_148_008, 192, 197),
    "vim_tiny_patch16_stride8_224": (7_057_344, 7_250_344, 192, 730),
    "vim_small_patch16_224": (25_411_584, 25_796_584, 384, 197),
    "vim_small_patch16_stride8_224": (25_616_256, 26_001_256, 384, 730),
    "vim_base_patch16_224": (96_829_440, 97_598_440, 768, 197),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_of_the_published_checkpoints(name: str) -> None:
    no_head, with_head, width, tokens = COUNTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    inner, rank, state = 2 * width, width // 16, 16
    expected: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm_f.weight": (width,),
        "head.weight": (1000, width),
        "head.bias": (1000,),
    }
    for i in range(24):
        expected[f"layers.{i}.norm.weight"] = (width,)
        expected[f"layers.{i}.mixer.in_proj.weight"] = (2 * inner, width)
        expected[f"layers.{i}.mixer.out_proj.weight"] = (width, inner)
        for s in ("", "_b"):
            mixer = f"layers.{i}.mixer."
            expected |= {f"{mixer}A{s}_log": (inner, state), f"{mixer}D{s}": (inner,)}
            expected |= {f"{mixer}conv1d{s}.weight": (inner, 1, 4), f"{mixer}conv1d{s}.bias": (inner,)}
            expected |= {f"{mixer}x_proj{s}.weight": (rank + 2 * state, inner)}
            expected |= {f"{mixer}dt_proj{s}.weight": (inner, rank), f"{mixer}dt_proj{s}.bias": (inner,)}
    assert shapes == expected
    assert len(shapes) == 415
    count = sum(p.numel() for p in model.parameters())
    assert (count - 1000 * (width + 1), count) == (no_head, with_head)
    assert model.cls_index == (tokens - 1) // 2
    model.reset_classifier(0)
    assert sum(p.numel() for p in model.parameters()) == no_head


def test_initial_step_sizes_are_in_their_range() -> None:
    for mixer in nano().mixers:
        for bias in (mixer.dt_proj.bias, mixer.dt_proj_b.bias):
            step = nn.functional.softplus(bias)
            assert 0.99e-3 <= step.min() < step.max() <= 0.101


def test_a_new_model_trains() -> None:
    model = nano().train()
    images, labels = torch.randn(8, 3, 48, 48), torch.arange(8) % 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# -------------------------------------------------------------------------------------- timm's surface


def test_timm_knows_the_models() -> None:
    names = timm.list_models("vim_*")
    assert {*COUNTS, "vim_nano_patch8_64"} <= set(names)
    assert "vim_small_patch16_224.in1k" in timm.list_pretrained("vim_*")
    model = timm.create_model("vim_nano_patch8_64", num_classes=7)
    assert isinstance(model, VisionMamba)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    cfg = timm.create_model("vim_nano_patch8_64").pretrained_cfg
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 64, 64)


@pytest.mark.parametrize(
    ("name", "repo", "file"),
    [
        ("vim_tiny_patch16_224", "hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        ("vim_tiny_patch16_stride8_224", "hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        ("vim_small_patch16_224", "hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        ("vim_small_patch16_stride8_224", "hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        ("vim_base_patch16_224", "hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
    ],
)
def test_configs_of_the_published_models(name: str, repo: str, file: str) -> None:
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg is not None
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (repo, file)
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg.crop_pct, cfg.interpolation, cfg.input_size) == (0.875, "bicubic", (3, 224, 224))
    assert (cfg.num_classes, cfg.classifier, cfg.first_conv) == (1000, "head", "patch_embed.proj")


def test_the_classifier_surface() -> None:
    model = nano()
    images = torch.randn(2, 3, 48, 48)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.get_classifier() is model.head
    tokens, (cls_index,) = model.forward_tokens(images)
    assert tokens.shape == (2, 10, 32)
    assert torch.equal(tokens[:, cls_index], features)

    model.reset_classifier(4)
    assert model.num_classes == 4
    assert model(images).shape == (2, 4)
    assert torch.equal(model.forward_features(images), features)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(images), features)
    assert not any(name.startswith("head") for name in model.state_dict())
    model.reset_classifier(3, global_pool="token")
    with pytest.raises(ValueError, match="global_pool 'avg' is not supported, only 'token'"):
        model.reset_classifier(3, global_pool="avg")


def test_a_new_head_stays_in_the_models_precision() -> None:
    model = nano().double()
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 48, 48, dtype=torch.float64)).dtype == torch.float64


def test_no_weight_decay() -> None:
    logs = {f"layers.{i}.mixer.{name}" for i in range(3) for name in ("A_log", "A_b_log")}
    assert nano().no_weight_decay() == {"cls_token", "pos_embed", *logs}


def test_drop_paths_follow_the_released_rule() -> None:
    model = nano(depth=4, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2])  # linspace(0, 0.3, 4), one block late
    assert getattr(model.drop_path, "drop_prob", 0.0) == pytest.approx(0.3)
    images = reference_vim.make_images(8, 3, 48, 48)
    still = nano(depth=4)
    still.load_state_dict(model.state_dict())
    assert torch.equal(model(images), still(images))  # eval mode: no image drops anything
    model.train()
    assert not torch.equal(model(images), model(images))
    assert nano(depth=1, drop_path_rate=0.2).layers[0].drop_path(torch.ones(1)) == 1


def test_dropping_the_last_branch_leaves_the_stream() -> None:
    model = nano(depth=2, drop_path_rate=0.999999).train()  # block 0: 0, block 1: 0, the last: dropped
    tokens, _ = model.forward_tokens(images := reference_vim.make_images(2, 3, 48, 48))
    state = model.layers[0](model.embed(images))
    assert state.residual is not None
    assert relative_error(tokens, model.norm_f(state.residual + state.hidden)) <= SAME_MATHS


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (47, 48)])
def test_images_of_another_size(height: int, width: int) -> None:
    message = f"the model takes 48×48 images, not {height}×{width}; create it with img_size="
    with pytest.raises(ValueError, match=message):
        nano()(torch.zeros(1, 3, height, width))


# ----------------------------------------------------------------------------- parameters and copies


def test_weights_written_after_construction_show() -> None:
    model = nano()
    images = reference_vim.make_images(2, 3, 48, 48)
    reference_vim.fill(model)
    before = model(images)
    for name in (
        "layers.1.mixer.A_log",
        "layers.1.mixer.D_b",
        "layers.2.mixer.conv1d_b.weight",
        "layers.0.norm.weight",
    ):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.mul_(1.5)
        after = model(images)
        assert relative_error(after, before) > 1e-4, name
        before = after
    other = nano()
    other(images)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), before)
    model.get_parameter("layers.0.mixer.dt_proj_b.bias").data = torch.ones(64)
    assert relative_error(model(images), before) > 1e-4


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("method", ["svp", "vpt_deep", "linear"])
def test_a_copy_of_an_adapted_model_is_its_own(method: str, how: Any) -> None:
    model = svp_bench.create_model("vim_nano_patch8_64", num_classes=3, method=method).eval()
    reference_vim.fill(model)
    images = reference_vim.make_images(2, 3, 64, 64)
    before = model(images)
    copied = how(model)
    assert torch.equal(copied(images), before)
    assert {n for n, p in copied.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * reference_vim.sample(f"{name}+", parameter.shape))
    changed = copied(images)
    assert relative_error(changed, before) > 1e-3  # the copy's own adapter is at its points
    assert torch.equal(model(images), before)
    with pytest.raises(ConfigError, match="carries a method already"):
        adapt(copied, SVP())


def test_points_are_checked_by_name() -> None:
    points = nano().points
    with pytest.raises(ConfigError, match=r"no linear projection 'z_proj'; there are in_proj, x_proj, .*out_proj"):
        points.on_linear(0, "z_proj", lambda x, y: y)
    with pytest.raises(ConfigError, match=r"no tensor 'A_log'; there are in_proj\.weight, .*A, A_b, D, D_b"):
        points.on_tensor(0, "A_log", lambda w: w)


def test_every_mixer_weight_has_a_tensor_point() -> None:
    own = {name for name, _ in Mixer(32).named_parameters()}
    own = {{"A_log": "A", "A_b_log": "A_b"}.get(name, name) for name in own}
    assert own == set(TENSOR_POINTS)
    assert {f"{name}.weight" for name in LINEAR_POINTS} <= own


# ----------------------------------------------------------------------------------------- precision


def test_bf16_autocast_is_near() -> None:
    model = adapt(nano(), SVP())
    reference_vim.fill(model)
    images = reference_vim.make_images(2, 3, 48, 48)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        given = model(images)
        loss = given.float().square().sum()
    loss.backward()
    assert relative_error(given, exact) < 0.05
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 2e-5)], ids=str
)
def test_models_of_other_precision(dtype: torch.dtype, near: float) -> None:
    model = adapt(nano(), SVP())
    reference_vim.fill(model)
    images = reference_vim.make_images(2, 3, 48, 48)
    exact = model(images)
    given = model.to(dtype)(images.to(dtype))
    assert given.dtype == dtype
    assert relative_error(given, exact) < near


# ------------------------------------------------------------------------------------------- backends


def test_the_scan_backend_is_a_choice_by_name() -> None:
    model = create_backbone("vim_nano_patch8_64", num_classes=2, scan_backend="reference")
    assert {mixer.scan_backend for mixer in model.mixers} == {model.scan_backend} == {"reference"}
    with pytest.raises(UsageError, match=r"unknown scan backend 'tritn'"):
        model.set_scan_backend("tritn")
    assert model.scan_backend == "reference"
    with pytest.raises(UsageError, match="did you mean 'reference'"):
        nano(scan_backend="referense")


def test_backbones_by_name() -> None:
    with pytest.raises(
        UsageError, match=r"unknown backbone 'vim_smal_patch16_224'; did you mean 'vim_small_patch16_224'\?"
    ):
        create_backbone("vim_smal_patch16_224", num_classes=2)
    with pytest.raises(ConfigError, match="num_classes must be at least 1, not 0"):
        create_backbone("vim_nano_patch8_64", num_classes=0)


# --------------------------------------------------------------------------------------------- memory

STEP = """
import resource, sys, time, torch, svp_bench
torch.set_num_threads(2)
model = svp_bench.create_model("vim_small_patch16_224", num_classes=100, method="svp").train()
model.set_scan_backend(sys.argv[1])
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
start = time.perf_counter()
loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 3, 224, 224)), torch.randint(0, 100, (32,)))
loss.backward()
optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_of_vim_small_fits_into_six_gib(backend: str) -> None:
    root = Path(svp_bench.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", STEP, backend],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kibibytes, seconds = done.stdout.split()
    print(f"{backend}: peak {int(kibibytes) / 2**20:.2f} GiB, {float(seconds):.0f} s")
    assert int(kibibytes) < 6 * 2**20


def test_features_differ_between_tokens_and_images() -> None:
    """The class token must see the whole image: both scans reach it."""
    model = nano()
    reference_vim.fill(model)
    images: Tensor = reference_vim.make_images(1, 3, 48, 48).requires_grad_()
    model(images)[0, 0].backward()
    assert images.grad is not None
    for row in range(0, 48, 16):
        for column in range(0, 48, 16):
            assert images.grad[..., row : row + 16, column : column + 16].abs().max() > 0


@pytest.mark.parametrize("method", ["svp", "vpt_deep", "full"])
def test_gradient_checkpointing_changes_memory_alone(method: str) -> None:
    """The same logits and gradients to the bit, also with dropout; only the input of each layer is saved."""
    arguments = {"dropout": 0.3} if method != "full" else {}
    model = svp_bench.create_model("vim_nano_patch8_64", num_classes=3, method=method, **arguments).train()
    images = torch.randn(2, 3, 64, 64)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            logits = model(images)
        logits.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients, saved))
    (plain, before, saved), (again, after, saved_again) = found
    assert torch.equal(plain, again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert saved_again < saved / 5
