"""Rows behind the lookup of an unsharded model, for strategies that need nothing else."""

from dataclasses import replace

import torch
from torch import Tensor

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.inference.lookup import BatchRows, Lookup
from hetegen_rec.inference.plain import Plain
from hetegen_rec.inference.strategy import Scored, Strategy
from hetegen_rec.models.hetegen import HeteGen


def lookup_of(model: HeteGen, schema: Schema) -> Lookup:
    return Lookup(model.ebc, model.network, schema)


@torch.no_grad()
def rows_of(model: HeteGen, batch: Batch) -> BatchRows:
    model.eval()
    return BatchRows.of(model.network.assembly(model.ebc(batch.kjt))[0], batch)


def part_of(rows: BatchRows, index: list[int]) -> BatchRows:
    """Some rows in a batch of their own; its KJT stays that of all."""
    tensors = {name: tensor[index] for name, tensor in rows.batch._tensors()}
    return BatchRows.of(rows.tokens[index], replace(rows.batch, **tensors))


@torch.no_grad()
def score(strategy: Strategy[BatchRows], rows: BatchRows) -> Scored:
    return strategy.score(rows)


def plain(model: HeteGen, rows: BatchRows) -> Tensor:
    return score(Plain(model.network), rows).probabilities
