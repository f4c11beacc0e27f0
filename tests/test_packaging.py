"""The metadata in setup.cfg agree with the sources."""

import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gsdd_jax
from train import rundir

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gsdd_jax", "kernels", "train")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(text: str) -> list[Requirement]:
    lines = [line.strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def metadata() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    assert parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def extras(metadata) -> dict[str, list[Requirement]]:
    return {name: requirements(text) for name, text in metadata["options.extras_require"].items()}


def third_party_imports(source: str) -> set[str]:
    """Returns the top-level names imported absolutely, lazy imports included, less the standard library and ours."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - set(PACKAGES)


def undeclared(imports: set[str], declared: set[str], distributions: dict[str, list[str]]) -> set[str]:
    """Returns the imports that no declared distribution provides; one that is not installed stands for itself."""
    return {name for name in imports if not declared & {canonical(item) for item in distributions.get(name, [name])}}


def test_every_third_party_import_is_declared(metadata, extras):
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 3
    imports = {name for file in files for name in third_party_imports(file.read_text(encoding="utf-8"))}
    assert {"jax", "numpy"} <= imports
    declared = requirements(metadata["options"]["install_requires"]) + [
        item for each in extras.values() for item in each
    ]
    names = {canonical(item.name) for item in declared}
    assert undeclared(imports, names, dict(importlib.metadata.packages_distributions())) == set()


def test_requirements_accept_what_is_installed(metadata, extras):
    for requirement in requirements(metadata["options"]["install_requires"]) + extras["data"] + extras["dev"]:
        if canonical(requirement.name) != canonical(metadata["metadata"]["name"]):
            installed = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(installed), f"{requirement}, but {installed} is installed"


def test_requirements_name_packages_and_no_place_to_fetch_them_from(metadata, extras):
    declared = requirements(metadata["options"]["install_requires"]) + [
        item for each in extras.values() for item in each
    ]
    assert all(requirement.url is None for requirement in declared)
    for name in ("setup.cfg", "pyproject.toml", "Makefile", ".ci/run"):
        assert not re.search(r"https?://|index-url|find-links", (ROOT / name).read_text(encoding="utf-8")), name


def test_every_package_of_the_tree_is_installed_and_nothing_else(metadata):
    include = metadata["options.packages.find"]["include"].split()
    assert include == [f"{package}*" for package in PACKAGES]
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert folders
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, f"without __init__.py, so not installed: {missing}"
    files = {file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()}
    files |= set((ROOT / "gsdd_jax" / "configs").glob("*"))
    # Pictures of sets are for the checkout.
    sets = (ROOT / "gsdd_jax" / "sets").rglob("*")
    files |= {file for file in sets if file.is_file() and file.suffix != ".png"}
    data = {
        file
        for package, names in metadata["options.package_data"].items()
        for name in names.split()
        for file in (ROOT / package).glob(name)
    }
    assert {file for file in files if file.suffix not in (".py", ".pyc")} == data


def test_metadata_name_the_versions_that_work(metadata):
    assert metadata["metadata"]["name"] == "gsdd_jax"
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["metadata"]["version"])
    assert metadata["metadata"]["license"] == "Apache-2.0"
    assert metadata["options"]["python_requires"] == ">=3.11"
    jax = next(item for item in requirements(metadata["options"]["install_requires"]) if item.name == "jax")
    versions = ("0.10.1", "0.10.2", "0.11.2", "0.12.0.1")
    assert [jax.specifier.contains(version) for version in versions] == [False, True, True, True]


def test_the_gpu_kernels_alone_keep_jax_where_jax_triton_works(extras):
    for name in ("cuda", "lowering"):
        jax = next(item for item in extras[name] if item.name == "jax")
        assert jax.specifier.contains("0.11.2") and not jax.specifier.contains("0.12.0.1"), name


def test_wheel_distills_by_a_name_without_the_checkout_and_without_what_draws(tmp_path):
    pytest.importorskip("setuptools", "70.1", reason="older ones need another package to build a wheel")
    tree, there = tmp_path / "tree", tmp_path / "there"
    for name in (*PACKAGES, "configs", "sets"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--target", there, tree], check=True, timeout=120)
    shutil.rmtree(tree)
    assert (there / "gsdd_jax" / "py.typed").is_file()
    (there / "sitecustomize.py").write_text("import sys\nsys.modules |= {'matplotlib': None, 'jinja2': None}\n")
    fewer = [f"baselines.{name}=false" for name in ("fit_only", "pixel", "random_real", "full_data")]
    fewer += ["baselines.compressed=[]", "codec.name=pixel", "evaluate.seeds=1", "data.per_class=8"]
    command = [there / "bin" / "gsdd", "distill", "--config", "digits", "--smoke", "--quiet", "--out", "run", *fewer]
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([str(there), *(one for one in others if one and Path(one) != ROOT)])
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": path}, "capture_output": True, "text": True}
    done = subprocess.run(command, **where, timeout=300)
    assert done.returncode == 0, done.stderr
    note = "note: no pictures and report.html, for want of matplotlib and jinja2: pip install gsdd_jax[full]\n"
    assert done.stderr == note
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    # Of the checkout there would be one.
    assert result["commit"] is None
    assert rundir.read_command(tmp_path / "run").startswith("python -m train.distill --config digits --smoke")
    assert gsdd_jax.load(tmp_path / "run").images().shape == (10, 8, 8, 1)
    names = sorted(folder.name for folder in (ROOT / "sets").iterdir())
    reading = f"import gsdd_jax; print(gsdd_jax.__file__, *(len(gsdd_jax.load(name).labels) for name in {names}))"
    done = subprocess.run([sys.executable, "-c", reading], **where, timeout=60)
    found = [str(len(gsdd_jax.load(ROOT / "sets" / name).labels)) for name in names]
    assert done.stdout.split() == [str(there / "gsdd_jax" / "__init__.py"), *found], done.stderr
