"""Shared test set-up: the platform, the real data, and the `gpu` marker."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# Before anything imports JAX: a test run must not depend on the accelerators of the machine it happens to be on.
# GSDD_TEST_PLATFORM=cuda runs the suite on a GPU, and fails rather than skips when JAX finds none.
PLATFORM = os.environ.get("GSDD_TEST_PLATFORM") or "cpu"
os.environ["JAX_PLATFORMS"] = PLATFORM if PLATFORM == "cpu" else f"{PLATFORM},cpu"

# Tests mostly wait for compilation, and that for XLA's default generator of CPU loops: the older one compiles the toy
# run of test_cli.py in 4 s of 11. What users get is tested with `default_code`, and by the whole suite under
# XLA_FLAGS=--xla_cpu_use_fusion_emitters=true. jaxlib 0.11 has the default alone and dies of the flag.
# Nor is a program cut into parts for several threads, which costs a quarter more and has no core to gain from here.
_GENERATOR, _PARTS = "xla_cpu_use_fusion_emitters", "xla_cpu_parallel_codegen_split_count"
if PLATFORM == "cpu" and version("jaxlib").startswith("0.10.") and _GENERATOR not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_GENERATOR}=false --{_PARTS}=1".strip()

# Nor are LLVM's expensive passes worth their time, for most programs run once; XLA's own passes stay. A program that
# comes again, in another test or in a process that a test starts, is read from a cache. It starts empty: a stale
# executable would hide a broken lowering. Each worker has its own, for entries are not written in one go.
_COMPILED = tempfile.mkdtemp(prefix="gsdd_jax-compiled-")
atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

ROOT = Path(__file__).resolve().parent.parent
# Paths in configs are relative to the checkout.
os.chdir(ROOT)


def pytest_collection_finish() -> None:
    """Takes all that was imported out of Python's garbage collection, and lets it run less: it took 5 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20)


@pytest.fixture(scope="module", autouse=True)
def released() -> Iterator[None]:
    """Lets go of what a file has traced and compiled: that of all files together takes gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()


# Long files from the end of the alphabet: what comes last must be short, for two processes to end together.
_FIRST = tuple(f"test_{name}" for name in ("notebook", "readme", "render", "splat", "starts", "synset", "trajectory"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files, skips tests marked `gpu` when they would not run on a GPU, and says why."""
    items.sort(key=lambda item: not item.path.stem.startswith(_FIRST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if PLATFORM == "cpu" and not marked:
        return
    import jax

    backend = jax.default_backend()
    if PLATFORM != "cpu" and backend == "cpu":
        # JAX falls back to the CPU without a word where the plugin is missing; a GPU run that only skips looks green.
        raise pytest.UsageError(f"GSDD_TEST_PLATFORM={PLATFORM}, but JAX finds no such device")
    if backend != "gpu":
        reason = f"needs a CUDA device, JAX runs on {backend}; GSDD_TEST_PLATFORM=cuda selects one"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real datasets in TFDS format: GSDD_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("GSDD_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set GSDD_DATA to a folder of TFDS datasets")
    return folder


@pytest.fixture(scope="session")
def default_code() -> dict[str, Any]:
    """Options for `jax.jit` that compile as outside of the tests, whatever this file has set."""
    if PLATFORM != "cpu":
        return {}
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return options | ({_GENERATOR: True, _PARTS: 32} if _GENERATOR in os.environ.get("XLA_FLAGS", "") else {})


@pytest.fixture(scope="module")
def toy(request, tmp_path_factory) -> Path:
    """The config that a module has as ``TOY``, as a file."""
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(request.module.TOY)
    return path


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> Path:
    """An uninterrupted run of `toy`; read only."""
    from command_line import start

    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(toy, out) == 0
    return out
