import errno
import os
import subprocess
import sys
import warnings
from importlib.machinery import ModuleSpec

import jax
import jax.numpy as jnp
import pytest

from gsdd_jax.data import DataNotice
from train.errors import UserError, exit_cleanly, explain

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_in_module(source: str, module: str) -> None:
    """Runs `source` as if it stood in `module`; the origin of an error decides how a command ends."""
    exec(compile(source, f"{module}.py", "exec"), {"__name__": module})


def ends_with(capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught, exit_cleanly(debug=False):
        raise error
    captured = capsys.readouterr()
    assert captured.out == ""
    return caught.value.code, captured.err


def test_user_error_is_one_line_on_stderr_and_exit_code_2(capsys):
    assert ends_with(capsys, UserError("ipc: too small")) == (2, "error: ipc: too small\n")


def test_message_of_several_lines_is_folded_into_one(capsys):
    assert ends_with(capsys, UserError("first\n\n    second\r\nthird ")) == (2, "error: first second third\n")


def test_empty_message_names_the_exception_class(capsys):
    assert ends_with(capsys, UserError()) == (2, "error: UserError\n")


def test_missing_file_names_the_path(capsys, tmp_path):
    path = tmp_path / "absent.yaml"
    with pytest.raises(SystemExit, match="2"), exit_cleanly(debug=False):
        path.read_text()
    assert capsys.readouterr().err == f"error: {path}: no such file or directory\n"


def test_directory_in_place_of_a_file_names_the_path(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"), exit_cleanly(debug=False):
        tmp_path.read_text()
    assert capsys.readouterr().err == f"error: {tmp_path}: is a directory\n"


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError])
def test_path_error_with_a_message_of_its_own_keeps_it(capsys, kind):
    assert ends_with(capsys, kind("no dataset at data/cifar10")) == (2, "error: no dataset at data/cifar10\n")


def test_permission_error_names_the_path(capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "runs/a")
    assert ends_with(capsys, error) == (2, "error: runs/a: permission denied\n")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_path_and_the_remedy(capsys, code):
    status, text = ends_with(capsys, OSError(code, os.strerror(code), "runs/a/metrics.jsonl"))
    assert status == 2
    assert text == (
        "error: disk full while writing runs/a/metrics.jsonl: nothing saved so far is lost; "
        "free some space and run the same command again\n"
    )


def test_full_disk_is_recognized_by_its_text_whatever_the_class(capsys):
    status, text = ends_with(capsys, RuntimeError("RESOURCE_EXHAUSTED: runs/a/1: No space left on device"))
    assert status == 2
    assert text.startswith("error: disk full: ") and "runs/a/1" in text and text.count("\n") == 1


def test_full_disk_is_found_behind_the_error_that_reports_it():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "runs/a/ckpt")
        except OSError as full:
            raise RuntimeError("checkpoint failed") from full
    except RuntimeError as error:
        assert "disk full while writing runs/a/ckpt" in explain(error)


class Broken:
    """JAX whose plugin for CUDA has no libraries."""

    @staticmethod
    def devices():
        raise AssertionError


@pytest.mark.parametrize(
    ("error", "found"),
    [(RuntimeError("Unable to initialize backend 'gppu': it is\nnot known"), "not known"), (AssertionError(), "Asser")],
)
def test_a_platform_that_jax_cannot_start_is_named(capsys, monkeypatch, error, found):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setitem(sys.modules, "jax", Broken)
    status, text = ends_with(capsys, error)
    assert status == 2 and text.count("\n") == 1
    assert text.startswith("error: JAX_PLATFORMS: found 'cuda', but JAX cannot start that here (") and found in text


def test_interrupt_is_one_line_and_exit_code_130(capsys):
    assert ends_with(capsys, KeyboardInterrupt()) == (130, "interrupted\n")


@pytest.mark.parametrize("module", ["gsdd_jax.augment", "kernels.splat", "train.distill", "gsdd_jax"])
@pytest.mark.parametrize("kind", ["ValueError", "TypeError", "OSError", "ImportError"])
def test_validation_error_raised_by_the_project_is_one_line(capsys, module, kind):
    with pytest.raises(SystemExit, match="2"), exit_cleanly(debug=False):
        run_in_module(f"def check():\n    raise {kind}('size: found 0, allowed >= 1')\ncheck()", module)
    assert capsys.readouterr().err == "error: size: found 0, allowed >= 1\n"


def test_module_run_as_a_command_counts_as_part_of_the_project(capsys):
    code = compile("raise ValueError('out: bad')", "distill.py", "exec")
    module = {"__name__": "__main__", "__spec__": ModuleSpec("train.distill", None)}
    with pytest.raises(SystemExit, match="2"), exit_cleanly(debug=False):
        exec(code, module)
    assert capsys.readouterr().err == "error: out: bad\n"


