"""Places of checkpoints, their checksums, and the seal of a description."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.sealing import sealed, unsealed
from hetegen_rec.training.checkpoint_store import Store, damaged_files


@pytest.fixture(params=["path", "file URL", "memory URL"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param != "memory URL":
        yield f"{tmp_path}/run" if request.param == "path" else f"file://{tmp_path}/run"
        return
    location = f"memory://{uuid4()}"
    yield location
    if MemoryFileSystem().exists(location):
        MemoryFileSystem().rm(location, recursive=True)


def test_a_place_that_is_not_there_is_empty(location):
    store = Store(location)
    assert store.directories() == []
    assert not store.exists("step-1")
    store.remove_file("step-1/metadata.json")
    store.remove_directory("step-1")
    with pytest.raises(FileNotFoundError):
        store.read_text("step-1/metadata.json")
    with pytest.raises(FileNotFoundError):
        store.size("step-1/metadata.json")


@pytest.mark.parametrize(
    ("url", "message"),
    [("nowhere://bucket/run", "Protocol not known: nowhere"), ("abfs://bucket/run", "[Ii]nstall adlfs")],
)
def test_a_url_that_cannot_be_opened_here_is_an_error_in_words(url, message):
    with pytest.raises(ConfigError, match=f"^{url}: .*{message}.*; name a path, or a URL"):
        Store(url)


def test_what_is_written_is_found_until_it_is_removed(location):
    store = Store(f"{location}/")
    assert store.location == location
    for name in ("step-1", "step-2"):
        store.make(name)
        store.write_text(f"{name}/metadata.json", "old")
        store.write_text(f"{name}/metadata.json", "größer")
    store.write_text("notes.txt", "no directory")
    assert sorted(store.directories()) == ["step-1", "step-2"]
    assert store.read_text("step-1/metadata.json") == "größer"
    assert store.size("step-1/metadata.json") == 8
    assert store.sha256("step-1/metadata.json") == hashlib.sha256("größer".encode()).hexdigest()
    store.remove_file("step-1/metadata.json")
    assert not store.exists("step-1/metadata.json")
    store.remove_directory("step-2")
    assert "step-2" not in store.directories()
    assert not store.exists("step-2/metadata.json")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_are_digested_as_they_are_written(location):
    store, state = Store(location), {"weights": torch.arange(1000.0), "step": 7}
    writer = store.writer("step-1")
    dcp.save(state, storage_writer=writer, no_dist=True)
    assert sorted(writer.files) == [".metadata", "__0_0.distcp"]
    for name, about in writer.files.items():
        assert about["bytes"] == store.size(f"step-1/{name}")
        assert about["sha256"] == store.sha256(f"step-1/{name}")
    found = {"weights": torch.zeros(1000), "step": 0}
    dcp.load(found, storage_reader=Store(store.path("step-1")).reader(), no_dist=True)
    assert found["weights"].equal(state["weights"])
    assert found["step"] == 7


def test_damaged_files_are_told_one_by_one(location):
    store, content = Store(location), b"shard"
    store.make(".")
    expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name, text in {"good": "shard", "cut off": "shar", "changed": "shard".upper()}.items():
        store.write_text(name, text)
    files = dict.fromkeys(("good", "cut off", "changed", "missing"), expected)
    cut_off, changed, missing = damaged_files(store, files)
    assert cut_off == "cut off has 4 of 5 bytes"
    assert changed == "changed was changed: its checksum does not fit"
    assert missing.startswith("missing cannot be read: ")


CONTENT = {"format": 2, "files": {"b": {"bytes": 1}, "a": {}}, "metadata": {"state": {"best_auc": 0.1 + 0.2}}}


def test_a_seal_holds_what_was_sealed():
    assert unsealed(sealed(CONTENT)) == CONTENT
    assert unsealed(json.dumps(json.loads(sealed(CONTENT)))) == CONTENT  # however it is indented


@pytest.mark.parametrize(
    "text",
    [
        sealed(CONTENT)[:-1],
        sealed(CONTENT).replace('"format": 2', '"format": 3'),
        sealed(CONTENT).replace("0.30000000000000004", "0.3"),
        json.dumps(CONTENT),
        "",
        "[]",
        "null",
    ],
    ids=["cut off", "a digit changed", "rounded", "no seal", "empty", "a list", "null"],
)
def test_a_broken_seal_is_an_error(text):
    with pytest.raises(ValueError, match=r"checksum|Expecting|delimiter"):
        unsealed(text)
