"""The metadata in setup.cfg agree with the sources."""

import ast
import configparser
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    data = {
        ROOT / package / name for package, names in metadata["options.package_data"].items() for name in names.split()
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
