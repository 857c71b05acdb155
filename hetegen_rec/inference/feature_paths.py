"""Scores a row on several paths, which drop cells of combinations that training has hardly seen.

Reported for MATT-CTR (arXiv 2510.08932): hierarchical probabilistic hashing estimates how often each feature
combination was seen; this confidence samples several inference paths, whose scores are averaged. How a
confidence follows from counts, and a path from confidences, is derived (docs/method.md section 11).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hetegen_rec.config.inference import FeaturePathsConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.sketch import CombinationCounts
from hetegen_rec.inference.noise import path_noise, row_keys
from hetegen_rec.inference.strategy import Network, Rows, Scored, every_row

_LEAST_WEIGHT = 1e-6  # of the full path, where no combination of a row was ever seen


class FeaturePaths:
    """The full row, and paths on which each field is kept with the confidence of its combinations.

    A value seen n times has confidence `min(1, n / reliable_count)`. A combination is held against what its
    values let expect if fields were independent, because pairs of a user and an item hardly ever come twice:
    with m the lesser of that and `reliable_count`, and the least confidence of its values as one more
    observation, it has `min(1, (n + least) / (m + 1))`. A field is kept with the mean over orders of the mean
    confidence of its combinations. A path weighs as much as the mean confidence of the combinations that it
    keeps whole. A path that drops nothing of a row costs no pass.
    """

    def __init__(
        self,
        network: Network,
        counts: CombinationCounts,
        dropped: Tensor,
        schema: Schema,
        config: FeaturePathsConfig,
        seed: int,
    ) -> None:
        """Works out which combination has a say on which field.

        Args:
            network: scores rows.
            counts: of all training rows.
            dropped: [T, D], what stands for a dropped token.
            schema: the fields of a row.
            config: how many paths.
            seed: of the paths.
        """
        self._network, self.counts, self.dropped = network, counts, dropped
        self._num_paths, self._seed = config.paths, seed
        self._enough = config.reliable_count
        names = list(schema.field_names)
        device = dropped.device
        self._field_of_token = torch.tensor(
            [names.index(token.field) for token in schema.tokens], device=device
        )
        members = torch.zeros(len(counts.sets), len(names), dtype=torch.float64)
        for column, fields in enumerate(counts.sets):
            members[column, list(fields)] = 1.0
        self._members = members.to(device, torch.float32)  # [C, F]
        self._shares = _shares(members)  # [C, F]

    @property
    def settings(self) -> Mapping[str, float]:
        """The paths, and how exact the counts behind them are."""
        return {"paths": self._num_paths, "count_overestimate": self.counts.overestimate}

    def score(self, rows: Rows) -> Scored:
        """The mean over the paths of a row, weighted by confidence."""
        full = self._network.score(rows.tokens, rows.present).sigmoid()
        passes = every_row(rows, 1.0)
        if not self._num_paths:
            return Scored(full, passes)
        confidence = self.confidence(rows)  # [B, C]
        keep = (confidence @ self._shares).to(rows.tokens.device)  # [B, F]
        confidence = confidence.to(rows.tokens.device, torch.float32)
        weight = confidence.mean(1) + _LEAST_WEIGHT
        total, weights = weight * full, weight
        keys = row_keys(rows.ids)
        for path in range(self._num_paths):
            kept = path_noise(keys, keep.shape[1], self._seed, path) < keep
            probabilities, shortened = self._score_path(rows, kept, full)
            weight = self._familiarity(confidence, kept)
            total, weights = total + weight * probabilities, weights + weight
            passes = passes + shortened
        return Scored(total / weights, passes)

    def confidence(self, rows: Rows) -> Tensor:
        """[B, C] in [0, 1], on the host: of every combination of each row.

        Of double precision, so that whether a cell is kept does not hang on how a batch is summed up.
        """
        counts, num_rows = self.counts, max(self.counts.num_rows, 1)
        seen = counts.estimate(rows.ids.cpu().numpy())
        singles, *larger = counts.sets_of_order
        values = seen[:, : len(singles)]
        of_values = np.minimum(values / self._enough, 1.0)  # [B, F]
        parts, start = [of_values], len(singles)
        for sets in larger:
            fields = np.array(sets)  # [C_k, k]
            expected = (values[:, fields] / num_rows).prod(-1) * num_rows  # [B, C_k]
            least = of_values[:, fields].min(-1)
            found = seen[:, start : start + len(sets)]
            parts.append(np.minimum((found + least) / (np.minimum(expected, self._enough) + 1.0), 1.0))
            start += len(sets)
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def _score_path(self, rows: Rows, kept: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [B] of the rows without fields that are not `kept` [B, F]; who took a pass [B]."""
        dropped = ~kept[:, self._field_of_token] & rows.present  # [B, T]
        shortened = dropped.any(1)
        index = shortened.nonzero().squeeze(1)
        probabilities = full.clone()
        if len(index):
            stand_in = self.dropped.to(rows.tokens.dtype)
            tokens = torch.where(dropped[index][..., None], stand_in, rows.tokens[index])
            probabilities[index] = self._network.score(tokens, rows.present[index]).sigmoid()
        return probabilities, shortened.float()

    def _familiarity(self, confidence: Tensor, kept: Tensor) -> Tensor:
        """[B]: mean confidence of the combinations whose fields are all kept; 0 where there is none."""
        whole = ((~kept).float() @ self._members.T == 0).float()  # [B, C]
        return (confidence * whole).sum(1) / whole.sum(1).clamp(min=1.0)


def counts_for(schema: Schema, num_rows: int, config: FeaturePathsConfig) -> CombinationCounts:
    """Counts of the combinations of fields that the configuration asks for; nothing is counted yet.

    Args:
        schema: the fields of a row.
        num_rows: of the training rows.
        config: which combinations, and how exactly.

    Raises:
        ConfigError: too little memory for them.
    """
    return CombinationCounts(
        schema,
        num_rows,
        order=config.order,
        most_sets=config.combinations,
        memory_bytes=config.sketch_mb << 20,
        depth=config.sketch_depth,
    )


def _shares(members: Tensor) -> Tensor:
    """[C, F]: what each combination has to say about each of its fields; columns sum to one.

    Args:
        members: [C, F], 1 where a field is in a combination, by order.
    """
    order = members.sum(1)
    parts = [members[order == one] for one in sorted(set(order.tolist()))]
    return torch.cat([part / part.sum(0) for part in parts]) / len(parts)
