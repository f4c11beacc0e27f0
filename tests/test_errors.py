import errno
import os
import warnings

import jax
import jax.numpy as jnp
import pytest

from gsdd_jax.data import DataNotice
from gsdd_jax.errors import InputError
from train.errors import UserError, exit_cleanly, explain

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def ends_with(capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught, exit_cleanly():
        raise error
    captured = capsys.readouterr()
    assert captured.out == ""
    return caught.value.code, captured.err


FULL = "disk full while writing runs/a: nothing saved so far is lost; free some space and run the same command again"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("ipc: too small"), "ipc: too small"),
        (UserError("first\n\n    second\r\nthird "), "first second third"),
        (UserError(), "UserError"),
        (InputError("codec.lr: too small"), "codec.lr: too small"),
        (ImportError("needs PyTorch: pip install gsdd_jax[torch]"), "needs PyTorch: pip install gsdd_jax[torch]"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "absent.yaml"),
            "absent.yaml: no such file or directory",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "runs"), "runs: is a directory"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "runs/a: permission denied"),
        (FileNotFoundError("no dataset at data/cifar10"), "no dataset at data/cifar10"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "runs/a"), FULL),
    ],
)
def test_error_of_a_user_is_one_line_on_stderr_and_exit_code_2(capsys, error, line):
    assert ends_with(capsys, error) == (2, f"error: {line}\n")


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


def test_a_platform_that_jax_cannot_start_is_named(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    status, text = ends_with(capsys, RuntimeError("Unable to initialize backend 'gppu': it is\nnot known"))
    assert status == 2 and text.count("\n") == 1 and "not known" in text
    assert text.startswith("error: JAX_PLATFORMS: found 'cuda', but JAX cannot start that here (")


def test_interrupt_is_one_line_and_exit_code_130(capsys):
    assert ends_with(capsys, KeyboardInterrupt()) == (130, "interrupted\n")


def test_input_error_raised_while_jax_traces_is_one_line(capsys):
    def render(x):
        raise InputError("size: found 0, allowed >= 1")

    with pytest.raises(SystemExit, match="2"), exit_cleanly():
        jax.jit(jax.grad(render))(1.0)
    assert capsys.readouterr().err == "error: size: found 0, allowed >= 1\n"
    assert issubclass(InputError, ValueError) and issubclass(InputError, TypeError)


def test_error_of_jax_itself_keeps_its_traceback():
    with pytest.raises(TypeError, match="shapes"), exit_cleanly():
        jax.jit(lambda x: jnp.ones(3) + jnp.ones(4) + x)(1.0)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("raise ValueError('of a library')", ValueError),
        ("(lambda: 0)(1)", TypeError),
        ("import no_such_module_here", ImportError),
        ("raise KeyError('defect')", KeyError),
        ("raise OSError('no message of the system')", OSError),
        ("assert False, 'defect'", AssertionError),
    ],
)
def test_defects_keep_their_traceback(capsys, source, kind):
    with pytest.raises(kind), exit_cleanly():
        exec(source)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "flag", "debug"), [("1", "", False), ("", "", True), ("", "--debug", False), ("0", "", False)]
)
def test_debug_keeps_the_traceback(monkeypatch, value, flag, debug):
    monkeypatch.setenv("GSDD_DEBUG", value)
    monkeypatch.setattr("sys.argv", ["distill", flag])
    with pytest.raises(SystemExit if value == "0" else UserError), exit_cleanly(debug=debug):
        raise UserError("visible")


def test_decorator_returns_the_value_and_handles_errors(capsys):
    @exit_cleanly()
    def halve(value):
        if value % 2:
            raise UserError(f"value: found {value}, allowed even numbers")
        return value // 2

    assert halve(4) == 2
    with pytest.raises(SystemExit, match="2"):
        halve(3)
    assert capsys.readouterr().err == "error: value: found 3, allowed even numbers\n"


def test_notices_of_data_are_one_line_and_no_error(capsys):
    with exit_cleanly():
        warnings.warn("passed over\n2 files", DataNotice, stacklevel=1)
    assert capsys.readouterr().err == "note: passed over 2 files\n"
    with pytest.raises(UserWarning, match="another"), exit_cleanly():
        warnings.warn("another", UserWarning, stacklevel=1)
