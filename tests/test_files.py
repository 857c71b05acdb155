"""Whole files and directories: replaced at once, and nothing left behind by a failure."""

import ctypes
import threading

import pytest

from hetegen_rec.files import link_or_copy, replace_directory, write_whole


def test_a_file_is_replaced_and_no_draft_stays(tmp_path):
    path = tmp_path / "values.json"
    write_whole(path, "old")
    write_whole(path, "new")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"values.json": "new"}


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = tmp_path / "values.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "not UTF-8: \ud800")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"values.json": "old"}


def test_a_directory_takes_the_place_of_the_earlier_one(tmp_path):
    source, target = tmp_path / "draft", tmp_path / "final"
    for directory, file in ((source, "new"), (target, "old"), (tmp_path / ".final.old", "older")):
        directory.mkdir()
        (directory / file).touch()
    replace_directory(source, target)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["final", "final/new"]


def test_a_reader_finds_a_directory_at_any_moment(tmp_path):
    source, target = tmp_path / "draft", tmp_path / "final"
    target.mkdir()
    source.mkdir()
    if not can_exchange(source, target):
        pytest.skip("this system or file system cannot exchange two names")
    absent, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            if not target.is_dir():
                absent.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(300):
        source.mkdir(exist_ok=True)
        replace_directory(source, target)
    done.set()
    reader.join()
    assert not absent


def can_exchange(one, other) -> bool:
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(-100, bytes(one), -100, bytes(other), 2) == 0


def test_where_names_cannot_be_exchanged_there_are_two_renames(tmp_path, monkeypatch):
    monkeypatch.setattr("hetegen_rec.files._exchange", lambda *_: False)
    test_a_directory_takes_the_place_of_the_earlier_one(tmp_path)


def test_a_link_is_the_file_and_not_a_link_to_it(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "name").symlink_to("file")
    link_or_copy(tmp_path / "name", tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place").samefile(tmp_path / "file")
    assert not (tmp_path / "new" / "place").is_symlink()
