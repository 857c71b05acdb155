"""Archives of torch.export, looked at before torch reads them: none of ours holds a pickle."""

import json
import zipfile
from pathlib import Path

from hetegen_rec.scoring.errors import ArtifactError

_EXAMPLES = "/data/sample_inputs/"
_PAYLOADS = "_config.json"


def refuse_pickles(path: Path) -> None:
    """Refuses an archive of which torch would load a part by pickle, and so run whatever it says.

    Raises:
        ArtifactError: it has example inputs or pickled constants, or is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if _EXAMPLES in entry.filename and entry.file_size:
                    raise ArtifactError(_message(path, entry.filename))
                if entry.filename.endswith(_PAYLOADS):
                    for name, payload in json.loads(archive.read(entry))["config"].items():
                        if payload["use_pickle"]:
                            raise ArtifactError(_message(path, name))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is no archive of torch.export: {error}; export it again") from error


def _message(path: Path, name: str) -> str:
    return f"{path} holds a pickle ({name}), which `hetegen export` never writes; do not use this artifact"
