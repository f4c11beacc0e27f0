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
    page.locator("#status").get_by_text("image 1 of").wait_for()
    return page


def main() -> None:
    """Writes the whole first set, and one image of it at 16 times its size with its ellipses."""
    with chromium() as browser:
        page = opened(browser, FOLDER / "index.html", viewport={"width": 1080, "height": 680})
        page.locator("#set_png", has_not_text="…").wait_for(timeout=120_000)
        # Fewer colors take a third of the bytes.
        Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(192).save(
            FOLDER / "gallery.png", optimize=True
        )
        page.set_viewport_size({"width": 640, "height": 900})
        page.evaluate("select(plane.places[84]); fill(); zoom(16 / view.scale); show(plane.places[84], true)")
        page.keyboard.press("e")
        page.evaluate("new Promise(requestAnimationFrame)")
        page.screenshot(path=FOLDER / "ellipses.png")


if __name__ == "__main__":
    main()