def test_validation_error_raised_while_jax_traces_is_one_line(capsys):
    module = {"__name__": "gsdd_jax.render"}
    exec("def render(x):\n    raise ValueError('size: found 0, allowed >= 1')", module)
    with pytest.raises(SystemExit, match="2"), exit_cleanly(debug=False):
        jax.jit(jax.grad(module["render"]))(1.0)
    assert capsys.readouterr().err == "error: size: found 0, allowed >= 1\n"


def test_error_of_jax_itself_keeps_its_traceback():
    module = {"__name__": "gsdd_jax.render", "jnp": jnp}
    exec("def render(x):\n    return jnp.ones(3) + jnp.ones(4) + x", module)
    with pytest.raises(TypeError, match="shapes"), exit_cleanly(debug=False):
        jax.jit(module["render"])(1.0)


def test_validation_error_raised_from_another_error_is_one_line(capsys):
    source = "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('kind: unknown') from error"
    with pytest.raises(SystemExit, match="2"), exit_cleanly(debug=False):
        run_in_module(source, "gsdd_jax.codecs")
    assert capsys.readouterr().err == "error: kind: unknown\n"


@pytest.mark.parametrize(
    ("source", "module", "kind"),
    [
        ("raise ValueError('inside a library')", "numpy.linalg", ValueError),
        ("raise ValueError('a namesake')", "gsdd_jax_plugin", ValueError),
        ("int('many')", "gsdd_jax.augment", ValueError),
        ("a, b = (1,)", "gsdd_jax.augment", ValueError),
        ("(lambda: 0)(1)", "train.distill", TypeError),
        ("1 + 'a'", "train.distill", TypeError),
        ("import no_such_module_here", "train.distill", ImportError),
        ("raise RuntimeError('defect')", "train.distill", RuntimeError),
        ("raise KeyError('defect')", "gsdd_jax.augment", KeyError),
        ("assert False, 'defect'", "gsdd_jax.augment", AssertionError),
    ],
)
def test_defects_keep_their_traceback(capsys, source, module, kind):
    with pytest.raises(kind), exit_cleanly(debug=False):
        run_in_module(source, module)
    assert capsys.readouterr().err == ""


def test_debug_keeps_the_traceback():
    with pytest.raises(UserError, match="visible"), exit_cleanly(debug=True):
        raise UserError("visible")


@pytest.mark.parametrize("value", ["1", "yes"])
def test_debug_is_read_from_the_environment(monkeypatch, value):
    monkeypatch.setenv("GSDD_DEBUG", value)
    with pytest.raises(UserError, match="visible"), exit_cleanly():
        raise UserError("visible")


def test_debug_is_read_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill", "--debug"])
    with pytest.raises(UserError, match="visible"), exit_cleanly():
        raise UserError("visible")


@pytest.mark.parametrize("value", ["", "0"])
def test_debug_switched_off_in_the_environment_is_off(monkeypatch, capsys, value):
    monkeypatch.setenv("GSDD_DEBUG", value)
    monkeypatch.setattr(sys, "argv", ["distill"])
    with pytest.raises(SystemExit, match="2"), exit_cleanly():
        raise UserError("hidden")
    assert capsys.readouterr().err == "error: hidden\n"


def test_decorator_returns_the_value_and_handles_errors(capsys):
    @exit_cleanly(debug=False)
    def halve(value):
        if value % 2:
            raise UserError(f"value: found {value}, allowed even numbers")
        return value // 2

    assert halve(4) == 2
    with pytest.raises(SystemExit, match="2"):
        halve(3)
    assert capsys.readouterr().err == "error: value: found 3, allowed even numbers\n"


def test_exit_inside_passes_through_unchanged():
    with pytest.raises(SystemExit, match="^7$"), exit_cleanly(debug=False):
        raise SystemExit(7)


def test_process_prints_no_traceback_and_exits_with_2():
    source = "from train.errors import UserError, exit_cleanly\nwith exit_cleanly():\n    raise UserError('ipc: bad')"
    environment = {key: value for key, value in os.environ.items() if key != "GSDD_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: ipc: bad\n")


def test_notices_of_data_are_one_line_and_no_error(capsys):
    with exit_cleanly(debug=False):
        warnings.warn("passed over\n2 files", DataNotice, stacklevel=1)
    assert capsys.readouterr().err == "note: passed over 2 files\n"
    with pytest.raises(UserWarning, match="another"), exit_cleanly(debug=False):
        warnings.warn("another", UserWarning, stacklevel=1)
