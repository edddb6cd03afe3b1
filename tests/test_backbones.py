"""The `Backbone` interface: timm's vision transformers, Mamba-Reg, and backbones of other packages."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import timm
import torch
from helpers import assert_error, command, run, settle, small
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from tolerances import BACKBONE, SAME_MATHS, relative_error
from torch import Tensor, nn

from svp_bench import list_methods
from svp_bench.core.errors import CheckpointError, ConfigError, UsageError
from svp_bench.methods import METHODS, create_model
from svp_bench.methods.base import build_method
from svp_bench.methods.build import adapt, create_backbone, family_of, input_size, list_backbones
from svp_bench.methods.checks import trained_parameters
from svp_bench.models import Backbone, MambaRegister, TokenState, VisionMamba, as_backbone
from svp_bench.models.checkpoints import load_checkpoint, save_weights

VIT: dict[str, Any] = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
KINDS: dict[str, tuple[type[VisionTransformer], dict[str, Any]]] = {
    "class token": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "average": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "attention pool": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "registers": (VisionTransformer, {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1}),
    "norm before": (VisionTransformer, {"pre_norm": True, "qk_norm": True, "qkv_bias": False}),
}
REGISTER: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
kinds = pytest.mark.parametrize("kind", KINDS)


def vit(kind: str = "class token", **arguments: Any) -> VisionTransformer:
    cls, settings = KINDS[kind]
    torch.manual_seed(0)
    return cls(**{**VIT, "num_classes": 5, **settings, **arguments}).eval()


def registers(**arguments: Any) -> MambaRegister:
    torch.manual_seed(0)
    return MambaRegister(**{**REGISTER, "registers": 3, "reduction": 2, **arguments}).eval()


def images(model: Any, count: int = 2) -> Tensor:
    return reference_vim.make_images(count, 3, *model.patch_embed.img_size)


# ---------------------------------------------------------------------------------------------------------------- ViT


@kinds
def test_a_vision_transformer_computes_what_timm_computes(kind: str) -> None:
    plain = vit(kind)
    names = list(plain.state_dict())
    model = as_backbone(copy.deepcopy(plain))
    x = images(plain)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.forward_features(x), plain.forward_features(x))  # type: ignore[operator]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert torch.equal(other(x), plain(x))
    assert list(model.state_dict()) == names
    assert isinstance(model, VisionTransformer)
    assert as_backbone(model) is model
    assert (model.family, model.scan_backend, model.depth) == ("vit", None, 3)
    assert (model.image_size, model.grid_size, model.num_patches, model.patch_size) == ((32, 48), (4, 6), 24, 8)
    assert model.num_tokens == model.embed(x).hidden.shape[1] == 24 + len(model.cls_positions)
    model.set_grad_checkpointing()
    assert relative_error(model(x), plain(x)) <= SAME_MATHS
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@kinds
@pytest.mark.parametrize("name", list_methods("vit_nano_patch8_64"))
def test_every_method_for_transformers_runs_on_each_kind(name: str, kind: str) -> None:
    torch.manual_seed(1)
    method = build_method(METHODS.get(name), name, {})
    plain = vit(kind)
    x = images(plain)
    before = plain(x)
    model = adapt(as_backbone(plain), method)
    assert (relative_error(model(x), before) <= SAME_MATHS) == method.identity_at_start
    reference_vim.fill(model)
    model(x).square().sum().backward()
    for parameter_name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, parameter_name
    head = [n for n in trained_parameters(model) if n.startswith(("head.", "head_dist."))]
    assert len(head) == (4 if kind == "distilled" else 2)


@pytest.mark.parametrize("kind", ["class token", "registers", "average"])
def test_hooks_of_linear_layers_change_weights_and_outputs(kind: str) -> None:
    plain, model = vit(kind), as_backbone(vit(kind))
    x = images(plain)
    with torch.no_grad():
        plain.blocks[1].mlp.fc1.weight.mul_(1.5)
        plain.blocks[2].attn.qkv.bias.add_(0.3)
        model.points.on_tensor(1, "fc1.weight", lambda w: 1.5 * w)
        model.points.on_tensor(2, "qkv.bias", lambda b: b + 0.3)
        assert relative_error(model(x), plain(x)) <= SAME_MATHS
        model.points.on_linear(0, "proj", lambda x, y: 2 * y + x)
        assert relative_error(model(x), plain(x)) > 1e-3


def test_svp_on_a_transformer_is_its_formula() -> None:
    """x + α ⊙ SiLU(W x + b) + β ⊙ SiLU(U (D x + d) + u) before each block, on patches only."""
    plain = vit("registers")
    model = adapt(as_backbone(copy.deepcopy(plain)), build_method(METHODS.get("svp"), "svp", {"share_layers": 2}))
    reference_vim.fill(model)
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("adapter.")})
    adapter: Any = model.adapter

    def before(layer: int) -> Callable[[nn.Module, Any], Any]:
        def prompted(_: nn.Module, inputs: Any) -> Any:
            x, silu = inputs[0], nn.functional.silu
            cross, inner = adapter.cross[str(layer // 2)], adapter.inner[str(layer)]
            prompt = adapter.alpha[layer // 2] * silu(x @ cross.weight.T + cross.bias)
            prompt = prompt + adapter.beta[layer] * silu(
                (x @ inner.down.weight.T + inner.down.bias) @ inner.up.weight.T + inner.up.bias
            )
            prompt[:, :4] = 0  # class token and three registers
            return (x + prompt, *inputs[1:])

        return prompted

    for layer, block in enumerate(plain.blocks):
        block.register_forward_pre_hook(before(layer))
    x = images(plain)
    with torch.no_grad():
        assert relative_error(model(x), plain(x)) <= BACKBONE.forward


@pytest.mark.parametrize("kind", ["class token", "average"])
def test_deep_prompts_on_a_transformer_are_those_of_vpt(kind: str) -> None:
    """Prompts before each block replace the older ones, and are not pooled."""
    plain = vit(kind)
    model = adapt(as_backbone(copy.deepcopy(plain)), build_method(METHODS.get("vpt_deep"), "vpt_deep", {"length": 2}))
    prompts = model.get_parameter("adapter.prompts")
    x = images(plain)
    with torch.no_grad():
        tokens: Any = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(x))))
        for layer, block in enumerate(plain.blocks):
            tokens = block(torch.cat([prompts[layer].expand(2, -1, -1), tokens], dim=1))[:, 2:]
        assert relative_error(model(x), plain.forward_head(plain.norm(tokens))) <= SAME_MATHS


@pytest.mark.parametrize("target", ["qkv", "q", "k", "v", "proj", "fc1", "fc2", "embed"])
@pytest.mark.parametrize("dora", [None, True])
def test_lora_on_a_transformer_merges(target: str, dora: bool | None) -> None:
    if dora and target == "embed":
        pytest.skip("DoRA has no form for the patch embedding")
    settings = {"targets": [target], "rank": 3, "scale": 0.5, "dora": dora}
    model = adapt(as_backbone(vit()), build_method(METHODS.get("lora"), "lora", settings))
    plain = vit()
    with torch.no_grad():
        before = model(images(plain))
        assert relative_error(before, plain(images(plain))) <= SAME_MATHS
        for name, parameter in trained_parameters(model).items():
            parameter.add_(0.2 * reference_vim.sample(name, parameter.shape))
        changed = model(images(plain))
        model.method.merge(model)
        assert relative_error(model(images(plain)), changed) <= SAME_MATHS
        plain.load_state_dict(model.state_dict())
        assert relative_error(plain(images(plain)), changed) <= SAME_MATHS


# ---------------------------------------------------------------------------------------------------------- Mamba-Reg


def register_logits(state: dict[str, Tensor], x: Tensor, count: int) -> Tensor:
    """Mamba-Reg as written in its paper, in float64, on the mixer of the reference."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    patches = nn.functional.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).mT + state["pos_embed"]
    special = (state["cls_token"] + state["pos_embed_cls"]).expand(len(x), -1, -1)
    between = patches.shape[1] // (count + 1)
    tokens: list[Tensor] = []
    at: list[int] = []
    for k in range(count):
        tokens += [*patches[:, k * between : (k + 1) * between].unbind(1), special[:, k]]
        at.append(len(tokens) - 1)
    tokens += [*patches[:, count * between :].unbind(1)]
    hidden, residual = torch.stack(tokens, dim=1), None
    for i in range(reference_vim.depth_of(state)):
        residual = hidden if residual is None else residual + hidden
        normed = reference_vim.rms_norm(residual, state[f"layers.{i}.norm.weight"], 1e-5)
        hidden = reference_vim.mixer(state, f"layers.{i}.mixer.", normed)
    assert residual is not None
    last = reference_vim.rms_norm(residual + hidden, state["norm_f.weight"], 1e-5)[:, at]
    features = reference_vim.rms_norm((last @ state["neck.weight"].T).flatten(1), state["norm_neck.weight"], 1e-5)
    return features @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_mamba_reg_is_its_formula(count: int) -> None:
    model = registers(registers=count)
    reference_vim.fill(model)
    state = {name: value.double() for name, value in model.state_dict().items()}
    x = images(model)
    with torch.no_grad():
        assert relative_error(model(x), register_logits(state, x.double(), count)) <= BACKBONE.forward


