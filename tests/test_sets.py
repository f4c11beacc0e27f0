"""Released sets: read by their names, what their cards say, tested and made anew by the commands that say so."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import ends

import gsdd_jax
from benchmarks import cards, tables
from gsdd_jax import decode_numpy
from train import evaluate
from train.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SETS = ROOT / "sets"


def stated(card: str, pattern: str) -> list[int]:
    """Returns the numbers of a row of a card."""
    (found,) = re.findall(pattern, card, re.MULTILINE)
    return [int(number.replace(",", "")) for number in found]


@pytest.mark.parametrize("folder", sorted(SETS.iterdir()), ids=lambda folder: folder.name)
def test_a_set_is_read_as_its_card_shows_and_has_its_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card, arrays = (folder / "README.md").read_text(), (folder / "export" / "synset.safetensors").read_bytes()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(compile(code, folder.name, "exec"), names)
    images, labels, classes = np.asarray(names["images"]), names["labels"], len(names["synset"].class_names)
    n, each, *shape = stated(card, r"^\| images \| (\d+), (\d+) of each class, (\d+) x (\d+) x (\d+) \|$")
    assert images.shape == (n, *shape) and n == each * classes == len(labels)
    assert np.isfinite(images).all() and images.std() > 0.1
    assert f"{len(arrays):,} bytes, SHA-256 `{hashlib.sha256(arrays).hexdigest()}`" in card
    size, budget = stated(card, r"^\| bytes per class \| ([\d,]+).*; the budget is ([\d,]+) \|$")
    # Of safetensors: the size of the header in 8 bytes, the header, the numbers.
    assert size == round((len(arrays) - 8 - int.from_bytes(arrays[:8], "little")) / classes) <= budget


def test_networks_are_trained_on_a_set_by_its_path_or_its_name(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    found = []
    for run in (SETS / "digits", "digits"):
        assert ends(evaluate, "--run", run, "--quiet", "evaluate.steps=20", "evaluate.seeds=1") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["mean"] > 0.2


@pytest.mark.parametrize("load", [gsdd_jax.load, decode_numpy.load])
def test_unknown_names_are_refused_with_those_there_are_and_paths_go_first(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = "no distilled set here (expected manifest.json, or export/manifest.json of a run)"
    names = ", ".join(sorted(folder.name for folder in SETS.iterdir()))
    for path, message in {
        "digit": f"digit: {expected}, and no released set of this name: {names}",
        "sets/digits": f"sets/digits: {expected}",
    }.items():
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
            load(path)
    assert len(load("digits").labels) == 30
    (tmp_path / "digits").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^digits: {re.escape(expected)}$"):
        load("digits")


def test_one_command_makes_a_set_of_a_run_and_another_in_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "DOCUMENTS", ())
    for module, name, path in ((tables, "ROOT", tmp_path), (cards, "SETS", tmp_path / "sets")):
        monkeypatch.setattr(module, name, path)
    there = tmp_path / "sets" / "mine"

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["tables", *arguments])
        return tables.main()

    for name in ("cifar10_packed_12k", "digits"):
        assert run("--release", str(SETS / name), "mine") == 0
        kept = {path.relative_to(there) for path in there.rglob("*") if path.is_file()}
        assert kept == {path.relative_to(SETS / name) for path in (SETS / name).rglob("*") if path.is_file()}
        assert (there / "result.json").read_bytes() == (SETS / name / "result.json").read_bytes()
        assert 'gsdd.load("mine")' in (there / "README.md").read_text()
    assert run("--check") == 0
    result = json.loads((there / "result.json").read_text())
    result["accuracy"]["mean"] = 0.125
    (there / "result.json").write_text(json.dumps(result))
    assert run("--check") == 1
    assert capsys.readouterr().err == "sets/mine/README.md: not what its results say: run python -m benchmarks.tables\n"
    assert run() == 0
    assert "| 12.5 ± " in (there / "README.md").read_text() and run("--check") == 0

    (there / "result.json").write_text(json.dumps(result | {"dataset": "unheard_of"}))
    with pytest.raises(UserError, match=r"mine: DATA of benchmarks/cards.py does not say what unheard_of is"):
        run("--release", str(there), "other")
