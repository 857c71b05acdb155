"""A model of NVIDIA Triton's Python back end that scores by an artifact (written by `export.triton`)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hetegen_rec.data.errors import DataError
from hetegen_rec.scoring.scorer import Scorer

ROW = "ROW"
"""Input: [N, 1] bytes, each a row as a JSON object of its columns."""
PROBABILITY = "PROBABILITY"
"""Output: [N, 1] float32, click probabilities."""
ARTIFACT = "artifact"
"""Directory of the artifact, beside model.py."""


class TritonPythonModel:
    """What Triton makes one of for each instance of the model; the names are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the artifact of this version.

        Args:
            args: from Triton: among others where the model lies, and its version.

        Raises:
            ArtifactError: it cannot be used here.
        """
        # Exists only inside of Triton.
        import triton_python_backend_utils  # type: ignore[import-not-found]

        self._triton: Any = triton_python_backend_utils
        version = Path(args["model_repository"]) / args["model_version"]
        self._scorer = Scorer.load(version / ARTIFACT)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Scores the rows of all requests together; a request with a wrong row is answered with an error."""
        encoded = [self._ids(request) for request in requests]
        good = [ids for ids in encoded if not isinstance(ids, DataError)]
        scores = self._scorer.score_ids(np.concatenate(good)) if good else np.empty(0, np.float32)
        responses, start = [], 0
        for ids in encoded:
            if isinstance(ids, DataError):
                responses.append(self._refused(ids))
            else:
                responses.append(self._answer(scores[start : start + len(ids)]))
                start += len(ids)
        return responses

    def _ids(self, request: Any) -> npt.NDArray[np.int64] | DataError:
        """[N, S] of a request's rows, or what is wrong with them."""
        texts = self._triton.get_input_tensor_by_name(request, ROW).as_numpy().reshape(-1)
        try:
            return self._scorer.ids([_parsed(text, place) for place, text in enumerate(texts)])
        except DataError as error:
            return error

    def _answer(self, scores: npt.NDArray[np.float32]) -> Any:
        tensor = self._triton.Tensor(PROBABILITY, scores.reshape(-1, 1))
        return self._triton.InferenceResponse(output_tensors=[tensor])

    def _refused(self, error: DataError) -> Any:
        return self._triton.InferenceResponse(error=self._triton.TritonError(str(error)))


def _parsed(text: bytes, place: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"row {place} is not JSON: {error}") from error
