"""Published weights: from a hub on loopback by the real client, checked, pinned and slimmed."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import timm
import torch
from fake_hub import Hub, settle_client
from helpers import assert_error, command, wait_for
from safetensors import safe_open

from svp_bench.core import hub as client
from svp_bench.core.errors import CheckpointError
from svp_bench.methods.build import create_backbone
from svp_bench.models import hub_weights
from svp_bench.models.checkpoints import backbone_digest, load_checkpoint, resolve_checkpoint
from svp_bench.models.hub_weights import REVISIONS, STATED_DIGESTS, fetch_weights, published_file

REPO, FILE = "hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"
NAME = "vim_nano_patch8_64"  # in its place, for tests within the process: the same names of tensors
TINY = "vim_tiny_patch16_224"
COMMIT = REVISIONS[REPO]
SMALL = "vim_small_patch16_224"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    settle_client(monkeypatch, str(tmp_path / "hub"), server.url)
    monkeypatch.setenv("SVP_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    known = hub_weights.published_file
    monkeypatch.setattr(hub_weights, "published_file", lambda name: (REPO, FILE) if name == NAME else known(name))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def source() -> Any:
    model = timm.create_model(NAME)
    reference_vim.fill(model)
    return model


@pytest.fixture(scope="module")
def container(source: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file as Vim's own training code writes it: four copies of the numbers, and the arguments."""
    state = source.state_dict()
    path = tmp_path_factory.mktemp("weights") / FILE
    moments = {"state": {0: {"exp_avg": torch.zeros(300_000), "exp_avg_sq": torch.zeros(300_000)}}}
    ema = {name: value + 1 for name, value in state.items()}
    torch.save(
        {"model": state, "model_ema": ema, "optimizer": moments, "epoch": 299, "args": argparse.Namespace(lr=1e-3)},
        path,
    )
    return path.read_bytes()


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def assert_equal(model: Any, source: Any) -> None:
    for name, value in source.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(model.state_dict()[name], value), name


def folder() -> Path:
    return Path(os.environ["SVP_BENCH_CACHE"]) / "weights"


# ---- well


def test_revisions_and_the_digest_are_those_of_the_facts() -> None:
    assert REVISIONS == {
        "hustvl/Vim-small-midclstok": "babc4440f5fab6e08d97e371afa639c8cf98bf2c",
        "hustvl/Vim-tiny-midclstok": "07c00e0e4ea2973d8e343afdd807128a57bc9fd5",
    }
    assert STATED_DIGESTS[published_file(SMALL)[1]].startswith("sha256:aae4583e2def6389b66cfaf2")


def test_weights_are_downloaded_once_and_slimmed(hub: Hub, container: bytes, source: Any) -> None:
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    hub.add(REPO, {FILE: b"newer"}, "e" * 40, "models")  # the pinned commit is taken, not the newest
    model = create_backbone(NAME, num_classes=10, checkpoint="hub")
    assert_equal(model, source)
    assert hub.asked == [f"HEAD /{REPO}/resolve/{COMMIT}/{FILE}", f"GET /files/models/{REPO}/{COMMIT}/{FILE}"]

    hub.stop()
    slim = resolve_checkpoint("hub", NAME)
    assert slim is not None
    assert slim.parent == folder()
    assert slim.name == f"{NAME}-{sha256(slim.read_bytes())[7:15]}.safetensors"
    assert slim.stat().st_size < len(container) / 3
    with safe_open(slim, "pt") as file:
        assert {*file.keys()} == {*source.state_dict()}

    pin = json.loads((folder() / f"{NAME}@{COMMIT}.json").read_text())
    assert pin == {
        "repository": REPO,
        "file": FILE,
        "revision": COMMIT,
        "digest": sha256(container),
        "size": len(container),
        "weights": slim.name,
        "weights_digest": sha256(slim.read_bytes()),
        "checked": "first use",
    }


def test_the_digest_of_a_record_and_what_loading_reports_are_those_of_the_published_file(
    hub: Hub, container: bytes, tmp_path: Path
) -> None:
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    path = tmp_path / FILE
    path.write_bytes(container)
    for head, classes in ((None, 5), ("keep", 10)):
        slim = create_backbone(NAME, num_classes=classes, checkpoint="hub", head=head, img_size=(32, 128))
        whole = create_backbone(NAME, num_classes=classes, checkpoint=str(path), head=head, img_size=(32, 128))
        assert backbone_digest(slim) == backbone_digest(whole)
        reports = slim.load_report, whole.load_report
        assert reports[0] is not None
        assert reports[1] is not None
        assert reports[0].for_record() == reports[1].for_record()


