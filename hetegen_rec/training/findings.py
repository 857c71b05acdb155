"""What of a training step is not finite: searched in what a rank kept of the step, and put into words."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetegen_rec.config.schema import Schema
from hetegen_rec.models.network import Outputs

MAX_SQUARED_NORM = torch.finfo(torch.float32).max / 2**32
"""Of a rank's gradients. What is left to the largest float is room for the sums that follow: over ranks,
over the rows that look up one id, over the steps of an accumulator of squares."""

_NUM_SHOWN = 5


@dataclass
class Evidence:
    """What a rank keeps of a step until the step is known to be finite."""

    outputs: Outputs
    loss: Tensor
    looked_up: dict[str, Tensor]
    """[B, dim] by token key: what the tables gave, before the step changed them."""
    gradients: dict[str, Tensor]
    """[B, dim] by token key: what was on its way to the tables."""
    norms: dict[str, Tensor]
    """Norms of the gradients of the network's weights, by the weight's name."""


@dataclass(frozen=True)
class Finding:
    """What one rank saw of a step that is not finite, on this rank or another."""

    step: int
    rank: int
    epoch: int
    rows_per_lane: int
    """Rows of the epoch that a lane had handed out after this step."""
    loss: float
    terms: list[str]
    """Terms of the loss that are not finite."""
    fields: list[str]
    """Fields whose reconstruction loss, over all ranks, is not finite."""
    weights: list[str]
    """Weights of the network whose gradient is not finite or overflows."""
    gradients: list[str]
    """Fields whose looked-up rows have a gradient that is not finite or overflows."""
    embeddings: list[str]
    """Looked-up table rows that are not finite themselves, each with its table and fields."""
    row_ids: list[int]
    """Offending rows, by their index in the split."""
    num_rows: int
    """Rows of this rank in the step, without padding."""

    @property
    def is_spoilt(self) -> bool:
        """Whether anything of this rank is not finite."""
        return bool(not math.isfinite(self.loss) or self.weights or self.gradients)


def find(step: int, rank: int, evidence: Evidence, schema: Schema, fields: Sequence[str]) -> Finding:
    """Searches the evidence of one step. Waits for the device.

    Args:
        step: its number.
        rank: whose evidence it is.
        evidence: of the step.
        schema: names the fields that own the tokens.
        fields: names of the columns of the per-field losses.
    """
    outputs, batch = evidence.outputs, evidence.outputs.batch
    field_of = {token.key: token.field for token in schema.tokens}
    real = batch.row_ids >= 0
    return Finding(
        step=step,
        rank=rank,
        epoch=batch.cursor.epoch,
        rows_per_lane=batch.cursor.rows_per_lane,
        loss=evidence.loss.item(),
        terms=[name for name, term in outputs.terms.items() if not term.isfinite()],
        fields=_bad_fields(outputs, fields),
        weights=[name for name, norm in evidence.norms.items() if _overflows(norm)],
        gradients=_distinct(field_of[key] for key, g in evidence.gradients.items() if _overflows(g.norm())),
        embeddings=_bad_embeddings(evidence, schema),
        row_ids=batch.row_ids[_bad_rows(evidence) & real].tolist(),
        num_rows=int(real.sum()),
    )


def tell(findings: Sequence[Finding]) -> str:
    """One sentence on a step, from what all ranks saw of it.

    A rank's loss that is not finite makes losses and gradients of other ranks so, too; where any rank
    knows the rows, only those that do are told of.
    """
    spoilt = [finding for finding in findings if finding.is_spoilt] or list(findings)
    telling = [finding for finding in spoilt if finding.row_ids] or spoilt
    first = findings[0]
    return (
        f"step {first.step} is not finite (epoch {first.epoch}, behind {first.rows_per_lane:,} rows of every "
        f"lane). {'. '.join(_tell_rank(finding) for finding in telling)}"
    )


def _tell_rank(finding: Finding) -> str:
    parts = [f"loss {finding.loss:g}"]
    parts += _named("in the terms", finding.terms)
    parts += _named("in the reconstruction of", finding.fields)
    if math.isfinite(finding.loss):  # else every gradient follows from the loss
        parts += _named("gradients of the looked-up rows of", finding.gradients)
        parts += _named("gradients of the weights", finding.weights)
    parts += _named("embeddings that were spoilt before,", finding.embeddings)
    if finding.row_ids:
        rows = _named("row ids", [str(row) for row in finding.row_ids])[0]
        parts.append(f"{rows} ({len(finding.row_ids)} of {finding.num_rows} rows)")
    return f"Rank {finding.rank}: {'; '.join(parts)}"


def _named(what: str, names: Sequence[str]) -> list[str]:
    """`what` and the first few names; nothing without names."""
    if not names:
        return []
    more = len(names) - _NUM_SHOWN
    shown = ", ".join(names[:_NUM_SHOWN])
    return [f"{what} {shown} and {more} more" if more > 0 else f"{what} {shown}"]


def _overflows(norm: Tensor) -> bool:
    return not norm.square() < MAX_SQUARED_NORM


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _is_bad(values: Tensor) -> Tensor:
    """[B, ...] -> [B] bool: rows with anything that is not finite."""
    return ~values.isfinite().flatten(1).all(1)


def _bad_fields(outputs: Outputs, fields: Sequence[str]) -> list[str]:
    if outputs.fields is None:
        return []
    bad = _is_bad(outputs.fields.cross_entropy).tolist()
    return [name for name, is_bad in zip(fields, bad, strict=True) if is_bad]


def _bad_rows(evidence: Evidence) -> Tensor:
    """[B] bool: where it began. An embedding spoils the losses of other rows, a logit only its own."""
    suspects = [torch.cat(list(evidence.looked_up.values()), dim=1)]
    if evidence.outputs.logits is not None:
        suspects.append(evidence.outputs.logits[:, None])
    suspects.append(torch.cat(list(evidence.gradients.values()), dim=1))
    for values in suspects:
        bad = _is_bad(values)
        if bad.any():
            return bad
    return bad


def _bad_embeddings(evidence: Evidence, schema: Schema) -> list[str]:
    """Table rows found in bags that are not finite and in none that is."""
    suspects: dict[str, set[int]] = defaultdict(set)
    cleared: dict[str, set[int]] = defaultdict(set)
    users: dict[str, list[str]] = defaultdict(list)
    for token in schema.tokens:
        table = schema.field(token.field).table_name
        bag = evidence.outputs.batch.kjt[token.key]
        bad = torch.repeat_interleave(_is_bad(evidence.looked_up[token.key]), bag.lengths().long())
        suspects[table].update(bag.values()[bad].tolist())
        cleared[table].update(bag.values()[~bad].tolist())
        if bad.any():
            users[table].append(token.field)
    return [
        f"row {row} of table {table} ({', '.join(_distinct(users[table]))})"
        for table, rows in suspects.items()
        for row in sorted(rows - cleared[table])
    ]
