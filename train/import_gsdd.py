"""Turn Gaussians of the authors' code into a distilled set: ``python -m train.import_gsdd --file model_final.pth ...``.

    python -m train.import_gsdd --file model_final.pth --size 32 --classes airplane automobile ... --out DIR

Only tensors are read (``torch.load(weights_only=True)``). Of the two kinds of files that the released code writes, the
``.pth`` of its initialization is such a file, a state dict. The ``GSDD_TM_*.pt`` of its distillation is not: there
``model`` is a pickled module, and reading it runs what it names. Where you trust such a file, make the other kind with
the authors' code::

    checkpoint = torch.load(file, weights_only=False)
    torch.save({"model": checkpoint["model"].state_dict(), "syn_lr": checkpoint["syn_lr"]}, "tensors.pt")

Read of the state dict, as the code's ``GaussianImage_Cholesky_Batch`` names them: ``params.xy`` ``[n m, 2]``,
``params.cholesky`` ``[n m, 3]``, ``params.features`` ``[n m, c]``, opacities ``[n m, 1]`` as ``params.opacity`` or
``_opacity``, the images one behind the other and of equally many Gaussians, class by class, as ``num_points_per_image``
says. Units are those of `gsdd_jax.Gaussians`: positions in [-1,1], raw entries of L to which (0.5, 0, 0.5) is added, in
pixels of the size that ``--size`` names, since the file does not. Whatever does not match is refused.

The numbers are kept; the images are not quite those of the authors' renderer, which clamps ``opacity * g`` at 1, drops
it under 1/255 and draws at most 256 Gaussians per tile. Checkpoints of images (``images``, ``syn_lr``) are whitened
with a matrix that they do not hold, and are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gsdd_jax import Gaussians, SynSet, codecs, exchange, files, storage
from gsdd_jax.errors import needing
from gsdd_jax.gaussians import CHOLESKY_SHIFT
from train import commands
from train.errors import UserError, exit_cleanly
from train.export import check_target

LEAVES = ("xy", "cholesky", "features")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = commands.parser("import_gsdd", __doc__)
    parser.add_argument("--file", required=True, metavar="FILE", help="a state dict that torch.save wrote")
    parser.add_argument("--size", required=True, type=int, metavar="SIDE", help="of the images, in pixels")
    parser.add_argument("--classes", required=True, nargs="+", metavar="NAME", help="in the order of the labels")
    parser.add_argument("--dtype", default="bfloat16", metavar="NAME", help="on disk: bfloat16 (default) or float32")
    parser.add_argument("--out", required=True, metavar="DIR", help="what to make; absent or empty")
    args = parser.parse_args(argv)
    with exit_cleanly(debug=args.debug):
        if not 1 <= args.size <= exchange.SIDE:
            raise UserError(f"--size: expected a side from 1 to {exchange.SIDE} pixels, found {args.size}")
        if args.dtype not in storage.ITEMSIZE:
            raise UserError(f"--dtype: expected one of {', '.join(storage.ITEMSIZE)}; found {args.dtype!r}")
        check_target(Path(args.out))
        tensors, meta = read_tensors(Path(args.file))
        made = synset_of(tensors, args.size, args.classes, args.dtype, meta)
        files.write_folder(args.out, made.save)
        spec = made.codec.spec
        print(f"{args.out}: {made.codec.num_images} images of {spec.num_points} Gaussians, {made.nbytes} bytes")
    return 0


def read_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a state dict, and what is worth recording beside it."""
    with needing("--file: reading it needs PyTorch", extra="torch"):
        import torch
    if not file.is_file():
        raise UserError(f"--file: no such file: {file}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch raises whatever the damage leads to.
        raise UserError(
            f"--file: {file} is no file of tensors alone ({type(error).__name__}); a checkpoint with a pickled module "
            "is not read, python -m pydoc train.import_gsdd says what to do"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"--file: expected a dict of tensors, found {type(content).__name__}")
    if "images" in content:
        raise UserError("--file: expected Gaussians, found images, whose whitening the file does not hold")
    state = content["model"] if isinstance(content.get("model"), Mapping) else content
    # NumPy has no bfloat16.
    tensors = {str(k): one.detach().float().cpu().numpy() for k, one in state.items() if hasattr(one, "detach")}
    syn_lr: Any = content.get("syn_lr")
    return tensors, {"syn_lr": float(syn_lr)} if hasattr(syn_lr, "detach") else {}


def synset_of(
    tensors: Mapping[str, np.ndarray], side: int, class_names: Sequence[str], dtype: str, meta: Mapping[str, Any]
) -> SynSet:
    """Makes a set of the authors' tensors, of images that are square and equally many of each class, in their order.

    Raises:
        UserError: The tensors are not as the module's docstring says.
    """
    names = [*(f"params.{leaf}" for leaf in LEAVES), "num_points_per_image"]
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"--file: {missing[0]} is missing; found {', '.join(sorted(tensors)[:20]) or 'no tensors'}")
    xy, cholesky, features, counts = (np.asarray(tensors[name]) for name in names)
    counts = counts.reshape(-1)
    if not len(counts) or (counts != counts[0]).any() or counts[0] < 1:
        raise UserError("--file: num_points_per_image: expected equally many Gaussians for each image")
    n, m, k, c = len(counts), int(counts[0]), len(class_names), features.shape[-1]
    shift = tensors.get("cholesky_bound", np.array(CHOLESKY_SHIFT)).reshape(-1)
    if not np.array_equal(shift, np.array(CHOLESKY_SHIFT, np.float32)):
        raise UserError(f"--file: cholesky_bound: expected {CHOLESKY_SHIFT}, found {shift.tolist()[:3]}")
    for name, leaf, columns in zip(names, (xy, cholesky, features), (2, 3, c), strict=False):
        if leaf.shape != (n * m, columns):
            raise UserError(f"--file: {name}: expected shape {[n * m, columns]}, found {list(leaf.shape)}")
    opacity = tensors.get("params.opacity", tensors.get("_opacity", np.ones((n * m, 1), np.float32)))
    if opacity.size != n * m:
        raise UserError(f"--file: opacity: expected {n * m} numbers, found {opacity.size}")
    if not all(np.isfinite(leaf).all() for leaf in (xy, cholesky, features, opacity)):
        raise UserError("--file: expected finite numbers, found NaN or infinity")
    if n % k:
        raise UserError(f"--classes: {n} images are not equally many for each of {k} classes")
    codec = codecs.make(
        codecs.GaussianSpec(images_per_class=n // k, num_points=m, dtype=dtype),  # type: ignore[arg-type]
        image_shape=(side, side, c),
        num_classes=k,
    )
    leaves = [jnp.asarray(leaf.reshape(n, m, -1)) for leaf in (xy, cholesky, features, opacity)]
    masters = Gaussians(leaves[0], leaves[1], leaves[2], leaves[3][..., 0], size=(side, side))
    params = codec.dequantize(codec.quantize(masters))
    meta = {"source": "released GSDD code", **meta}
    return SynSet(codec, params, codec.nbytes(params) // k, tuple(class_names), meta)


if __name__ == "__main__":
    sys.exit(main())
