"""Deltas: what changed of an artifact, and the same artifact as a whole export once it is applied."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_artifact import raw_rows, write_tiny_artifact
from tiny_run import files_below, tiny_config

from hetegen_rec import cli, jobs, scoring_cli
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.export.delta import write_delta
from hetegen_rec.jobs import Job
from hetegen_rec.scoring.delta import DELTA, apply_delta, open_delta
from hetegen_rec.scoring.manifest import (
    MANIFEST,
    Artifact,
    Manifest,
    describe_files,
    open_artifact,
    write_manifest,
)
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.sealing import sealed, sha256_of, unsealed

CHANGED_IDS = (0, 7, 31)
TABLE = "user_id"


def change_rows(artifact: Artifact) -> None:
    """Changes the sign of a few users' vectors."""
    (group,) = (group for group in artifact.manifest.tables if TABLE in group.first_rows)
    array = np.load(artifact.path(group.files["values"]), mmap_mode="r+")
    array[[group.first_rows[TABLE] + number for number in CHANGED_IDS]] *= -1
    array.flush()
    manifest = artifact.manifest.model_copy(update={"step": 2, "files": describe_files(artifact.root)})
    write_manifest(artifact.root, manifest)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `base`, `next` that differs in few rows, and `delta` from one to the other."""
    directory = tmp_path_factory.mktemp("deltas")
    write_tiny_artifact(directory / "base", precision="int8")
    shutil.copytree(directory / "base", directory / "next")
    change_rows(open_artifact(directory / "next"))
    write_delta(open_artifact(directory / "base"), open_artifact(directory / "next"), directory / "delta")
    return directory


@pytest.fixture
def mine(artifacts: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(artifacts, tmp_path / "mine"))


def test_a_delta_holds_the_changed_rows_and_nothing_else(artifacts: Path) -> None:
    delta = open_delta(artifacts / "delta")
    assert {table: count for table, count in delta.changed_rows.items() if count} == {TABLE: len(CHANGED_IDS)}
    assert sorted(delta.files) == ["tables/8_rows.npy", "tables/8_scale.npy", "tables/8_values.npy"]
    assert np.load(artifacts / "delta" / "tables/8_values.npy").shape == (len(CHANGED_IDS), 8)


def test_applied_it_is_the_next_artifact_byte_for_byte(artifacts: Path, tmp_path: Path) -> None:
    before = files_below(artifacts / "base")
    apply_delta(artifacts / "base", artifacts / "delta", tmp_path / "made")
    assert files_below(tmp_path / "made") == files_below(artifacts / "next")
    assert files_below(artifacts / "base") == before
    network = "network/aten.pt2"
    assert (tmp_path / "made" / network).samefile(artifacts / "base" / network)  # no copy of what is the same


def test_it_takes_the_place_of_an_artifact_that_is_in_use(mine: Path) -> None:
    rows = raw_rows(100)
    server = Scorer.load(mine / "base")
    old = server.score(rows)
    apply_delta(mine / "base", mine / "delta")
    new = Scorer.load(mine / "base").score(rows)
    np.testing.assert_array_equal(server.score(rows), old)
    np.testing.assert_array_equal(new, Scorer.load(mine / "next").score(rows))
    assert (old != new).any()
    assert {path.name for path in mine.iterdir()} == {"base", "next", "delta", ".base.lock", ".delta.lock"}


def test_behind_a_link_it_replaces_what_the_link_names(mine: Path) -> None:
    (mine / "current").symlink_to("base")
    apply_delta(mine / "current", mine / "delta")
    assert (mine / "current").is_symlink()
    assert files_below(mine / "base") == files_below(mine / "next")


def test_without_hard_links_files_are_copied(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    apply_delta(mine / "base", mine / "delta")
    assert files_below(mine / "base") == files_below(mine / "next")


def test_of_equal_artifacts_nothing_is_written_but_the_manifest(artifacts: Path, tmp_path: Path) -> None:
    base = open_artifact(artifacts / "base")
    delta = write_delta(base, base, tmp_path / "delta")
    assert (delta.files, set(delta.changed_rows.values())) == ({}, {0})
    apply_delta(artifacts / "base", tmp_path / "delta", tmp_path / "made")
    assert files_below(tmp_path / "made") == files_below(artifacts / "base")


def test_what_cannot_be_compared_row_by_row_is_written_whole(artifacts: Path, tmp_path: Path) -> None:
    new = write_tiny_artifact(tmp_path / "fp16", precision="fp16", seed=3)
    delta = write_delta(
        open_artifact(artifacts / "base"), open_artifact(tmp_path / "fp16"), tmp_path / "delta"
    )
    assert delta.patched == {}
    assert delta.changed_rows == {name: entry.num_ids for name, entry in new.vocabularies.items()}
    apply_delta(artifacts / "base", tmp_path / "delta", tmp_path / "made")
    assert files_below(tmp_path / "made") == files_below(tmp_path / "fp16")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(directory: Path, change: Callable[[dict], object]) -> None:
    """Changes delta.json and seals it again, as a tool might that knows the format."""
    content = unsealed((directory / DELTA).read_text())
    change(content)
    (directory / DELTA).write_text(sealed(content))


def other_base(mine: Path) -> None:
    change_rows(open_artifact(mine / "base"))


def climb(content: dict) -> None:
    content["manifest"]["files"]["../outside"] = {"bytes": 1, "sha256": "0"}
    content["files"]["../outside"] = {"bytes": 1, "sha256": "0"}


def number_rows_that_are_not_there(mine: Path) -> None:
    name = "tables/8_rows.npy"
    numbers = np.load(mine / "delta" / name)
    numbers[-1] = np.iinfo(numbers.dtype).max
    np.save(mine / "delta" / name, numbers)
    digest = sha256_of(mine / "delta" / name)
    rewrite(mine / "delta", lambda content: content["files"][name].update(sha256=digest))


WRONG = {
    "rows that are not there": (number_rows_that_are_not_there, "does not fit the base"),
    "another base": (other_base, "made from another artifact"),
    "changed rows": (lambda mine: flip(mine / "delta/tables/8_values.npy"), "its checksum does not fit"),
    "a changed delta.json": (lambda mine: flip(mine / "delta" / DELTA), "was changed"),
    "a missing file": (lambda mine: (mine / "delta/tables/8_rows.npy").unlink(), "cannot be read"),
    "no delta": (lambda mine: (mine / "delta" / DELTA).unlink(), "no delta"),
    "a delta of a future version": (
        lambda mine: rewrite(mine / "delta", lambda content: content.update(delta_version=2)),
        "delta format 2",
    ),
    "an artifact of a future version": (
        lambda mine: rewrite(mine / "delta", lambda content: content["manifest"].update(format_version=99)),
        "artifact format 99",
    ),
    "a name that climbs out": (lambda mine: rewrite(mine / "delta", climb), "lies outside"),
    "a file that neither has": (
        lambda mine: rewrite(mine / "delta", lambda content: content.update(patched={}, files={})),
        "lacks tables/8_values.npy",
    ),
    "a changed file of the base": (
        lambda mine: flip(mine / "base/network/aten.pt2"),
        "checksum does not fit",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_and_leaves_the_base_as_it_was(mine: Path, capsys, case: str) -> None:
    damage, message = WRONG[case]
    damage(mine)
    before = files_below(mine / "base")
    assert scoring_cli.main(["apply-delta", str(mine / "base"), str(mine / "delta")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert files_below(mine / "base") == before
    assert not list(mine.glob(".*.partial"))


@pytest.fixture(scope="module")
def periods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of two models of a sequence, `older` and `newer`, and `delta` between them."""
    directory = tmp_path_factory.mktemp("periods")
    config = tiny_config(
        directory,
        "data.source.rows=1500",
        "incremental.ways=[finetune]",
        "incremental.periods=3",
        "incremental.first_periods=1",
        "stages.scratch.epochs=1",
        "train.max_steps=1",
        "train.batch_size=40",
        "export.tables=fp16",
    )
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        jobs.incremental(Job(config, runtime))
    models = directory / "run" / "incremental"
    older = models / "first" / "scratch" / "config.yaml"
    (newer,) = models.glob("finetune/period-*/scratch/config.yaml")
    for name, config_file, options in (
        ("older", older, ()),
        ("newer", newer, ()),
        ("delta", newer, ("--delta-from", str(directory / "older"))),
    ):
        arguments = ["export", "--config", str(config_file), "--output", str(directory / name), *options]
        assert cli.main(arguments) == 0
    return directory


