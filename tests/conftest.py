from __future__ import annotations

import atexit
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, here or in a subprocess of a test: workers of pytest-xdist, each with a pool of its own,
# would fight over the cores; and one thread adds in one order, whatever the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# The developer's own settings must not reach a test.
os.environ.pop("SVP_BENCH_DATA", None)
os.environ.pop("SVP_BENCH_TASKS", None)


def _own_cache() -> None:
    """Set up a cache for these tests, with the compiled kernels of the developer's: compiling them takes long."""
    from svp_bench.core.resources import cache_dir

    kernels = cache_dir("kernels")
    kernels.mkdir(parents=True, exist_ok=True)
    cache = Path(tempfile.mkdtemp(prefix="svp-bench-cache-"))
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    (cache / "kernels").symlink_to(kernels.resolve())
    os.environ["SVP_BENCH_CACHE"] = str(cache)


_own_cache()


# A busy or slow machine is not a failure: no property test is timed.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    # Only what the test has imported: importing torch here would cost every light test its seconds.
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def hub_offline(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a Hugging Face hub without network, and return its cache folder: empty, and what a test puts into it.

    Holds in this process and in the subprocesses of the test.
    """
    # It reads the environment once, when imported: import it before the changes, or they would outlive the test.
    from huggingface_hub import constants

    from svp_bench.core import resources

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    cache_dir = resources.cache_dir  # slim weights that the developer has are not there
    weights = tmp_path_factory.mktemp("weights")
    monkeypatch.setattr(resources, "cache_dir", lambda name: weights if name == "weights" else cache_dir(name))
    return cache
