"""What stands behind the sharded tables in every model: rows become tokens, clicks a loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import KeyedTensor

from hetegen_rec.config.run import CLICK_STAGES, ModelConfig, Stage
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.models.difficulty import Difficulty, FieldLosses
from hetegen_rec.models.embedding import TokenAssembly, table_shapes
from hetegen_rec.models.reduction import num_ranks


@dataclass
class Outputs:
    """What a step shows besides its loss; everything detached."""

    batch: Batch
    """The batch that was trained: pipelines read ahead, so the reader may stand behind it."""
    logits: Tensor | None
    """[B] click logits of the clean rows; None in a pre-training step."""
    terms: dict[str, Tensor]
    """Scalars that the loss is the sum of (the label term counts once, the rest as named)."""
    fields: FieldLosses | None = None
    """Per-field reconstruction losses of the global batch, in generative steps."""


class ClickNetwork(nn.Module, ABC):
    """The replicated part of a model, and the terms of its loss that all models share.

    Subclasses say how a row is scored, and whether anything else is lost besides clicks.
    """

    fields: list[str]
    """Names of the fields that are reconstructed; none where the model only scores."""
    difficulty: Difficulty
    """Their difficulty."""

    def __init__(
        self,
        schema: Schema,
        statistics: Statistics,
        model: ModelConfig,
        stage: Stage,
        *,
        table_l2: float = 0.0,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.stage, self.config = stage, model
        self.table_l2, self.autocast = table_l2, autocast
        self.assembly = TokenAssembly(schema, table_shapes(schema, statistics, model.dim), model.dim)

    @property
    def scores_clicks(self) -> bool:
        """Whether this stage trains the click head."""
        return self.stage in CLICK_STAGES

    @property
    def unread(self) -> Sequence[str]:
        """Submodules that this stage neither trains nor reads, so that a checkpoint may hold others."""
        return ()

    @property
    def scorers(self) -> Sequence[str]:
        """Submodules that do nothing but score clicks, so that no pre-training has trained them."""
        return ()

    @property
    def mask_tokens(self) -> Tensor | None:
        """[T, D]: what stands for a dropped token; None if nothing was trained to."""
        return None

    def forward(self, looked_up: KeyedTensor, batch: Batch) -> tuple[Tensor, Outputs]:
        """Looked-up rows and the batch they belong to -> loss and outputs."""
        device = batch.labels.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            regularises = bool(self.table_l2) and self.training
            tokens, norms = self.assembly(looked_up, batch.movement, with_norms=regularises)
            present = batch.ids >= 0
            logits = None
            terms: dict[str, Tensor] = {}
            if self.scores_clicks or not self.training:
                logits = self.score(tokens, present)
                terms["click"] = _click_loss(logits, batch)
            fields = None
            if self.training:
                generative, fields = self.generative_terms(tokens, present, batch)
                terms.update(generative)
            if norms is not None:
                terms["table_l2"] = self.table_l2 * _unbiased_l2(norms, batch)
        loss = torch.stack(list(terms.values())).sum()
        shown = {name: term.detach() for name, term in terms.items()}
        return loss, Outputs(batch, logits.detach() if logits is not None else None, shown, fields)

    @abstractmethod
    def score(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Click logits [B] of rows taken as clean.

        Args:
            tokens: [B, T, D], looked up or put in their place.
            present: [B, T] bool, False for positions that do not exist.
        """

    def generative_terms(
        self,
        tokens: Tensor,  # noqa: ARG002 - for models that override it
        present: Tensor,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
    ) -> tuple[dict[str, Tensor], FieldLosses | None]:
        """What a training step loses besides clicks, and the per-field losses behind it; here nothing.

        Args:
            tokens: [B, T, D], looked up.
            present: [B, T] bool, False for positions that do not exist.
            batch: that they belong to.
        """
        return {}, None


def _click_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy: this rank's share of the mean over the real rows of the global batch."""
    real = (batch.row_ids >= 0).float()
    loss = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    return (loss * real).sum() * num_ranks() / batch.num_real_rows


def _unbiased_l2(norms: Tensor, batch: Batch) -> Tensor:
    """Estimate of 1/2 ||E||^2 over whole tables from looked-up rows (docs/method.md section 10, derived).

    A table row that a training row looks up q times in the mean stands in the global batch of B rows
    B q times; weighting each by 1 / (B q) makes the expectation the sum over all rows, of which this is
    the rank's share. Padding has norm 0.
    """
    return 0.5 * (norms * torch.exp(-batch.log_rate)).sum() * num_ranks() / batch.num_real_rows
