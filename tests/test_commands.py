"""The console command, and what all command lines share."""

import re
import sys
from pathlib import Path

import pytest
from command_line import ends
from test_imports import imported

from train import commands, evaluate, replay
from train import config as configs

ROOT = Path(__file__).resolve().parent.parent


def test_every_command_line_is_a_command_and_is_named_with_what_it_does(capsys):
    lines = {file.stem for file in (ROOT / "train").glob("*.py") if "\ndef main(" in file.read_text()}
    assert lines - {"commands"} == set(commands.COMMANDS)
    assert commands.main(["--help"]) == 0
    shown = capsys.readouterr().out
    listed = dict(re.findall(r"^  (\w+) +(\S.*\.)$", shown, re.MULTILINE))
    assert list(listed) == list(commands.COMMANDS)
    assert listed["export"] == "Write the images of a distilled set for other programs."


def test_nothing_is_imported_for_the_command_but_its_module():
    assert imported(ROOT / "train" / "commands.py") <= sys.stdlib_module_names


def test_unknown_command_is_one_line(capsys):
    assert commands.main(["distil"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: gsdd: expected one of distill, evaluate, ") and err.count("\n") == 1
    assert err.endswith("; found 'distil'; did you mean distill?\n")


@pytest.mark.parametrize(
    ("called", "command", "name"),
    [
        ("/usr/bin/gsdd", evaluate, "gsdd evaluate"),
        ("/tree/train/evaluate.py", evaluate, "python -m train.evaluate"),
        ("/usr/bin/gsdd", replay, "gsdd replay"),
    ],
)
def test_help_names_the_command_as_it_was_called(called, command, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    assert ends(command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name} [-h]") and "--quiet" in shown


def test_config_is_found_by_its_name_unless_a_file_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = configs.load(ROOT / "configs" / "digits.yaml")
    assert configs.load("digits") == digits
    (tmp_path / "digits").mkdir()
    assert configs.load("digits") == digits
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text((ROOT / "configs" / "digits.yaml").read_text().replace("name: digits", "name: x"))
    assert configs.load("digits").name == "x"


@pytest.mark.parametrize(
    ("name", "near"),
    [("configs/digit.yaml", "digits, d3_digits"), ("cifar10_tm_ipc2", "cifar10_tm_ipc1, "), ("zzz", "digits$")],
)
def test_unknown_config_names_what_is_near(name, near):
    says = f"^{name}: no such file or directory, and no config of this name, such as .*{near}"
    with pytest.raises(FileNotFoundError, match=says):
        configs.load(name)
