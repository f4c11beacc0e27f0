"""The gallery, in headless Chromium: pixels of a set as NumPy decodes them, and one line where there is none."""

import base64
import importlib.util
import json
import shutil

import numpy as np
import pytest

from benchmarks.gallery_pictures import FOLDER, chromium, opened
from gsdd_jax import decode_numpy
from train import gallery, report

ROOT = FOLDER.parent.parent
SETS = [ROOT / "sets" / "cifar10_coded_12k", ROOT / "notebooks" / "digits_set"]
# All images of a set at their size, as WebGL draws them: [n, h, w, 4], rows of pixels from the bottom as it reads them.
READ = """() => {
  view = { scale: 1, x: 0, y: 0 };
  draw();
  const bytes = plane.places.map(tileOf).flatMap(({ left, top, width, height }) => {
    const pixels = new Uint8Array(4 * width * height);
    gl.readPixels(left, canvas.height - top - height, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
    return [...pixels];
  });
  return btoa(bytes.map((byte) => String.fromCharCode(byte)).join(""));
}"""


def test_the_committed_page_is_the_written_one():
    written = gallery.page(SETS)
    assert (FOLDER / "index.html").read_text(encoding="utf-8") == written, f"run: {gallery.__doc__.split('::')[1]}"


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromium") or not importlib.util.find_spec("playwright"):
        pytest.skip("needs chromium of the system and the extra gsdd_jax[browser]")
    with chromium() as browser:
        yield browser


def test_pixels_are_those_of_the_decoder_and_damage_is_one_line(browser, tmp_path):
    page = opened(browser, FOLDER / "index.html", viewport={"width": 1600, "height": 1900})
    for at, path in enumerate(SETS):
        page.locator("#sets").select_option(str(at))
        images = decode_numpy.load(path).images
        n, h, w, _ = images.shape
        found = np.frombuffer(base64.b64decode(page.evaluate(READ)), np.uint8).reshape(n, h, w, 4)[:, ::-1, :, :3]
        assert np.abs(found / 255 - np.clip(images, 0, 1)).max() <= 1 / 255

    manifest, arrays = ((SETS[1] / name).read_bytes() for name in ("manifest.json", "synset.safetensors"))
    other = json.dumps(json.loads(manifest) | {"codec": {"name": "latent"}}).encode()
    cases = {
        "damaged": {"manifest.json": manifest, "synset.safetensors": b"\xff" * 8 + arrays[8:]},
        "arrays of": {"manifest.json": manifest, "synset.safetensors": arrays + b"\0"},
        "num_classes": {
            "manifest.json": b'{"format": "gsdd_jax/2", "image_shape": [8, 8, 1]}',
            "synset.safetensors": arrays,
        },
        "latent": {"manifest.json": other, "synset.safetensors": arrays},
        "together": {"synset.safetensors": arrays},
    }
    for text, files in cases.items():
        payload = [{"name": name, "mimeType": "", "buffer": data} for name, data in files.items()]
        page.locator("#files").set_input_files(payload)
        page.locator("#error").get_by_text(text).wait_for()
        assert "\n" not in page.locator("#error").text_content()
    page.locator("#files").set_input_files([SETS[1] / "manifest.json", SETS[1] / "synset.safetensors"])
    page.locator("#error").wait_for(state="hidden")
    assert page.evaluate("sets.length") == 3


def test_a_report_holds_the_page_with_its_set(browser, tmp_path):
    shutil.copytree(SETS[1], tmp_path / "export")
    problems = []
    page = browser.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.goto(report.write(tmp_path, {"name": "digits"}, {}).as_uri())
    page.locator("iframe").scroll_into_view_if_needed()
    frame = page.frame_locator("iframe")
    frame.locator("#status").get_by_text("0, image 1 of 3").wait_for()
    assert frame.locator("#name").text_content() == "digits" and not problems
