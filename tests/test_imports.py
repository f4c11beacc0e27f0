"""The import direction `train -> gsdd_jax -> kernels`; that the library is pure is for ruff to see."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"kernels", "gsdd_jax", "train", "tests", "benchmarks"}


def imported(path: Path) -> set[str]:
    """Returns what a file imports, by the names of whole packages."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in [*whole, *parts]}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("kernels", {"kernels"}), ("gsdd_jax", {"gsdd_jax", "kernels"}), ("train", {"train", "gsdd_jax", "kernels"})],
)
def test_package_keeps_the_import_direction(package, allowed):
    found = {path: imported(path) for path in (ROOT / package).rglob("*.py")}
    assert any(allowed & names for names in found.values())
    assert {path for path, names in found.items() if names & OWN - allowed} == set()
    if package == "kernels":
        others = {"jax", "jaxlib", "numpy", "triton", "jax_triton", *sys.stdlib_module_names}
        assert set().union(*found.values()) - allowed <= others


def test_set_is_read_and_drawn_where_nothing_is_installed_but_what_that_takes():
    absent = ["flax", "optax", "orbax", "chex", "PIL", "tqdm", "filelock", "ruamel", "jinja2", "submitit"]
    absent += ["matplotlib", "sklearn", "scipy.stats", "triton", "jax_triton", "tensorflow", "tensorflow_datasets"]
    script = f"""
import sys
sys.modules |= dict.fromkeys({absent})
import gsdd_jax, kernels
made = gsdd_jax.load("notebooks/digits_set")
print(*made.images((16, 16)).shape, made.soft_labels is not None, "distill" in dir(gsdd_jax))
gsdd_jax.distill
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split()[1:] == ["16", "16", "1", "False", "True"], done.stderr
    # Nothing but the last line fails, and says for want of what.
    assert re.fullmatch(
        r"Traceback .*ModuleNotFoundError: import of (flax|optax) halted[^\n]*\n", done.stderr, re.DOTALL
    )
