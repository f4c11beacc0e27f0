"""What docs/ shows is run as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a reader does after adding the file: use it by name in a config, and in a program.
USE = """
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


def test_codec_of_the_documentation_works_once_its_file_and_its_line_are_there(tmp_path):
    text = (ROOT / "docs" / "codecs.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("gsdd_jax", "kernels", "train", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "gsdd_jax" / "codecs" / "tinted.py").write_text(code)
    registry = tmp_path / "gsdd_jax" / "codecs" / "__init__.py"
    before = registry.read_text()
    after = before.replace("CodecSpec = (\n", "CodecSpec = (\n    TintedSpec |\n").replace(
        "from gsdd_jax.codecs.spectral import SpectralSpec\n",
        "from gsdd_jax.codecs.spectral import SpectralSpec\nfrom gsdd_jax.codecs.tinted import TintedSpec\n",
    )
    assert after.count("TintedSpec") == 2
    registry.write_text(after)
    program = USE.replace("FILE", repr(str(tmp_path / "gsdd_jax" / "__init__.py")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_every_codec_is_in_the_table_of_the_documentation():
    from gsdd_jax import codecs

    text = (ROOT / "docs" / "codecs.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(codecs.SPECS)
