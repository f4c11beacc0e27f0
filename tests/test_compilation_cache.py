"""The cache of compiled programs: who decides of it, and what accidents leave of a run."""

import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from train import compilation_cache

NAMES = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", *compilation_cache.SETTINGS)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's empty cache folder, and JAX without word of a cache."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(compilation_cache.SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        anew()
        yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def anew() -> None:
    """Leaves JAX as a process begins."""
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()


def run(factor: int = 2) -> None:
    """Compiles a program and checks what it computes."""
    np.testing.assert_array_equal(jax.jit(lambda x: factor * x + 1)(np.arange(3)), factor * np.arange(3) + 1)


def programs(home: Path) -> dict[str, tuple[bytes, bytes]]:
    """Returns each program in the cache and when it was used, by its key."""
    found = (path for path in home.rglob("*-cache"))
    return {p.name: (p.read_bytes(), Path(str(p).replace("-cache", "-atime")).read_bytes()) for p in found}


def test_program_is_kept_and_read_in_the_next_process(home, capsys):
    compilation_cache.enable()
    run()
    (first,) = programs(home).values()
    anew()
    compilation_cache.enable()
    before = time.time_ns()
    run()
    (then,) = programs(home).values()
    assert then[0] == first[0] and int.from_bytes(then[1], "little") > before
    assert list(home.glob("gsdd_jax/*"))[0].stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["jax_compilation_cache_dir", "jax_enable_compilation_cache"])
def test_what_jax_was_told_comes_first(home, name):
    told = {"jax_compilation_cache_dir": str(home / "mine"), "jax_enable_compilation_cache": False}[name]
    jax.config.update(name, told)
    sizes = {key: getattr(jax.config, key) for key in compilation_cache.SETTINGS}
    compilation_cache.enable()
    assert getattr(jax.config, name) == told and not list(home.glob("gsdd_jax"))
    assert {key: getattr(jax.config, key) for key in compilation_cache.SETTINGS} == sizes


def test_half_written_program_of_a_killed_process_is_written_again(home, capsys):
    compilation_cache.enable()
    run()
    (whole,) = programs(home).values()
    (path,) = home.rglob("*-cache")
    path.write_bytes(whole[0][:100])
    Path(str(path).replace("-cache", "-atime")).unlink()
    anew()
    compilation_cache.enable()
    run()
    assert len(programs(home)[path.name][0]) > 1000 and capsys.readouterr().err == ""


def test_damaged_programs_are_compiled_again(home, capsys):
    compilation_cache.enable()
    run(2), run(3)
    for path in home.rglob("*-cache"):
        path.write_bytes(b"damaged")
    anew()
    compilation_cache.enable()
    run(2), run(3)
    assert capsys.readouterr().err == ""


def test_folder_that_cannot_be_used_is_one_line_and_the_run_goes_on(home, capsys):
    (home / "gsdd_jax").write_text("a file")
    compilation_cache.enable()
    run()
    line = capsys.readouterr().err
    assert line.startswith("note: programs are compiled anew in every run") and str(home) in line
    assert line.count("\n") == 1 and jax.config.jax_compilation_cache_dir is None
