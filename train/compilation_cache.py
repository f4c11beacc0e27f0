"""JAX's persistent compilation cache for the command lines: what was compiled once is read the next time.

It lies in the user's cache folder. What JAX was told itself comes first: JAX_COMPILATION_CACHE_DIR is another folder,
JAX_ENABLE_COMPILATION_CACHE=false none. The library leaves JAX's settings alone: they hold for a whole process, which
in a notebook belongs to others too.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import filelock
import jax

# A run compiles a hundred programs; most of them take less time than a file is worth. With a limit of its size JAX also
# locks the cache, so that several processes may share it.
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": 0,
    "jax_compilation_cache_max_size": 2**30,
}


def enable() -> None:
    """Turns the cache on, unless JAX was told of one; a folder that cannot be used is one line on stderr.

    Not for a run of several processes, of which one would read a program that another compiles: XLA lets them share
    that work and wait for each other.
    """
    told = jax.config.values
    if told["jax_compilation_cache_dir"] is not None or not told["jax_enable_compilation_cache"]:
        return
    # Of this machine's kind: XLA cuts loops for its cores, whose number is not in JAX's key.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = root / "gsdd_jax" / f"compiled-{cores}-cores"
        # What lies there is run: nobody else may write it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # JAX writes a program, then when it was used, and stumbles over what was killed in between.
        with filelock.FileLock(folder / ".lockfile", timeout=10):
            for program in folder.glob("*-cache"):
                if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
                    program.unlink()
    except (OSError, RuntimeError) as error:
        print(f"note: programs are compiled anew in every run, for there is no cache of them: {error}", file=sys.stderr)
        return
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Of each program that cannot be read or written, which is then compiled.
    warnings.filterwarnings("ignore", ".*persistent compilation cache entry")
