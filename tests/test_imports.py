"""The import direction `train -> gsdd_jax -> kernels` and the purity of the library, read from the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "gsdd_jax", "train")

# What each package may import of this project.
ALLOWED_OWN = {"kernels": {"kernels"}, "gsdd_jax": {"gsdd_jax", "kernels"}, "train": {"train", "gsdd_jax", "kernels"}}
KERNELS_THIRD_PARTY = {"jax", "jaxlib", "numpy", "triton", "jax_triton"}

# The library is arrays and keys in, values out: no console, clock, global randomness, configuration or process.
IMPURE_MODULES = {
    "argparse", "datetime", "getpass", "logging", "matplotlib", "pdb", "random", "readline", "rich",
    "signal", "socket", "subprocess", "time", "tqdm", "urllib", "warnings", "yaml",
}  # fmt: skip
# Files, and reading them ahead in the background.
FILE_MODULES = {"fcntl", "fileinput", "glob", "mmap", "os", "pathlib", "shutil", "tempfile", "threading"}
# Data are exchanged as data: an unpickler runs whatever code the file names.
PICKLING_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# The choice of the backend: the GPU to compile for where there is none, the warning that a package is missing, and
# one of that package that must not reach users.
# What a reader passed over, which no value that it returns can say. The verbs show progress where they are asked to.
# The filter of what orbax logs of reads that it abandoned.
EXEMPT = {
    "kernels/splat.py": {"os", "warnings"},
    "kernels/_splat_triton.py": {"warnings"},
    "gsdd_jax/api.py": {"rich"},
    "gsdd_jax/data/__init__.py": {"warnings"},
    "gsdd_jax/orbax_set.py": {"logging"},
}
FORBIDDEN_CALLS = {"breakpoint", "eval", "exec", "exit", "input", "print", "quit"}
FORBIDDEN_ATTRIBUTES = {("sys", "exit"), ("sys", "stdout"), ("sys", "stderr"), ("jax", "debug"), ("jax", "config")}
# The rooms of the library that read and write files.
FILE_ROOMS = tuple(
    f"gsdd_jax/{room}" for room in ("data/", "experts.py", "files.py", "orbax_set.py", "synset.py", "uses/")
)


def imported_modules(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and absolute module name of every import, the lazy, relative and textual ones included."""
    package = path.removesuffix("__init__.py").removesuffix(".py").strip("/").split("/")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from package import module` imports package.module, and `from .. import train` may leave the package.
            yield from ((node.lineno, f"{module}.{alias.name}".strip(".")) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(path: str, source: str) -> list[str]:
    """Lists what a source file of the three packages does against the rules; `path` is relative to the root."""
    tree = ast.parse(source, path)
    package = path.split("/")[0]
    found = []
    if "utils" in path.removesuffix(".py").split("/"):
        found.append(f"{path}: a file named utils; name it after its concept")
    for line, module in imported_modules(path, tree):
        top = module.split(".")[0]
        where = f"{path}:{line}: imports {module}"
        if top in PACKAGES and top not in ALLOWED_OWN[package]:
            found.append(f"{where}, against the direction train -> gsdd_jax -> kernels")
        if top in ("configs", "tests", "benchmarks"):
            found.append(f"{where}, which is not installed")
        if top in PICKLING_MODULES:
            found.append(f"{where}; no pickle")
        if package == "kernels" and top not in {*PACKAGES, *KERNELS_THIRD_PARTY, *sys.stdlib_module_names}:
            found.append(f"{where}; kernels need only jax, numpy and triton")
        if top in EXEMPT.get(path, ()):
            continue
        if package != "train" and top in IMPURE_MODULES:
            found.append(f"{where}; host effects belong to train")
        if package != "train" and top in FILE_MODULES and not path.startswith(FILE_ROOMS):
            found.append(f"{where}; only {', '.join(FILE_ROOMS)} touch files")
    if package == "train":
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in FORBIDDEN_CALLS:
                found.append(f"{path}:{node.lineno}: calls {node.func.id}()")
            if node.func.id == "open" and not path.startswith(FILE_ROOMS):
                found.append(f"{path}:{node.lineno}: calls open()")
        if isinstance(node, ast.Attribute) and (getattr(node.value, "id", ""), node.attr) in FORBIDDEN_ATTRIBUTES:
            found.append(f"{path}:{node.lineno}: uses {ast.unparse(node)}")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{path}:{node.lineno}: a bare except")
        if isinstance(node, ast.Global):
            found.append(f"{path}:{node.lineno}: global state")
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_keeps_the_import_direction_and_its_purity(package):
    files = sources(package)
    assert files, f"no sources found in {ROOT / package}"
    found = []
    for file in files:
        found += violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


RENDER, SPLAT, TFDS, DISTILL = "gsdd_jax/render.py", "kernels/splat.py", "gsdd_jax/data/tfds.py", "train/distill.py"


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        (SPLAT, "from gsdd_jax.render import render", "against the direction"),
        (SPLAT, "import optax", "kernels need only"),
        (SPLAT, "def f():\n    import train.config", "against the direction"),
        (TFDS, "from ...train import config", "against the direction"),
        (RENDER, "import importlib\nimportlib.import_module('train.config')", "against the direction"),
        (RENDER, "import numpy, logging", "host effects"),
        (RENDER, "from time import perf_counter", "host effects"),
        (RENDER, "from pathlib import Path", "touch files"),
        (RENDER, "open('x')", "calls open"),
        (TFDS, "print('x')", "calls print"),
        (SPLAT, "import sys\nsys.exit(1)", "uses sys.exit"),
        (RENDER, "import jax\njax.config.update('a', 1)", "uses jax.config"),
        (RENDER, "try:\n    f()\nexcept:\n    pass", "bare except"),
        (RENDER, "def f():\n    global a\n    a = 1", "global state"),
        (DISTILL, "import pickle", "no pickle"),
        (DISTILL, "from tests.conftest import ROOT", "not installed"),
        ("gsdd_jax/utils/images.py", "", "named utils"),
        (SPLAT, "from . import _splat_xla\nfrom .spec import SplatSpec", None),
        (RENDER, "from kernels import splat\nfrom gsdd_jax import gaussians\nimport numpy, flax", None),
        (TFDS, "from pathlib import Path\nfrom .. import whiten\nopen('x')", None),
        (RENDER, "'''print(x) and import train in a text'''\n# import train\nobject.print()", None),
        (DISTILL, "import argparse, time, rich\nimport gsdd_jax, kernels\nfrom train import config\nprint(1)", None),
    ],
)
def test_checker_finds_the_violation_and_accepts_what_is_allowed(path, source, problem):
    found = violations(path, source)
    assert len(found) == (problem is not None) and all(problem in one and path in one for one in found)


def test_importing_the_library_leaves_optional_and_host_packages_alone():
    unwanted = ["triton", "jax_triton", "tensorflow", "tensorflow_datasets", "matplotlib", "sklearn"]
    script = f"import sys, kernels, gsdd_jax\nprint(*(name for name in {unwanted} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
    assert done.stderr == ""