def test_mamba_reg_small_has_the_published_size_and_positions() -> None:
    with torch.device("meta"):
        model: Any = create_backbone("mambar_small_patch16_224", num_classes=1000)
    assert model.cls_positions == tuple(range(15, 192, 16))
    counts = [p.numel() for n, p in model.named_parameters() if not n.startswith("head.")]
    assert sum(counts) == 25_496_064
    assert model.head.weight.shape == (1000, 2304)
    assert {"pos_embed_cls", "neck.weight", "norm_neck.weight"} <= set(model.state_dict())


@pytest.mark.parametrize("name", list_methods("mambar_small_patch16_224"))
def test_every_method_runs_on_mamba_reg(name: str) -> None:
    torch.manual_seed(1)
    method = build_method(METHODS.get(name), name, {})
    plain = registers()
    x = images(plain)
    before = plain(x)
    model = adapt(plain, method)
    assert (relative_error(model(x), before) <= SAME_MATHS) == method.identity_at_start
    model(x).square().sum().backward()


def test_registers_are_not_prompted() -> None:
    model = adapt(registers(), build_method(METHODS.get("svp"), "svp", {}))
    reference_vim.fill(model)
    state = model.embed(images(model))
    after = model.points.tokens[0](0, state).settled()
    changed = (after.hidden != state.hidden).any(dim=-1).any(dim=0).nonzero().flatten().tolist()
    assert changed == [at for at in range(model.num_tokens) if at not in model.cls_positions]


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    "make",
    [
        lambda: as_backbone(vit(img_size=32)),
        lambda: as_backbone(vit("registers", img_size=32)),
        lambda: registers(img_size=48),
    ],
    ids=["class token", "registers", "Mamba-Reg"],
)
def test_published_layouts_load_strictly(make: Callable[[], Backbone], tmp_path: Path) -> None:
    """A file of the model's own names under the key `model`, as published; another grid; a missing tensor."""
    model, other = make(), make()
    reference_vim.fill(model)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    load_checkpoint(other, tmp_path / "weights.pth", "keep")
    with torch.no_grad():
        assert torch.equal(other(images(other)), model(images(model)))
    state = dict(model.state_dict())
    state.pop("norm.weight" if "norm.weight" in state else "norm_f.weight")
    torch.save(state, tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match=r"1 missing \(norm(_f)?\.weight\)"):
        load_checkpoint(make(), tmp_path / "missing.pth")
    save_weights(model, tmp_path / "weights.safetensors")
    larger = registers(img_size=64) if isinstance(model, MambaRegister) else None
    if larger is None:
        larger = as_backbone(vit("registers" if len(model.cls_positions) > 1 else "class token", img_size=64))
    report = load_checkpoint(larger, tmp_path / "weights.safetensors")
    assert report.pos_embed_resized == (model.grid_size, larger.grid_size)
    rows, old = larger.position_rows(larger.num_patches), model.position_rows(model.num_patches)
    assert torch.equal(larger.get_parameter("pos_embed")[:, [*rows]], model.get_parameter("pos_embed")[:, [*old]])
    assert larger(images(larger)).isfinite().all()


