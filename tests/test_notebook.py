"""The notebooks run from top to bottom, and what they say comes out."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# The accuracy in percent that a notebook prints, and what it is above by far: chance.
ACCURACY = {
    "quickstart": (r"never saw a real digit: ([\d.]+) ", 80),
    "your_own": (r"bytes of stripes: ([\d.]+) ", 60),
}


@pytest.fixture(scope="module", params=ACCURACY)
def executed(request):
    notebook = nbformat.read(NOTEBOOKS / f"{request.param}.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "committed without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return request.param, [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def test_networks_learn_far_above_chance_and_pictures_are_shown(executed):
    name, outputs = executed
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    pattern, chance = ACCURACY[name]
    (accuracy,) = re.findall(pattern, printed)
    assert float(accuracy) > chance
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    assert not [o for o in outputs if o.output_type == "error"]
