"""The notebooks run from top to bottom, and what they say comes out."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# What comes before the accuracy in percent that a notebook prints, and what is less here than shown.
SHOWN = {
    "quickstart": (
        r"never saw a real digit: ([\d.]+) ",
        {
            "batch_real=64": "batch_real=16",
            "steps=100,": "steps=10, fit_steps=60,",
            "steps=300": "steps=120",
            "depth=2, width=32": "depth=1, width=16",
        },
    ),
    "uses": (r"bytes remember ten digits: ([\d.]+) ", {}),
    "your_own": (r"bytes of stripes: ([\d.]+) ", {"None, length=60": "None, length=30"}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "uses" else n for n in SHOWN])
def test_networks_learn_far_above_chance_and_pictures_are_shown(name, monkeypatch, capsys):
    pattern, fewer = SHOWN[name]
    cells = [cell for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"] if "outputs" in cell]
    assert not any(cell["outputs"] for cell in cells), "committed without outputs"
    sources = ["".join(cell["source"]) for cell in cells]
    for shown, run in fewer.items():
        assert any(shown in source for source in sources), shown
        sources = [source.replace(shown, run) for source in sources]
    monkeypatch.chdir(NOTEBOOKS)
    names: dict = {"__name__": "__main__"}
    try:
        with plt.rc_context({"backend": "agg"}):
            for source in sources:
                exec(compile(source, f"{name}.ipynb", "exec"), names)
            assert len(plt.get_fignums()) >= 2
    finally:
        plt.close("all")
    (accuracy,) = re.findall(pattern, capsys.readouterr().out)
    assert float(accuracy) > 60