def test_hub_files_of_transformers_are_timms() -> None:
    assert {"vim_small_patch16_224", "mambar_base_patch16_224", "deit_small_patch16_224"} <= set(list_backbones())
    assert input_size("vit_small_patch16_224.augreg_in21k") == 224
    cfg: Any = timm.get_pretrained_cfg("deit_small_patch16_224.fb_in1k")
    assert cfg.hf_hub_id.startswith("timm/")
    for name, family in {"vim_nano_patch8_64": "vim", "mambar_base_patch16_224": "mambar"}.items():
        assert family_of(name) == family
    assert family_of("deit_small_patch16_224.fb_in1k") == family_of("vit_nano_patch8_64") == "vit"


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "lora",
            {"targets": ["x_proj"]},
            r"unknown target of lora 'x_proj'.*vit has embed, qkv, q, k, v, proj, fc1, fc2",
        ),
        ("bias", {"which": ["dt_proj"]}, r"unknown layer with a bias 'dt_proj'.*qkv"),
        ("partial", {"tensors": ["A_log"]}, r"unknown tensor 'A_log'.*qkv\.weight"),
        ("svp", {"variant": "released"}, "one class token in the middle"),
        ("vpt_deep", {"mode": "accumulate"}, "needs a residual stream next to the block input"),
    ],
)
def test_what_a_transformer_lacks_is_refused_in_one_line(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_model("vit_nano_patch8_64", num_classes=2, method=method, **settings)
    assert "\n" not in str(caught.value)


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="around_cls needs one class token, and this backbone has 3"):
        adapt(registers(), build_method(METHODS.get("vpt_shallow"), "vpt_shallow", {"position": "around_cls"}))
    with pytest.raises(ConfigError, match="this backbone has no selective scan"):
        as_backbone(vit()).points.on_scan(0, lambda inputs, y: y)
    with pytest.raises(UsageError, match="vit has no selective scan: leave out model"):
        create_backbone("vit_nano_patch8_64", num_classes=2, scan_backend="cpu")
    with pytest.raises(ConfigError, match="ResNet is not a supported backbone"):
        create_backbone("resnet18", num_classes=2)
    with pytest.raises(UsageError, match=r"unknown backbone 'deit_tny'.*deit_tiny_patch16_224"):
        create_backbone("deit_tny", num_classes=2)
    with pytest.raises(ConfigError, match="dynamic_img_size"):
        as_backbone(vit(dynamic_img_size=True))
    with pytest.raises(ConfigError, match="3 registers and needs at least 4 patches"):
        registers(img_size=16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "resnet18 is not a supported backbone"),
        ("vit_small_patch16_18x2_224", "several linear layers of one name"),
        ("vit_small_r26_s32_224", "patch embedding is a HybridEmbed"),
        ("test_vit", "dynamic_img_size"),
        ("beit_base_patch16_224", "not a supported backbone"),
    ],
)
def test_other_models_of_timm_are_refused_in_one_line(name: str, message: str) -> None:
    sizes = {} if name in ("resnet18", "test_vit") else {"depth": 2, "embed_dim": 48, "num_heads": 2}
    with pytest.raises(ConfigError, match=message) as caught:
        create_backbone(name, num_classes=2, img_size=64, **sizes)
    assert "\n" not in str(caught.value)