def test_a_model_that_trained_on_is_a_delta_of_the_one_before(periods: Path) -> None:
    older, newer = (open_artifact(periods / name).manifest for name in ("older", "newer"))
    grown = {
        table: (older.vocabularies[table].num_ids, entry.num_ids)
        for table, entry in newer.vocabularies.items()
        if entry.num_ids > older.vocabularies[table].num_ids
    }
    moved = [
        table
        for before, after in zip(older.tables, newer.tables, strict=True)
        for table, start in after.first_rows.items()
        if start != before.first_rows[table]
    ]
    delta = open_delta(periods / "delta")
    assert grown
    assert moved
    for table, (before, after) in grown.items():
        assert after - before <= delta.changed_rows[table] < after
    assert delta.patched
    assert {path.name for path in periods.glob(".delta.*")} == {".delta.lock"}


def test_applied_it_is_a_whole_export_of_the_newer_model(periods: Path, tmp_path: Path) -> None:
    apply_delta(periods / "older", periods / "delta", tmp_path / "made")
    made, whole = files_below(tmp_path / "made"), files_below(periods / "newer")
    del made[MANIFEST], whole[MANIFEST]
    assert made == whole
    assert unnamed_time(tmp_path / "made") == unnamed_time(periods / "newer")


def unnamed_time(artifact: Path) -> Manifest:
    return open_artifact(artifact).manifest.model_copy(update={"created": ""})
