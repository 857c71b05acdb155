"""Heads that predict the noised cells of a row, one loss per row and field (docs/method.md section 4)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import ModelConfig, ReconstructionConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Field, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.models.corruption import Corrupted, RowNoise
from hetegen_rec.models.sampled_loss import Candidates, sampled_cross_entropy

Head: TypeAlias = Literal["full", "sampled", "none"]

_MIN_TEMPERATURE = 0.01
_LEAST_CHANCE = math.log(2.0)
_LEAST_BASELINE = 1e-3  # nats; what one value takes nearly whole has hardly any


@dataclass
class RowLosses:
    """Cross-entropies of the reconstructable fields; a row has at most one term a field."""

    loss: Tensor
    """[B, F]: cross-entropy in nats; 0 where there is no target."""
    is_target: Tensor
    """[B, F] bool."""
    chance: Tensor
    """[F]: cross-entropy of a uniform guess on this rank's batch, such as log V, or log(1 + K), mean over the
    targets with K other values to choose from each."""
    baseline: Tensor
    """[F]: cross-entropy of a guess that knows how often, but not where: for a full softmax the entropy of
    the field's marginal distribution, without what dropout takes from the targets, for a sampled one that of
    the values of this rank's batch."""
    rank: Tensor | None = None
    """[B, F] int64: how many of the values it chooses from the head likes no less than the true one (of a
    set of true values, than the best of them). None in training, and for heads that do not choose."""

    def cat(self, other: "RowLosses") -> "RowLosses":
        """The fields of both."""
        return RowLosses(
            torch.cat([self.loss, other.loss], 1),
            torch.cat([self.is_target, other.is_target], 1),
            torch.cat([self.chance, other.chance]),
            torch.cat([self.baseline, other.baseline]),
            None if self.rank is None or other.rank is None else torch.cat([self.rank, other.rank], 1),
        )