def test_odd_kinds_of_vision_transformers() -> None:
    """A patch embedding without bias (CLIP), blocks with other projections, and dropped patches."""
    sizes: dict[str, Any] = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 2}
    clip = create_backbone("vit_base_patch16_clip_224", num_classes=2, **sizes)
    assert adapt(clip, build_method(METHODS.get("bias"), "bias", {"which": ["qkv"]})).method is not None
    for name in ("adapter", "parallel_adapter", "lora"):
        other = create_backbone("vit_pwee_patch16_reg1_gap_256", num_classes=2, **sizes)
        model = adapt(other, build_method(METHODS.get(name), name, {}))
        model(images(model)).sum().backward()
        assert all(p.grad is not None for p in trained_parameters(model).values())
    with pytest.raises(ConfigError, match="patch_drop_rate"):
        as_backbone(vit(patch_drop_rate=0.5))


@kinds
def test_weight_decay_leaves_out_what_timm_leaves_out(kind: str) -> None:
    """A full fine-tuning of a ViT must not decay its position embedding and class token, as Vim's does not."""
    plain = vit(kind)
    expected = set(plain.no_weight_decay())
    assert as_backbone(plain).no_weight_decay() == expected >= {"pos_embed"}


def test_timms_intermediates_are_refused_with_a_method() -> None:
    model: Any = as_backbone(vit())
    plain = vit()
    x = images(plain)
    assert torch.equal(model.forward_intermediates(x)[0], plain.forward_intermediates(x)[0])
    adapt(model, build_method(METHODS.get("svp"), "svp", {}))
    with pytest.raises(ConfigError, match="already carries a method"):
        model.forward_intermediates(x)


