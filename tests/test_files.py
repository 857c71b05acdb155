"""Whole files and directories: replaced at once, and nothing left behind by a failure."""

import pytest

from hetegen_rec.files import replace_directory, write_whole


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
