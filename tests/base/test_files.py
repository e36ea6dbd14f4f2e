"""Files on Windows and on a Mac, as far as they can be pretended: what is held open, what reaches the disk."""

import os
import sys
import time

import pytest

from nanogpt.base import console, files


@pytest.fixture
def held_open(monkeypatch):
    """Windows refuses so many replacements, because another program has the file open."""

    def refuse(times, number=32):
        replaced, left = os.replace, iter(range(times))

        def attempt(source, target):
            if next(left, None) is not None:
                error = PermissionError(13, "the process cannot access the file")
                if number:
                    error.winerror = number
                raise error
            replaced(source, target)

        monkeypatch.setattr(os, "replace", attempt)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    return refuse


@pytest.mark.parametrize("number", files.HELD_OPEN)
def test_a_file_that_a_scanner_has_open_for_a_moment_is_replaced_all_the_same(tmp_path, held_open, number):
    file = tmp_path / "latest"
    files.write_text(file, "old")
    held_open(len(files.PAUSES_S), number)
    files.write_text(file, "new")
    with files.folder_aside(tmp_path / "made") as aside:
        (aside / "a").write_text("a", encoding="utf-8")
    assert file.read_text(encoding="utf-8") == "new" and sorted(os.listdir(tmp_path)) == ["latest", "made"]


@pytest.mark.parametrize(("times", "number"), [(99, 32), (1, None)])
def test_a_file_that_stays_held_or_must_not_be_written_keeps_its_content(tmp_path, held_open, times, number):
    file = tmp_path / "latest"
    files.write_text(file, "old")
    held_open(times, number)
    with pytest.raises(PermissionError):
        files.write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["latest"]


def test_what_a_file_manager_leaves_is_nobodys_content(tmp_path):
    for name in (*files.LITTER, "._a"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "inside").mkdir()
    with pytest.raises(OSError):
        files.remove_empty(tmp_path)
    assert len(os.listdir(tmp_path)) == 5
    (tmp_path / "inside").rmdir()
    files.remove_empty(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize("known", [True, False])
def test_a_mac_flushes_the_disks_own_cache_where_the_file_system_can(tmp_path, monkeypatch, known):
    fcntl, told = pytest.importorskip("fcntl"), []

    def command(descriptor, number):
        told.append(number)
        if not known:
            raise OSError(25, "inappropriate ioctl")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", command)
    monkeypatch.setattr(os, "fsync", lambda descriptor: told.append("fsync"))
    (tmp_path / "a").write_text("a", encoding="utf-8")
    files.sync(tmp_path / "a")
    assert told == ([51] if known else [51, "fsync"])


def test_a_closed_window_stops_and_waits_for_the_end(monkeypatch):
    import ctypes
    from types import SimpleNamespace

    told, registered = [], []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WINFUNCTYPE", lambda *types: lambda function: function, raising=False)
    kernel = SimpleNamespace(SetConsoleCtrlHandler=lambda handler, add: registered.append((handler, add)))
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(console, "sleep", lambda seconds: told.append("waits"))
    console.when_window_closes(lambda: told.append("stops"))
    ((handler, add),) = registered
    # Ctrl-C 与 Ctrl-Break 由 Python 自己接
    assert add and not handler(0) and not handler(1) and told == []
    assert handler(2) and told == ["stops", "waits"] and handler in console._handlers


def test_a_folder_that_was_moved_away_for_a_new_one_comes_back_if_that_never_came(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/old").write_text("", encoding="utf-8")
    renamed = files.replace

    def killed(source, target):
        if target == tmp_path / "kept":
            raise KeyboardInterrupt
        renamed(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files, "replace", killed)
        with files.folder_aside(tmp_path / "kept"):
            pass
    assert not (tmp_path / "kept").exists()
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept/old").is_file()