def test_the_command_states_file_commit_and_digest(hub: Hub, container: bytes) -> None:
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    outcome = command("data", "weights", NAME)
    assert outcome.status == 0, outcome.err
    for part in (NAME, REPO, FILE, COMMIT, sha256(container), "pinned at the first use", "--model.checkpoint hub"):
        assert part in outcome.out
    hub.stop()
    again = command("data", "weights", NAME, "--offline")
    assert (again.status, again.out) == (0, outcome.out)


def test_another_revision_does_not_replace_the_pinned_one(hub: Hub, container: bytes, source: Any) -> None:
    other = timm.create_model(NAME)
    torch.save(other.state_dict(), "other.pth")
    hub.add(REPO, {FILE: Path("other.pth").read_bytes()}, "e" * 40, "models")
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    outcome = command("data", "weights", NAME, "--revision", "e" * 40)
    assert outcome.status == 0
    path = Path(outcome.out.splitlines()[0].partition(": ")[2].partition(" (")[0])
    assert f"--model.checkpoint {path} reads this file" in outcome.out
    assert_equal(create_backbone(NAME, num_classes=3, checkpoint=str(path)), other)
    assert_equal(create_backbone(NAME, num_classes=3, checkpoint="hub"), source)


def test_without_a_pinned_commit_the_one_of_the_first_use_stays(
    hub: Hub, container: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(REVISIONS, REPO)
    first = hub.add(REPO, {FILE: container}, "a" * 40, "models")
    fetch_weights(NAME)
    path = folder() / f"{NAME}@main.json"
    pin = json.loads(path.read_text())
    assert (pin["revision"], pin["checked"]) == (first, "first use")
    hub.add(REPO, {FILE: b"newer"}, "b" * 40, "models")
    (folder() / pin["weights"]).unlink()
    assert resolve_checkpoint("hub", NAME) == folder() / pin["weights"]
    assert json.loads(path.read_text()) == pin


def test_weights_of_timm(hub: Hub) -> None:
    name = "deit_tiny_patch16_224"
    repository, file = published_file(name)
    model = timm.create_model(name)
    from safetensors.torch import save_file

    save_file(model.state_dict(), file)
    hub.add(repository, {file: Path(file).read_bytes()}, "a" * 40, "models")
    outcome = command("data", "weights", "deit_tiny")
    assert outcome.status == 0, outcome.err
    assert repository in outcome.out


def test_a_file_of_another_model_is_not_pinned_and_the_right_one_is_taken_later(hub: Hub) -> None:
    from safetensors.torch import save

    repository, file = published_file("deit_tiny_patch16_224")
    hub.add(repository, {file: save({"conv1.weight": torch.zeros(3, 3)})}, "a" * 40, "models")
    line = assert_error(command("data", "weights", "deit_tiny"), 1)
    assert "conv1.weight" in line
    assert not list(folder().glob("*.json"))
    model = timm.create_model("deit_tiny_patch16_224")
    hub.add(repository, {file: save(dict(model.state_dict()))}, "b" * 40, "models")
    assert command("data", "weights", "deit_tiny").status == 0


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet50", ""), ("vim_tiny_patch16_224.bogus", ""), ("deit_small.fb_in2k", "fb_in1k")]
)
def test_what_is_no_backbone_or_checkpoint_is_one_line(hub: Hub, name: str, nearest: str) -> None:
    line = assert_error(command("data", "weights", name), 2)
    assert name.partition(".")[2] in line
    assert nearest in line


# ---- layouts