def test_a_method_of_the_scan_on_a_transformer_names_those_that_fit() -> None:
    for name in set(METHODS.names()) - set(list_methods("vit_nano_patch8_64")):
        with pytest.raises(ConfigError, match=f"{name} works on the families vim, mambar, not on vit.*svp"):
            create_model("vit_nano_patch8_64", num_classes=2, method=name)


# ------------------------------------------------------------------------------------------------------ other packages

PACKAGE = '''
import timm, torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from svp_bench.models import Backbone, HookPoints, TokenState


@register_model
def my_vit(pretrained=False, **kwargs):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**{**sizes, **kwargs})
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}
    return model


def no_mean(**kwargs):
    model = my_vit(**kwargs)
    model.pretrained_cfg = {}
    return model


class Mixer(Backbone):
    """Tokens averaged with their mean and passed through a linear layer, block by block."""

    family = "mixer"
    branch_outputs = ("mix",)
    default_targets = ("mix",)

    def __init__(self, num_classes=10, img_size=32, drop_path_rate=0.0):
        super().__init__()
        from timm.layers import PatchEmbed
        self.embed_dim, self.depth, self.in_chans, self.num_classes, self.head_hidden_size = 16, 3, 3, num_classes, 16
        self.patch_embed = PatchEmbed(img_size, 8, 3, 16)
        self.cls_positions, self.scan_backend = (), None
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
        self.norm, self.head_drop = torch.nn.LayerNorm(16), torch.nn.Identity()
        self.head = torch.nn.Linear(16, num_classes)
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}
        self.finish(HookPoints(3, ["mix"]))

    @property
    def projections(self):
        return {}

    @property
    def blocks_in_order(self):
        return self.blocks

    @property
    def final_parts(self):
        return [self.norm]

    def part(self, layer, name):
        return self.blocks[layer]

    def embed(self, images):
        return TokenState(self.embedded_patches(self.hooked_images(images)), None, ())

    def run_block(self, block, state):
        x = state.settled().hidden
        y = block(x + x.mean(dim=1, keepdim=True))
        layer = [*self.blocks].index(block)
        for hook in self.points.linear.get((layer, "mix"), ()):
            y = hook(x, y)
        return state._replace(hidden=x + y)

    def final_tokens(self, state):
        return self.norm(state.settled().hidden)

    def pooled(self, state):
        return self.final_tokens(state.without_inserted()).mean(dim=1)

    def classify(self, features):
        return self.head(self.head_drop(features))


def my_mixer(**kwargs):
    return Mixer(**kwargs)
'''


