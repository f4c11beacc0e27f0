"""A page that shows distilled sets in a browser: ``python -m train.gallery DIR... [--out FILE]``.

One HTML file with the sets in it, which opens others as well: it decodes and draws them by itself, at any scale, and
fetches nothing. ``docs/gallery/index.html`` is such a page, and the report of a run holds one of its set::

    python -m train.gallery sets/cifar10_coded_12k notebooks/digits_set \
        --out docs/gallery/index.html
"""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from gsdd_jax import decode_numpy, files, synset
from train import commands
from train.errors import UserError, exit_cleanly

# Bytes of a set within a report.
MOST = 2 << 20
_HERE = Path(__file__).parent


@exit_cleanly()
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    parser = commands.parser("gallery", __doc__)
    parser.add_argument("sets", nargs="+", metavar="DIR", help="a set, or a run that has one")
    parser.add_argument("--out", type=Path, default=Path("gallery.html"), help="the HTML file (default: gallery.html)")
    arguments = parser.parse_args(argv)
    for path in arguments.sets:
        shapes = _shapes(path)
        if len(shapes) > 1:
            raise UserError(f"{path}: a merged set; name the folders of its parts")
        if len(shapes[0]) != 3:
            raise UserError(f"{path}: expected a set of images, found videos {list(shapes[0])}; see train.export")
    files.write_bytes(arguments.out, page(arguments.sets).encode())
    print(arguments.out)
    return 0


def page(sets: Sequence[synset.Location]) -> str:
    """Returns the page as HTML, with these sets in it, of which none is a merged one."""
    import jinja2  # here, or every command line would wait for it

    engine = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hash_of(script())}"
    return engine.from_string((_HERE / "gallery.html.jinja").read_text(encoding="utf-8")).render(
        policy=policy, script=script(), sets=[_embedded(synset.folder_of(path)) for path in sets]
    )


def of_run(path: Path) -> str | None:
    """Returns the page of a run's set, or None where there is none, or one that is too large or is not shown.

    Videos are not.
    """
    try:
        folder = synset.folder_of(path)
        if (folder / synset.ARRAYS).stat().st_size > MOST or [len(shape) for shape in _shapes(folder)] != [3]:
            return None
    except (FileNotFoundError, ValueError):
        return None
    return page([folder])


def script() -> str:
    """Returns the script of the page."""
    return "\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("gallery_decode.js", "gallery.js"))


def hash_of(text: str) -> str:
    """Returns what a content security policy calls a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shapes(path: synset.Location) -> list[tuple[int, ...]]:
    """Returns the shapes of what the parts of a set draw, (h, w, c) or (t, h, w, c)."""
    return [manifest.image_shape for manifest, *_ in decode_numpy.read(path).parts]


def _embedded(folder: Path) -> dict[str, str]:
    arrays = (folder / synset.ARRAYS).read_bytes()
    return {
        "manifest": (folder / synset.MANIFEST).read_text(encoding="utf-8"),
        "arrays": base64.b64encode(arrays).decode(),
    }


if __name__ == "__main__":
    sys.exit(main())
