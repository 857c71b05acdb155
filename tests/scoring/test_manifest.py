"""What is wrong with an artifact is told before anything of it is used."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest

from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.manifest import MANIFEST, describe_files, open_artifact
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.sealing import sealed, unsealed


def files_of(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def flip_a_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(bytes(content))


def rewrite(root: Path, **changes: object) -> None:
    """A manifest of someone who knows how to seal."""
    path = root / MANIFEST
    path.write_text(sealed({**unsealed(path.read_text()), **changes}))


def seal_again(root: Path, name: str) -> None:
    """After a file was changed, by someone who knows how to seal."""
    files = {**unsealed((root / MANIFEST).read_text())["files"]}
    files[name] = describe_files(root)[name].model_dump()
    rewrite(root, files=files)


def test_an_untouched_artifact_opens_and_lists_every_file(artifact):
    manifest = open_artifact(artifact).manifest
    assert sorted([MANIFEST, *manifest.files]) == files_of(artifact)
    assert manifest.backends["aten"].libraries["torch"].startswith("2.13")


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_flipped_bit_in_any_file_is_refused(own_artifact, place):
    for name in files_of(own_artifact):
        path = own_artifact / name
        before = path.read_bytes()
        flip_a_bit(path, place)
        with pytest.raises(ArtifactError, match="was changed"):
            Scorer.load(own_artifact)
        path.write_bytes(before)
    Scorer.load(own_artifact)


def test_a_file_that_was_cut_off_is_told_with_its_sizes(own_artifact):
    path = own_artifact / "tables" / "8_values.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"8_values\.npy has [\d,]+ of [\d,]+ bytes"):
        open_artifact(own_artifact, verify=False)


def test_an_absent_file_is_told(own_artifact):
    (own_artifact / "encoding" / "city.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"encoding/city\.parquet cannot be read"):
        open_artifact(own_artifact)


@pytest.mark.parametrize("version", [0, 2, 99, "1", None])
def test_another_format_version_is_refused_before_anything_else_is_read(own_artifact, version):
    rewrite(own_artifact, format_version=version, files="of the future")
    with pytest.raises(ArtifactError, match=f"artifact format {version}, but this version .* reads 1"):
        open_artifact(own_artifact)


@pytest.mark.parametrize("name", ["../outside.bin", "tables/../../outside.bin", "/etc/hostname"])
def test_a_path_that_climbs_out_is_refused(own_artifact, name):
    (own_artifact.parent / "outside.bin").write_bytes(b"x")
    files = unsealed((own_artifact / MANIFEST).read_text())["files"]
    rewrite(own_artifact, files={**files, name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ArtifactError, match="lies outside"):
        open_artifact(own_artifact)


def test_a_link_that_leads_out_is_refused(own_artifact):
    outside = own_artifact.parent / "outside.parquet"
    link = own_artifact / "encoding" / "city.parquet"
    link.rename(outside)
    link.symlink_to(outside)
    with pytest.raises(ArtifactError, match="lies outside"):
        open_artifact(own_artifact)


def test_a_file_that_is_used_must_be_listed(own_artifact):
    content = unsealed((own_artifact / MANIFEST).read_text())
    del content["files"]["network/aten.pt2"]
    rewrite(own_artifact, files=content["files"])
    with pytest.raises(ArtifactError, match=r"names 'network/aten\.pt2' but lists no such file"):
        open_artifact(own_artifact)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"format_version": 1})])
def test_what_is_no_manifest_is_refused(own_artifact, text):
    (own_artifact / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed"):
        open_artifact(own_artifact)


def test_unknown_keys_are_refused(own_artifact):
    rewrite(own_artifact, more="than is known")
    with pytest.raises(ArtifactError, match="is not one of format 1"):
        open_artifact(own_artifact)


def test_a_directory_without_manifest_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"no artifact: .* cannot be read"):
        open_artifact(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        "data/sample_inputs/other.pt",
        "data/weights/model.pt",  # of an older format: torch unpickles these two, whatever the rest says
        "data/constants/model.pt",
        "data/constants/custom_obj_0",
        "serialized_state_dict.pt",
    ],
)
def test_a_graph_that_brings_a_pickle_is_refused(own_artifact, record):
    name = "network/aten.pt2"
    with zipfile.ZipFile(own_artifact / name, "a") as archive:
        inputs = [one.filename for one in archive.infolist() if "sample_inputs" in one.filename]
        assert [archive.getinfo(one).file_size for one in inputs] == [0]
        archive.writestr(f"aten/{record}", pickle.dumps(print))
    seal_again(own_artifact, name)
    with pytest.raises(ArtifactError, match=rf"aten\.pt2 holds 'aten/{record}', which may be a pickle"):
        Scorer.load(own_artifact)


@pytest.mark.parametrize(
    "change",
    [{"use_pickle": True}, {"path_name": "opaque_obj_0"}, {"path_name": "custom_obj_0"}],
    ids=["pickled", "opaque", "custom"],
)
def test_a_tensor_that_is_read_as_a_pickle_is_refused(own_artifact, change):
    """Of constants that are no tensors torch goes by the name of the file, not by `use_pickle`."""
    name = "network/aten.pt2"
    with zipfile.ZipFile(own_artifact / name) as archive:
        records = {one: archive.read(one) for one in archive.namelist()}
    config = json.loads(records["aten/data/constants/model_constants_config.json"])
    next(iter(config["config"].values())).update(change)
    records["aten/data/constants/model_constants_config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(own_artifact / name, "w") as archive:
        for one, content in records.items():
            archive.writestr(one, content)
    seal_again(own_artifact, name)
    with pytest.raises(ArtifactError, match="may be a pickle"):
        Scorer.load(own_artifact)