def test_a_backbone_of_another_package_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    site = tmp_path / "site"
    info = site / "my_backbones-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_backbones.py").write_text(PACKAGE, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-backbones\nVersion: 1.0\n", encoding="utf-8")
    points = "[svp_bench.backbones]\nmy_vit = my_backbones:my_vit\nmy_mixer = my_backbones:my_mixer\n"
    points += "no_mean = my_backbones:no_mean\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for backbone, family in (("my_vit", "vit"), ("my_mixer", "mixer")):
        flags = small("--method", "svp", model__backbone=backbone, model__scan_backend=None, results_root=family)
        start = [sys.executable, "-m", "svp_bench", *flags]
        done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / family / "records").rglob("*.json")
        record = json.loads(file.read_text(encoding="utf-8"))
        assert (record["backbone"], record["backbone_family"]) == (backbone, family)
        assert record["scan_backend"] is None
    flags = small(model__backbone="no_mean", model__scan_backend=None)
    start = [sys.executable, "-m", "svp_bench", *flags]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "states no mean and std" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("method", ["linear", "svp", "vpt_deep", "lora"])
def test_a_run_on_a_transformer(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    outcome = run(*small("--method", method, model__backbone="vit_nano_patch8_64", model__scan_backend="auto"))
    record = outcome.record
    assert record["backbone_family"] == "vit"
    assert record["scan_backend"] is None
    assert "no selective scan" in outcome.out
    assert "inactive_parameters" not in record
    run("table")


def test_a_scan_backend_for_a_transformer_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    text = assert_error(command(*small(model__backbone="vit_nano_patch8_64")), 2)
    assert "vit has no selective scan" in text


@pytest.mark.parametrize("backbone", ["vit_nano_patch8_64", "vim_nano_patch8_64"])
def test_the_nano_models_are_of_one_size(backbone: str) -> None:
    sizes = {name: sum(p.numel() for p in create_backbone(name, num_classes=1).parameters()) for name in (backbone,)}
    vim = sum(p.numel() for p in create_backbone("vim_nano_patch8_64", num_classes=1).parameters())
    assert abs(sizes[backbone] / vim - 1) <= 0.1


def test_vim_still_has_one_class_token() -> None:
    model = VisionMamba(**REGISTER)
    assert model.cls_index == 6
    assert isinstance(model.embed(images(model)), TokenState)
    assert model.embed(images(model)).cls_index == 6


@pytest.mark.parametrize("backbone", ["vit_nano_patch8_64", "mambar_small_patch16_224"])
@pytest.mark.parametrize(("method", "what"), [("linear", "pooled features"), ("svp", "tokens before block 5")])
def test_the_frozen_part_is_computed_once(
    backbone: str, method: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training with and without the stored values, on a transformer and on Mamba-Reg."""
    settle(tmp_path, monkeypatch)
    depths = ["--model.method.depths", "[5,6]"] if method == "svp" else []
    weights = []
    for cached in ("true", "false"):
        flags = ("--method", method, *depths, "--model.cache_features", cached)
        size = {"data__image_size": "64", "trainer__max_epochs": "2"}
        outcome = run(*small(*flags, model__backbone=backbone, model__scan_backend="auto", **size))
        stored = outcome.record.get("frozen_features", {}).get("train", "")
        assert stored.startswith(what) == (cached == "true")
        file = outcome.folder / "checkpoints" / "last.ckpt"
        weights.append(torch.load(file, weights_only=True)["state_dict"])
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-3, atol=1e-5), name
