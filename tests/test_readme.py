import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks import tables
from gsdd_jax import api

ROOT = Path(__file__).resolve().parent.parent
QUICK = api.TRAINING.__class__(steps=120, batch=60, seeds=1)
README = (ROOT / "README.md").read_text(encoding="utf-8")


DOCUMENTS = [path.read_text(encoding="utf-8") for path in tables.DOCUMENTS]


def test_tables_and_cards_equal_the_committed_results():
    assert not [str(path) for path in tables.stale()], "run python -m benchmarks.tables"


def test_every_table_is_shown_once_and_has_rows():
    blocks = [match[0] for text in DOCUMENTS for match in tables.BLOCK.finditer(text)]
    assert len(blocks) == len(tables.TABLES)
    assert all(block.count("\n|") >= 3 for block in blocks)


def test_readme_python_runs_as_shown(monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    # As shown, but for fewer images and steps, smaller batches, and the networks of the test, which take minutes.
    monkeypatch.setattr(api.evaluate, "__kwdefaults__", api.evaluate.__kwdefaults__ | {"training": QUICK})
    for shown, run in {
        "images_per_class=20": "images_per_class=6",
        "steps=200": "steps=10, fit_steps=60",
        "DistributionMatching()": "DistributionMatching(batch_real=16)",
        "nn.Conv(32, (3, 3), strides": "nn.Conv(16, (3, 3), strides",
        "nn.Conv(32, (3, 3))(x))\n": "nn.Conv(16, (3, 3))(x))\n",
    }.items():
        assert code.count(shown) == 1
        code = code.replace(shown, run)
    exec(compile(code, "README.md", "exec"), names)
    assert names["accuracy"].mean > 0.6
    assert names["images"].shape == (60, 8, 8, 1) and names["labels"].tolist() == sorted([*range(10)] * 6)


def headings_of(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {title.lower().replace(" ", "-") for title in titles}


PAGES = [ROOT / f"{name}.md" for name in ("README", "BUILD", "CONTRIBUTING")]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "sets").rglob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_and_commands_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists(), target
        assert not anchor or anchor in headings_of(path.parent / file if file else path), target
    for target in re.findall(r"--config (\S+yaml)", text):
        assert (ROOT / target).exists(), target
    # Tables keep the command that made them, whatever has become of it.
    for target in re.findall(r"python -m ((?:train|benchmarks)\.[\w.]+)", tables.BLOCK.sub("", text)):
        assert importlib.util.find_spec(target.rstrip(".")), target