def split_fields(schema: Schema, statistics: Statistics, model: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of the fields with a softmax over their vocabulary, and of those that know values by vectors.

    A field with fewer than two values has nothing to predict and stands in neither.
    """
    fields: dict[Head, list[str]] = {"full": [], "sampled": [], "none": []}
    for field in schema.fields:
        fields[_head_of(field, statistics.table_rows(field.table_name), schema, model)].append(field.name)
    return fields["full"], fields["sampled"]


def _head_of(field: Field, table_rows: int, schema: Schema, model: ModelConfig) -> Head:
    num_values = table_rows - NUM_RESERVED_IDS
    if num_values < 2 or not model.objective.predicts(field, schema):
        return "none"
    is_small = num_values <= model.reconstruction.full_softmax_max and field.kind != "sequence"
    return "full" if is_small and model.objective.knows_vocabularies else "sampled"


def check_growth(
    schema: Schema, before: Mapping[str, int], after: Mapping[str, int], model: ModelConfig
) -> None:
    """Refuses tables that have grown so far that a field needs another head; says nothing of smaller ones.

    Args:
        schema: the fields.
        before: rows of every table as the heads were trained, the two reserved ones included.
        after: rows of every table now.
        model: decides which head a field gets.

    Raises:
        ConfigError: a field needs another head. The message says what to set.
    """
    limit = model.reconstruction.full_softmax_max
    for field in schema.fields:
        rows = before[field.table_name], after[field.table_name]
        old, new = (_head_of(field, count, schema, model) for count in rows)
        if old == new or rows[1] <= rows[0]:
            continue
        values = [count - NUM_RESERVED_IDS for count in rows]
        found = f"field {field.name!r}: its table has grown from {values[0]:,} to {values[1]:,} values"
        if old == "full":
            raise ConfigError(
                f"{found}, past model.reconstruction.full_softmax_max: {limit}, so that a sampled softmax "
                f"would replace its full one; set it above what the table will ever hold (now {values[1]}), "
                "if that stays below the fields that have a sampled softmax already, or train from the start"
            )
        raise ConfigError(
            f"{found}, and with fewer than two it had no head that could go on; train from the start"
        )


def vocabulary_parameters(model: nn.Module) -> dict[str, str]:
    """The dense parameters that have a row per value of a table, by name, and the name of the table.

    They grow with their table: row i belongs to the id i + 2. Besides them and the tables nothing in a
    checkpoint depends on the size of a vocabulary.

    Args:
        model: any module with heads inside, not wrapped.
    """
    return {
        f"{path}.classes.{name}": name.split(".")[0]
        for path, module in model.named_modules()
        if isinstance(module, FullSoftmax)
        for name, _ in module.classes.named_parameters()
    }


class FullSoftmax(nn.Module):
    """Softmax over the whole vocabulary of each small field.

    A multi-valued field is a set: its cross-entropy is the mean over the values of the row.
    """

    columns: Tensor
    chance: Tensor
    baseline: Tensor
    held_out_baseline: Tensor

    def __init__(
        self, schema: Schema, statistics: Statistics, names: list[str], dim: int, oov_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.positions = {name: schema.span(name)[0] for name in names}
        self.register_buffer("columns", torch.tensor(list(self.positions.values())), persistent=False)
        self.bags = {name for name in names if schema.field(name).kind == "multi_valued"}
        sizes = {name: statistics.table_rows(name) - NUM_RESERVED_IDS for name in names}
        self.classes = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in sizes.items()})
        # A dropped cell is no target. Where rows are only scored none is dropped.
        trained, held_out = (
            [max(statistics.entropy(name, dropout), _LEAST_BASELINE) for name in names]
            for dropout in (oov_dropout, 0.0)
        )
        chances = [math.log(size) for size in sizes.values()]
        self.register_buffer("chance", torch.tensor(chances), persistent=False)
        self.register_buffer("baseline", torch.tensor(trained), persistent=False)
        self.register_buffer("held_out_baseline", torch.tensor(held_out), persistent=False)

    def forward(self, hidden: Tensor, batch: Batch, corrupted: Corrupted) -> RowLosses:
        """hidden [B, T + 1, D] -> losses of these fields."""
        targets = corrupted.is_target[:, self.columns]
        losses, ranks = [], []
        # Taken out at once: a slice a field would each fill a gradient of all tokens in the backward pass.
        hidden_of = zip(self.positions, hidden.index_select(1, self.columns).unbind(1), strict=True)
        for name, hidden_of_field in hidden_of:
            logits = self.logits(name, hidden_of_field)
            losses.append(self.cross_entropy(name, logits, batch))
            if not self.training:
                ranks.append(self.rank(name, logits, batch))
        loss = torch.where(targets, torch.stack(losses, dim=1), 0.0)
        rank = torch.stack(ranks, dim=1) if ranks else None
        baseline = self.baseline if self.training else self.held_out_baseline
        return RowLosses(loss, targets, self.chance, baseline, rank)

    def logits(self, name: str, hidden: Tensor) -> Tensor:
        """Hidden vectors [B, D] of one field's token -> [B, V] over its ids from 2 up."""
        logits: Tensor = self.classes[name](hidden).float()
        return logits

    def cross_entropy(self, name: str, logits: Tensor, batch: Batch) -> Tensor:
        """[B]: of the values that the rows have, whether or not they are targets."""
        if name in self.bags:
            return _bag_cross_entropy(logits, batch, name)
        classes = (batch.ids[:, self.positions[name]] - NUM_RESERVED_IDS).clamp(min=0)
        return functional.cross_entropy(logits, classes, reduction="none")

    def rank(self, name: str, logits: Tensor, batch: Batch) -> Tensor:
        """[B]: place of the true value, of a set that of the best, by logits [B, V]."""
        classes = (batch.ids[:, self.positions[name]] - NUM_RESERVED_IDS).clamp(min=0)
        is_true = functional.one_hot(classes, logits.shape[1]).bool()
        if name in self.bags:
            rows, values = _bag_values(batch, name)
            is_true[rows[values >= 0], values[values >= 0]] = True
        best = logits.masked_fill(~is_true, float("-inf")).amax(1, keepdim=True)
        return ((logits >= best) & ~is_true).sum(1)


def _bag_values(batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Row and class of every value of a bag; the class is negative where the value is reserved."""
    bag = batch.kjt[name]
    values = bag.values() - NUM_RESERVED_IDS
    rows = torch.arange(batch.num_rows, device=values.device)
    return torch.repeat_interleave(rows, bag.lengths().long(), output_size=values.shape[0]), values


def _bag_cross_entropy(logits: Tensor, batch: Batch, name: str) -> Tensor:
    """Mean of -log p(value) over the known values of each row's bag, [B]."""
    rows, values = _bag_values(batch, name)
    known = (values >= 0).to(logits.dtype)
    log_p = logits.log_softmax(-1)[rows, values.clamp(min=0)] * known
    zeros = logits.new_zeros(logits.shape[0])
    count = zeros.index_add(0, rows, known)
    return -zeros.index_add(0, rows, log_p) / count.clamp(min=1.0)


class MatchingHead(nn.Module):
    """Compares hidden vectors with looked-up rows of the same field, all fields at once.

    Each field has a projection of its own for the hidden vector. A sequence predicts one of its noised items
    a row, chosen at random: an unbiased sample of the mean over them that keeps the cost that of one token.
    """

    def __init__(self, schema: Schema, names: list[str], dim: int) -> None:
        super().__init__()
        self.names = names
        self.spans = [schema.span(name) for name in names]
        self.query = nn.Parameter(torch.eye(dim).repeat(len(names), 1, 1))

    def picked_tokens(self, batch: Batch, corrupted: Corrupted, noise: RowNoise) -> Tensor:
        """[B, F]: the token of every field that is predicted, or stands for it where there is no target."""
        picks = [_pick(span, corrupted.is_target, batch.ids, noise) for span in self.spans]
        return torch.stack(picks, dim=1)

    def matched(self, hidden: Tensor, clean: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Projected hidden vectors and clean looked-up ones, both [F, B, D], at tokens [B, F]."""
        return (_at(hidden, picks) @ self.query).float(), _at(clean, picks).float()


class SampledSoftmax(MatchingHead):
    """In-batch softmax of each large field and sequence.

    Candidates are the clean looked-up rows of the same field in this rank's batch, so there is no
    second lookup and the cost does not grow with the vocabulary. Logits are cosines with a learnt
    temperature, corrected by the log frequency with which in-batch sampling draws a candidate
    (logQ; Yi et al., RecSys 2019); candidates equal to the target count for it. Without the
    temperature the cross-entropy would be bounded below by log(1 + (K - 1) e^-2).
    """

    def __init__(self, schema: Schema, names: list[str], dim: int, config: ReconstructionConfig) -> None:
        super().__init__(schema, names, dim)
        self.num_candidates = config.num_candidates
        initial = math.log(config.temperature)
        self.log_temperature = nn.Parameter(torch.full((len(names),), initial))

    def forward(
        self, hidden: Tensor, clean: Tensor, batch: Batch, corrupted: Corrupted, noise: RowNoise
    ) -> RowLosses:
        """hidden [B, T + 1, D], clean looked-up tokens [B, T, D] -> losses of these fields."""
        picks = self.picked_tokens(batch, corrupted, noise)  # [B, F]
        query, keys = self.matched(hidden, clean, picks)  # [F, B, D]
        query = functional.normalize(query, dim=-1) / self.temperature()[:, None, None]
        keys = functional.normalize(keys, dim=-1)
        ids = batch.ids.gather(1, picks).T  # [F, B]
        log_q = batch.log_prior.gather(1, picks).T
        is_target = corrupted.is_target.gather(1, picks)
        score = (query * keys).sum(-1)  # [F, B]
        is_candidate = ids[:, : self.num_candidates] >= NUM_RESERVED_IDS
        candidates = Candidates.among(ids, is_candidate, log_q)
        others = candidates.other_values()  # [F, B]
        is_target = is_target & (others > 0).T  # there is nothing to choose from otherwise
        loss = sampled_cross_entropy(score - log_q, query, keys, candidates, is_target.T)
        chance = mean_over_targets(others.log1p(), is_target.T)
        log_own = candidates.log_own()
        by_frequency = (candidates.other_rows() + log_own.exp()).log() - log_own  # scores of log p
        baseline = mean_over_targets(by_frequency, is_target.T, _LEAST_BASELINE)
        rank = None
        if not self.training:  # by likelihood: the correction is for the loss, and would rank by lift
            rank = (candidates.scores(query, keys) >= score[..., None]).sum(-1).T
        return RowLosses(loss.T, is_target, chance, baseline, rank)

    def queries(self, name: str, hidden: Tensor) -> Tensor:
        """Hidden vectors [B, D] of one field -> [B, D], whose products with unit vectors are logits."""
        column = self.names.index(name)
        query = functional.normalize((hidden @ self.query[column]).float(), dim=-1)
        return query / self.temperature()[column]

    def temperature(self) -> Tensor:
        """[F]: temperatures with a floor, which passes gradients on, or none could leave it again."""
        free = self.log_temperature.exp()
        return free + (free.clamp(min=_MIN_TEMPERATURE) - free).detach()


def mean_over_targets(levels: Tensor, is_target: Tensor, least: float = _LEAST_CHANCE) -> Tensor:
    """Mean [F] of levels [F, B] over the targets of each field, of all rows where it has none, or `least`."""
    counted = torch.where(is_target.any(1, keepdim=True), is_target, True)
    return ((levels * counted).sum(1) / counted.sum(1)).clamp(min=least)


def _pick(span: tuple[int, int], is_target: Tensor, ids: Tensor, noise: RowNoise) -> Tensor:
    """[B]: a random noised token of the span, else a random present one."""
    start, stop = span
    if stop - start == 1:
        return torch.full_like(ids[:, 0], start)
    score = noise.picks()[:, start:stop] + is_target[:, start:stop] + (ids[:, start:stop] >= 0)
    return start + score.argmax(dim=1)


def _at(tokens: Tensor, picks: Tensor) -> Tensor:
    """tokens [B, S, D] at picks [B, F] -> [F, B, D]."""
    index = picks[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index).transpose(0, 1)


class Heads(nn.Module, ABC):
    """What an objective predicts of a corrupted row."""

    fields: list[str]
    """Names the columns of the losses."""

    @abstractmethod
    def forward(
        self, hidden: Tensor, clean: Tensor, batch: Batch, corrupted: Corrupted, noise: RowNoise
    ) -> RowLosses:
        """Losses [B, F] of every predicted field.

        Args:
            hidden: [B, T + 1, D], of the denoiser.
            clean: [B, T, D], looked up.
            batch: that the rows belong to.
            corrupted: what the denoiser saw.
            noise: of the batch.
        """


class Reconstruction(Heads):
    """The values of noised cells, by a softmax of either kind."""

    def __init__(
        self, schema: Schema, statistics: Statistics, model: ModelConfig, oov_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.full_fields, self.sampled_fields = split_fields(schema, statistics, model)
        self.fields = [*self.full_fields, *self.sampled_fields]
        dim = model.dim
        # A head without fields would hold parameters that never get a gradient.
        self.full = (
            FullSoftmax(schema, statistics, self.full_fields, dim, oov_dropout) if self.full_fields else None
        )
        self.sampled = (
            SampledSoftmax(schema, self.sampled_fields, dim, model.reconstruction)
            if self.sampled_fields
            else None
        )

    def forward(
        self, hidden: Tensor, clean: Tensor, batch: Batch, corrupted: Corrupted, noise: RowNoise
    ) -> RowLosses:
        """Losses [B, F], the full softmaxes first."""
        parts = []
        if self.full is not None:
            parts.append(self.full(hidden, batch, corrupted))
        if self.sampled is not None:
            parts.append(self.sampled(hidden, clean, batch, corrupted, noise))
        return parts[0] if len(parts) == 1 else parts[0].cat(parts[1])
