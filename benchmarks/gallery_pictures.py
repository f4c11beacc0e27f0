"""Pictures of the gallery for the README, of headless Chromium: ``python -m benchmarks.gallery_pictures``.

Needs the extra ``browser`` and a Chromium of the system. ``tests/test_gallery.py`` opens the page in the same way.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "gallery"
# WebGL without a GPU. As root, which has no sandbox, in containers.
FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]


@contextmanager
def chromium() -> Iterator[Any]:
    """Starts a browser; FileNotFoundError and ImportError where there is none, or no driver."""
    from playwright.sync_api import sync_playwright

    if (path := shutil.which("chromium")) is None:
        raise FileNotFoundError("chromium: not found; it is a package of the system")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def opened(browser: Any, path: Path, **settings: Any) -> Any:
    """Opens the page and waits for its first set."""
    page = browser.new_page(**settings)
    page.goto(path.as_uri())
    page.wait_for_function("set !== null")
    return page


def main() -> None:
    """Writes the whole first set, and one image of it at 16 times its size with its ellipses."""
    with chromium() as browser:
        page = opened(browser, FOLDER / "index.html", viewport={"width": 1280, "height": 800})
        page.wait_for_function("!set.png.some(Number.isNaN)", timeout=120_000)
        save(page.screenshot(), "gallery.png")
        page.set_viewport_size({"width": 820, "height": 760})
        page.evaluate(
            "selected = 84; fill(); zoom(16 / view.scale); describe(); showBytes(); show(plane.places[84], true)"
        )
        page.keyboard.press("e")
        page.evaluate("new Promise(requestAnimationFrame)")
        save(page.screenshot(), "ellipses.png")


def save(png: bytes, name: str) -> None:
    """Writes a picture in 256 colors, which takes a third of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    main()
