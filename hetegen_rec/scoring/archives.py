"""Archives of torch.export, looked at before torch reads them: none of ours holds a pickle."""

import json
import re
import zipfile
from pathlib import Path

from hetegen_rec.scoring.errors import ArtifactError

_RECORD = re.compile(
    r"models/\w+\.json"
    r"|data/(weights|constants)/((weight|tensor)_\d+|\w+_config\.json)"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+"
)
"""What an archive of tensors and a graph consists of, below its root. Of other records, older formats among
them, torch unpickles some, or hands them to libraries."""
_EXAMPLES = "data/sample_inputs/"
"""Of inputs, pickled; `torch.export.save` leaves an empty file."""
_PAYLOADS = "_config.json"
_TENSOR = re.compile(r"(weight|tensor)_\d+")


def refuse_pickles(path: Path) -> None:
    """Refuses an archive of which torch would load a part by pickle, and so run whatever it says.

    Raises:
        ArtifactError: it has another record than a graph and plain tensors need, or is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                _, _, record = entry.filename.partition("/")
                if not _RECORD.fullmatch(record) and (entry.file_size or not record.startswith(_EXAMPLES)):
                    raise _refusal(path, entry.filename)
                if record.endswith(_PAYLOADS):
                    for name, payload in json.loads(archive.read(entry))["config"].items():
                        if payload["use_pickle"] or not _TENSOR.fullmatch(payload["path_name"]):
                            raise _refusal(path, name)
    except ArtifactError:
        raise
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no archive of torch.export: {error}; export it again") from error


def _refusal(path: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"{path} holds {name!r}, which may be a pickle and which `hetegen export` never writes; do not use "
        "this artifact"
    )
