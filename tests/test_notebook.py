"""The notebooks run from top to bottom, and what they say comes out."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# The accuracy in percent that a notebook prints, what it is above by far: chance; and steps that are fewer here.
SHOWN = {
    "quickstart": (
        r"never saw a real digit: ([\d.]+) ",
        60,
        {"steps=100,": "steps=20, fit_steps=60,", "steps=300": "steps=150"},
    ),
    "uses": (r"bytes remember ten digits: ([\d.]+) ", 60, {}),
    "your_own": (r"bytes of stripes: ([\d.]+) ", 60, {}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "uses" else n for n in SHOWN])
def test_networks_learn_far_above_chance_and_pictures_are_shown(name):
    pattern, chance, fewer = SHOWN[name]
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs for cell in cells), "committed without outputs"
    for shown, run in fewer.items():
        (cell,) = (cell for cell in cells if shown in cell.source)
        cell.source = cell.source.replace(shown, run)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    (accuracy,) = re.findall(pattern, "".join(o.text for o in outputs if o.output_type == "stream"))
    assert float(accuracy) > chance
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    assert not [o for o in outputs if o.output_type == "error"]