@pytest.mark.parametrize(
    "layout", ["plain", "model", "state_dict", "module.", "only model_ema", "model_ema with module.", "other head"]
)
def test_layouts_that_people_have(hub: Hub, source: Any, layout: str) -> None:
    """The EMA copy is read only where there is no other; a head of other classes is dropped."""
    state = dict(source.state_dict())
    wrapped = {f"module.{name}": value for name, value in state.items()}
    other = {**state, "head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}
    content = {
        "plain": state,
        "model": {"model": state, "model_ema": {name: value + 1 for name, value in state.items()}},
        "state_dict": {"state_dict": state, "epoch": 3},
        "module.": {"model": wrapped},
        "only model_ema": {"model_ema": state, "epoch": 3},
        "model_ema with module.": {"model_ema": wrapped},
        "other head": {"model": other},
    }[layout]
    torch.save(content, FILE)
    hub.add(REPO, {FILE: Path(FILE).read_bytes()}, COMMIT, "models")
    model = create_backbone(NAME, num_classes=5, checkpoint="hub")
    assert_equal(model, source)
    assert model.load_report is not None
    assert model.load_report.dropped == ("head.bias", "head.weight")


def test_positions_of_stride_8_are_resized_into_stride_16(hub: Hub) -> None:
    """Its grid of 27 × 27 becomes 14 × 14; the row of the class token, in the middle of either, is copied."""
    fine = timm.create_model("vim_tiny_patch16_stride8_224", depth=1)
    torch.nn.init.normal_(fine.pos_embed)
    torch.save({"model": fine.state_dict()}, FILE)
    hub.add(REPO, {FILE: Path(FILE).read_bytes()}, COMMIT, "models")
    path, _ = fetch_weights(TINY)
    model = timm.create_model(TINY, depth=1)
    report = load_checkpoint(model, path)
    assert report.pos_embed_resized == ((27, 27), (14, 14))
    assert model.pos_embed.shape == (1, 197, 192)
    assert torch.equal(model.pos_embed[0, 98], fine.pos_embed[0, 364])


def test_half_precision_stays_half_precision_in_the_slim_file(hub: Hub, source: Any) -> None:
    torch.save({"model": {name: value.half() for name, value in source.state_dict().items()}}, FILE)
    hub.add(REPO, {FILE: Path(FILE).read_bytes()}, COMMIT, "models")
    path, _ = fetch_weights(NAME)
    report = load_checkpoint(create_backbone(NAME, num_classes=5), path)
    assert len(report.cast) == 1
    assert report.cast[0].startswith("float16 -> float32")


# ---- refused


def test_a_later_download_must_have_the_digest_of_the_first(hub: Hub, container: bytes, tmp_path: Path) -> None:
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    slim, pin = fetch_weights(NAME)
    assert pin is not None
    slim.unlink()
    for path in (tmp_path / "hub").rglob(FILE):
        path.resolve().unlink()
        path.unlink()
    hub.repositories[f"models/{REPO}"][COMMIT] = {FILE: container[:-1] + b"!"}
    with pytest.raises(CheckpointError, match=f"expected {pin.digest}; .*--digest") as caught:
        fetch_weights(NAME)
    assert sha256(container[:-1] + b"!") in str(caught.value)
    assert not slim.exists()


def test_a_file_without_the_stated_digest(hub: Hub, container: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party states a digest; who knows better can give another."""
    monkeypatch.setitem(STATED_DIGESTS, FILE, "sha256:" + "0" * 64)
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    text = assert_error(command("data", "weights", NAME), 1)
    for part in (STATED_DIGESTS[FILE], sha256(container), "--digest", "--model.checkpoint PATH"):
        assert part in text
    assert not [*folder().glob("*.safetensors")]
    outcome = command("data", "weights", NAME, "--digest", sha256(container))
    assert outcome.status == 0
    assert "as given" in outcome.out
    assert resolve_checkpoint("hub", NAME) is not None


def test_the_stated_digest_is_reported(hub: Hub, container: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATED_DIGESTS, FILE, sha256(container))
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    assert "as stated by a third party" in command("data", "weights", NAME).out


def test_a_damaged_slim_file(hub: Hub, container: bytes) -> None:
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    slim, _ = fetch_weights(NAME)
    slim.write_bytes(slim.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="delete it, and it is written again"):
        resolve_checkpoint("hub", NAME)
    slim.unlink()
    assert resolve_checkpoint("hub", NAME) == slim


@pytest.mark.parametrize("content", [b"{", b'{"weights": "../../x.safetensors"}', b"[]"])
def test_a_damaged_pin(hub: Hub, content: bytes) -> None:
    folder().mkdir(parents=True)
    (folder() / f"{NAME}@{COMMIT}.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{NAME}@{COMMIT}.json"):
        resolve_checkpoint("hub", NAME)


def test_a_file_that_is_no_checkpoint_leaves_nothing(hub: Hub) -> None:
    hub.add(REPO, {FILE: b"<html>"}, COMMIT, "models")
    with pytest.raises(CheckpointError, match="a page of HTML or XML"):
        resolve_checkpoint("hub", NAME)
    assert not [path for path in folder().iterdir() if not path.name.endswith(".lock")]


def test_wrong_usage(hub: Hub) -> None:
    assert "did you mean 'vim_small_patch16_224'" in assert_error(command("data", "weights", "vim_smal_patch16_224"), 2)
    assert "did you mean 'vim_small'" in assert_error(command("data", "weights", "viim_small"), 2)
    assert "NAMES" in assert_error(command("data", "weights"), 2)
    assert "no published checkpoint" in assert_error(command("data", "weights", "vit_nano_patch8_64"), 1)
    assert "--digest is that of one file" in assert_error(
        command("data", "weights", NAME, "vim_small", "--digest", "sha256:" + "0" * 64), 2
    )
    assert "64 hexadecimal digits" in assert_error(command("data", "weights", NAME, "--digest", "12"), 1)
    assert "neither a commit nor a branch" in assert_error(command("data", "weights", NAME, "--revision", "../x"), 1)


def test_a_cache_folder_that_cannot_be_written(hub: Hub, container: bytes, source: Any) -> None:
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    folder().parent.write_bytes(b"a file in its place")
    with pytest.warns(UserWarning, match="the weights are read from .*vim_t_midclstok_76p1acc.pth"):
        model = create_backbone(NAME, num_classes=10, checkpoint="hub")
    assert_equal(model, source)


# ---- the network


def test_a_busy_hub_and_a_cut_download(hub: Hub, container: bytes) -> None:
    hub.add(REPO, {FILE: container}, COMMIT, "models")
    hub.failing, hub.cut = [503], 1_000_000
    _, pin = fetch_weights(NAME)
    assert pin is not None
    assert pin.digest == sha256(container)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return weights that the command knows by name, of one block."""
    path = tmp_path_factory.mktemp("tiny") / FILE
    torch.save({"model": timm.create_model(TINY, depth=1).state_dict()}, path)
    return path.read_bytes()


def start(*names: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "svp_bench", "data", "weights", *names], stdout=-1, text=True)


def test_a_killed_download_is_continued(hub: Hub, tiny: bytes) -> None:
    hub.add(REPO, {FILE: tiny}, COMMIT, "models")
    hub.hold = threading.Event()
    process = start(TINY)
    wait_for(lambda: hub.sent, 120)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    hub.hold.set()
    hub.hold = None
    assert not [*folder().glob("*.safetensors")]
    left = folder() / f".{TINY}@{COMMIT}.safetensors.01234567.tmp"  # if it is killed later, while it writes
    left.write_bytes(b"half")
    assert sha256(tiny) in command("data", "weights", TINY).out
    assert not left.exists()


def test_two_processes_download_once(hub: Hub, tiny: bytes) -> None:
    hub.add(REPO, {FILE: tiny}, COMMIT, "models")
    both = [start("vim_tiny"), start(TINY)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(f"{TINY}: ")
    assert len([line for line in hub.asked if line.startswith("GET")]) == 1
    assert len([*folder().glob("*.safetensors")]) == 1


def one_line_without_network() -> str:
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint("hub", SMALL)
    assert time.perf_counter() - start < 20  # no retries and no timeout; a busy machine is no failure
    text = str(caught.value)
    assert "\n" not in text
    revision = REVISIONS["hustvl/Vim-small-midclstok"]
    for part in (
        f"cannot get the weights of {SMALL}: hustvl/Vim-small-midclstok at {revision} is not in the local hub cache",
        f"https://huggingface.co/hustvl/Vim-small-midclstok/resolve/{revision}/vim_s_midclstok_80p5acc.pth",
        "--model.checkpoint PATH",
        "--model.checkpoint none for random weights",
    ):
        assert part in text
    return text


def test_a_hub_that_refuses_the_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert f"{endpoint} failed (ConnectionRefusedError" in one_line_without_network()


def test_a_machine_without_name_service(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(address: tuple[str, int], timeout: float | None = None) -> socket.socket:
        assert address == ("huggingface.co", 443)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr(client.socket, "create_connection", unknown)
    assert "https://huggingface.co failed (gaierror" in one_line_without_network()


def test_a_hub_that_is_switched_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in one_line_without_network()
    assert not hub.asked


def test_a_hub_without_the_file(hub: Hub, tmp_path: Path) -> None:
    assert f"{hub.url} failed (" in one_line_without_network()
    assert not list((tmp_path / "hub").rglob("*.pth"))


def test_the_published_file_in_the_cache_needs_no_network(hub: Hub, container: bytes, source: Any) -> None:
    """As on a machine where another program has downloaded it."""
    from huggingface_hub import hf_hub_download

    hub.add(REPO, {FILE: container}, COMMIT, "models")
    hf_hub_download(REPO, FILE, revision=COMMIT, endpoint=hub.url)
    hub.stop()
    assert_equal(create_backbone(NAME, num_classes=10, checkpoint="hub"), source)


def test_timm_itself_loads_a_published_file_from_the_hub(hub: Hub) -> None:
    """`timm.create_model(…, pretrained=True)`: through our loader, since timm's would refuse the container."""
    from huggingface_hub import hf_hub_download

    torch.save({"model": (source := timm.create_model(TINY)).state_dict()}, FILE)
    hub.add(REPO, {FILE: Path(FILE).read_bytes()}, COMMIT, "models")
    hf_hub_download(REPO, FILE, endpoint=hub.url)  # into the cache, where timm finds it
    model = timm.create_model(TINY, pretrained=True)
    assert_equal(model, source)
