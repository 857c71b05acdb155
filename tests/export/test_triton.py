"""A model repository for Triton: its structure, and its model as Triton would call it."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from tiny_artifact import raw_rows, write_tiny_artifact

from hetegen_rec.export.triton import add_to_repository
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.manifest import MANIFEST, Artifact, open_artifact
from hetegen_rec.scoring.scorer import Scorer

MESSAGES = {
    "ModelConfig": {
        "name": "string",
        "backend": "string",
        "max_batch_size": "int32",
        "input": "ModelInput*",
        "output": "ModelOutput*",
        "dynamic_batching": "ModelDynamicBatching",
        "instance_group": "ModelInstanceGroup*",
    },
    "ModelInput": {"name": "string", "data_type": "DataType", "dims": "int64*"},
    "ModelOutput": {"name": "string", "data_type": "DataType", "dims": "int64*"},
    "ModelDynamicBatching": {"preferred_batch_size": "int32*", "max_queue_delay_microseconds": "uint64"},
    "ModelInstanceGroup": {"count": "int32", "kind": "Kind"},
}
"""What we use of Triton's model_config.proto; `*` for repeated fields."""
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_INT64", "TYPE_FP32", "TYPE_STRING"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}


def model_config(text: str) -> Any:
    """A config.pbtxt, parsed as Triton does."""
    file = FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (key, kind) in enumerate(fields.items(), start=1):
            added = message.field.add(name=key, number=number)
            repeated = kind.endswith("*")
            added.label = getattr(FieldDescriptorProto, "LABEL_REPEATED" if repeated else "LABEL_OPTIONAL")
            scalar = getattr(FieldDescriptorProto, f"TYPE_{kind.rstrip('*').upper()}", None)
            if scalar is not None:
                added.type = scalar
            else:
                added.type_name = f".inference.{kind.rstrip('*')}"
    pool = DescriptorPool()
    pool.Add(file)
    kind = GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, kind())


@dataclass
class Tensor:
    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: Exception | None = None


def get_input_tensor_by_name(request: dict[str, Tensor], name: str) -> Tensor:
    return request[name]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    root = tmp_path_factory.mktemp("triton") / "artifact"
    write_tiny_artifact(root)
    return open_artifact(root)


@pytest.fixture(scope="module")
def version(artifact, tmp_path_factory) -> Path:
    return add_to_repository(tmp_path_factory.mktemp("repository") / "models", artifact)


@pytest.fixture
def model(version) -> Iterator[Any]:
    """The model of a version, started in a stand-in for Triton."""
    utils = ModuleType("triton_python_backend_utils")
    vars(utils).update(
        Tensor=Tensor,
        InferenceResponse=InferenceResponse,
        TritonError=Exception,
        get_input_tensor_by_name=get_input_tensor_by_name,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", utils)
        spec = importlib.util.spec_from_file_location("model", version / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = module.TritonPythonModel()
        made.initialize({"model_repository": str(version.parent), "model_version": version.name})
        yield made


def request(*rows: Any) -> dict[str, Tensor]:
    """A request as Triton hands it over: bytes, [N, 1]."""
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return {"ROW": Tensor("ROW", np.array(texts, dtype=object).reshape(-1, 1))}


def test_the_configuration_is_one_of_triton(version):
    config = model_config((version.parent / "config.pbtxt").read_text())
    assert config.backend == "python"
    assert config.max_batch_size == 4096
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [("ROW", 3, [1])]
    assert [(one.name, one.data_type, list(one.dims)) for one in config.output] == [("PROBABILITY", 2, [1])]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, 2)]


def test_a_version_holds_the_model_and_the_whole_artifact(version, artifact):
    assert (version.parent.name, version.name) == ("tiny", "1")
    assert open_artifact(version / "artifact").manifest == artifact.manifest
    assert sorted(path.name for path in version.iterdir()) == ["artifact", "model.py"]
    assert sorted(path.name for path in version.parent.iterdir()) == ["1", "config.pbtxt"]


def test_a_further_artifact_becomes_the_next_version_and_a_tuned_configuration_stays(artifact, tmp_path):
    first = add_to_repository(tmp_path, artifact)
    (first.parent / "config.pbtxt").write_text("max_batch_size: 8")
    first.rename(first.with_name("9"))
    assert add_to_repository(tmp_path, artifact) == first.with_name("10")
    assert (first.parent / "config.pbtxt").read_text() == "max_batch_size: 8"


@pytest.mark.parametrize(
    ("name", "model"), [("../odd name", "__odd_name"), ("..", "_"), ("a.b-c_1", "a.b-c_1")]
)
def test_the_name_of_a_run_cannot_lead_out_of_the_repository(name, model, artifact, tmp_path):
    manifest = artifact.manifest.model_copy(update={"name": name})
    version = add_to_repository(tmp_path / "models", Artifact(artifact.root, manifest))
    assert version == tmp_path / "models" / model / "1"


def test_an_artifact_that_cannot_be_copied_leaves_no_version(artifact, tmp_path):
    absent = Artifact(tmp_path / "absent", artifact.manifest)
    with pytest.raises(FileNotFoundError):
        add_to_repository(tmp_path / "models", absent)
    assert [path.name for path in (tmp_path / "models" / "tiny").iterdir()] == ["config.pbtxt"]


def test_each_request_gets_the_scores_of_its_rows(model, artifact):
    rows = raw_rows(12)
    responses = model.execute([request(*rows[:5]), request(rows[5]), request(*rows[6:])])
    outputs = [response.output_tensors[0] for response in responses]
    assert [(output.name, output.values.shape) for output in outputs] == [
        ("PROBABILITY", (5, 1)),
        ("PROBABILITY", (1, 1)),
        ("PROBABILITY", (6, 1)),
    ]
    found = np.concatenate([output.values for output in outputs])[:, 0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, Scorer.load(artifact.root).score(rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [b"{", b"\xff", b"[1]", b'{"user_id": "a name"}', b"[" * 100_000])
def test_a_wrong_row_fails_its_request_only(wrong, model, artifact):
    (good,) = raw_rows(1)
    responses = model.execute([request(good, wrong), request(good)])
    assert isinstance(responses[0].error, Exception)
    assert str(responses[0].error)
    assert responses[1].error is None
    expected = Scorer.load(artifact.root).score([good])
    np.testing.assert_allclose(responses[1].output_tensors[0].values[:, 0], expected, atol=1e-6, rtol=0)
    assert model.execute([request(wrong)])[0].error is not None


def test_a_changed_artifact_is_not_served(artifact, tmp_path, model):
    version = add_to_repository(tmp_path, artifact)
    (version / "artifact" / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match="was changed"):
        model.initialize({"model_repository": str(version.parent), "model_version": version.name})


def test_an_export_fills_a_repository(rich_run, tmp_path, capsys):
    where = ["--output", str(tmp_path / "artifact"), "--triton", str(tmp_path / "models")]
    assert rich_run.hetegen("export", "export.parity_rows=50", *where) == 0
    version = tmp_path / "models" / "tiny" / "1"
    assert open_artifact(version / "artifact").manifest == open_artifact(tmp_path / "artifact").manifest
    assert "triton: " in capsys.readouterr().out
