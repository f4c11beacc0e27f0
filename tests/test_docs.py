"""What docs/ shows is run as it stands there, and the site has a page for all that is public."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gsdd_jax
from gsdd_jax import codecs, data, match, nets

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def shown(name: str, language: str = "python") -> list[str]:
    """Returns the blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)


def patched(text: str, diff: str) -> str:
    """Applies a diff, whose hunks have context in place of numbers and are told apart by "@@"."""
    for hunk in diff.split("@@\n"):
        before, after = (
            "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] in kept) for kept in (" -", " +")
        )
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


# What a reader does after adding the file: use it by name in a config, and in a program.
CODEC = """
import jax, jax.numpy as jnp, numpy as np
import gsdd_jax
from gsdd_jax import SynSet, codecs, fitting
from train import config
spec = config.load("configs/digits.yaml", ["codec={name: tinted, lr: 0.02}"]).codec
assert (type(spec).__name__, spec.lr, gsdd_jax.__file__) == ("TintedSpec", 0.02, FILE)
codec = codecs.make(spec, image_shape=(6, 8, 3), num_classes=2, bytes_per_class=100)
assert codec.images_per_class == 3 and codec.nbytes(codec.init(None, jnp.ones((6, 6, 8, 3)))) == 180
images = jnp.asarray(np.random.default_rng(0).uniform(0.2, 1, (6, 6, 8, 3)), jnp.float32)
state = fitting.init_fit(jax.random.key(0), images, codec=codec, steps=20)
error = lambda params: float(jnp.mean((codec.decode(params) - images) ** 2))
fitted, _ = jax.jit(lambda s: fitting.fit_steps(s, images, codec=codec, steps=20, count=20))(state)
assert error(fitted.params) < error(state.params)
SynSet(codec, fitted.params, 100, ("a", "b")).save("set")
read = gsdd_jax.load("set")
assert read.images().tobytes() == jax.jit(codec.decode)(fitted.params).tobytes()
"""
SOURCE = """
import struct
import numpy as np
import gsdd_jax
from gsdd_jax import data
from train import config
assert gsdd_jax.__file__ == FILE
images = np.random.default_rng(0).integers(0, 256, (9, 6, 6), np.uint8)
labels = np.array([0, 1, 1, 0, 1, 0, 1, 0, 1], np.uint8)
for part, rows in (("train", slice(6)), ("t10k", slice(6, None))):
    for array, name in ((images[rows], "images-idx3"), (labels[rows], "labels-idx1")):
        head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
        open(f"{part}-{name}-ubyte", "wb").write(head + array.tobytes())
found = data.load(config.load("configs/digits.yaml", ["data.source=idx", "data.path=."]).data)
assert found.class_names == ("0", "1") and found.train_labels.tolist() == labels[:6].tolist()
assert (found.train_images[..., 0] == images[:6]).all() and (found.test_images[..., 0] == images[6:]).all()
few = data.load(data.DataSpec(source="idx", path=".", classes=("1",), per_class=2, channels=3, resolution=3))
assert few.train_images.shape == (2, 3, 3, 3) and len(few.test_images) == 2
open("t10k-labels-idx1-ubyte", "ab").write(b"0")
try:
    data.load(data.DataSpec(source="idx", path="."))
except ValueError as error:
    assert "expected a whole IDX file of bytes, found 12 bytes in t10k-labels" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.parametrize(
    ("page", "package", "file", "program"),
    [("add_codec", "codecs", "tinted.py", CODEC), ("add_source", "data", "idx.py", SOURCE)],
)
def test_what_a_page_adds_works_once_its_file_and_its_lines_are_there(tmp_path, page, package, file, program):
    for name in ("gsdd_jax", "kernels", "train", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "gsdd_jax" / package
    (code,), (diff,) = shown(page), shown(page, "diff")
    (folder / file).write_text(code)
    (folder / "__init__.py").write_text(patched((folder / "__init__.py").read_text(), diff))
    program = program.replace("FILE", repr(str(tmp_path / "gsdd_jax" / "__init__.py")))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_a_network_and_a_loop_of_ones_own_run_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in shown("network"):
        exec(compile(code, "network.md", "exec"), names)
    assert names["metrics"]["loss"].shape == (2, 20)
    assert gsdd_jax.load("stripes").images().shape == (6, 16, 16, 1)


def test_a_video_of_gaussians_is_drawn_as_shown():
    names: dict = {}
    for code in shown("video"):
        exec(compile(code, "video.md", "exec"), names)
    assert names["twice_as_long"].shape == (2, 16, 32, 32, 1)


def test_the_first_set_is_read_and_trains_a_network_as_shown():
    pytest.importorskip("sklearn")
    names: dict = {}
    # As shown, but for the set of a run and the steps of the networks.
    for code in shown("index"):
        code = code.replace("runs/digits", "notebooks/digits_set").replace("steps=500", "steps=150")
        exec(compile(code, "index.md", "exec"), names)
    assert names["larger"].shape == (len(names["labels"]), 64, 64, 1)
    assert names["accuracy"].mean > 0.6


def test_every_codec_is_in_the_table_of_the_documentation():
    text = (DOCS / "codecs.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(codecs.SPECS)


def test_every_public_name_has_a_place_in_the_reference():
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
    named = set(re.findall(r"^::: (\S+)", pages, re.MULTILINE))
    # The module of this name hides the function from what reads sources.
    assert "gsdd_jax.render.render" in named
    names = {f"gsdd_jax.{name}" for name in gsdd_jax.__all__} - {"gsdd_jax.render"}
    assert names <= named, sorted(names - named)
    # What these list stands on their pages.
    assert {module.__name__ for module in (codecs, match, nets, data)} <= named


def test_every_page_is_in_the_navigation_once():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\nvalidation:")[0]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert len(listed) == len(set(listed))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert {name for name in listed if not name.startswith("repository/")} == pages
    assert all((ROOT / name.removeprefix("repository/")).exists() for name in set(listed) - pages)
