"""Files and folders that are written whole or not at all."""

import errno
import os

import pytest

from gsdd_jax import files


def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failed_write_keeps_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = files.write_bytes(tmp_path / "result.json", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_bytes(path, b"x" * 100)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_failed_folder_leaves_nothing(tmp_path, monkeypatch):
    def fill(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as caught:
        patch.setattr(os, "fsync", full)
        files.write_folder(tmp_path / "out", fill)
    assert caught.value.filename.endswith("inner/a") or caught.value.filename.endswith(".tmp")
    with pytest.raises(KeyError):
        files.write_folder(tmp_path / "out", lambda _: {}["absent"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    files.write_folder(".", fill)
    assert (tmp_path / "out" / "inner" / "a").read_text() == "a"
    with pytest.raises(OSError, match="out"):
        files.write_folder(tmp_path / "out", fill)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_file_and_then_its_folder_are_flushed_and_a_folder_that_cannot_be_is_left(tmp_path, monkeypatch):
    flushed, real = [], os.fsync

    def fsync(descriptor):
        flushed.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        if flushed[-1] == "folder":
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if os.path.isdir("/proc/self/fd"):
        files.write_bytes(tmp_path / "a", b"a")
        files.write_folder(tmp_path / "b", lambda folder: (folder / "c").write_text("c"))
        assert flushed == ["file", "folder", "file", "folder", "folder"]

    def denied(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    # As Windows does.
    monkeypatch.setattr(files.os, "open", denied)
    files.sync_folder(tmp_path)


def test_missing_parent_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent/x.json"):
        files.write_bytes(tmp_path / "absent" / "x.json", b"")


def test_written_files_have_ordinary_permissions(tmp_path):
    previous = os.umask(0o022)
    try:
        path = files.write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o644
