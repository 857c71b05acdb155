"""A small click log of every kind of field, its batches and its models."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hetegen_rec.config.balance import BalanceForm
from hetegen_rec.config.run import ModelConfig, Stage, StageConfig, TrainConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.data.encoded_rows import encoded_schema
from hetegen_rec.data.statistics import FieldStatistics, Statistics
from hetegen_rec.models.balancing import FORMS
from hetegen_rec.models.corruption import Corrupted, Diffusion, RowNoise
from hetegen_rec.models.hetegen import HeteGen, build_model

DIM = 8
NUM_VALUES = {"user": 30, "genres": 6, "item": 40, "hour": 5, "place": 12}
LENGTH = 3
# The history stands before the field whose table it shares, so that schema order is not table order.
SCHEMA = Schema.model_validate(
    {
        "label": "click",
        "fields": [
            {"name": "user", "kind": "id"},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": LENGTH},
            {"name": "genres", "kind": "multi_valued", "max_length": 3},
            {"name": "item", "kind": "id"},
            {"name": "hour", "kind": "categorical"},
            {"name": "place", "kind": "id"},
        ],
    }
)
TOKENS = [token.key for token in SCHEMA.tokens]
_FIRST_ITEM = [token.field for token in SCHEMA.tokens].index("history")
HISTORY = slice(_FIRST_ITEM, _FIRST_ITEM + LENGTH)
FULL = ["genres", "hour"]
SAMPLED = ["user", "history", "item", "place"]


def column(key: str) -> int:
    """The place of a token in the row."""
    return TOKENS.index(key)


class Log:
    """Encoded rows, in which user and item go together and ids are Zipf; and their statistics."""

    def __init__(self, num_rows: int = 64, seed: int = 0) -> None:
        self.table = _rows(np.random.default_rng(seed), num_rows)
        self.statistics = _count(self.table)
        self._batcher = Batcher(SCHEMA, self.statistics)

    def batch(
        self, start: int = 0, stop: int | None = None, noise_seed: int = 1, step: int = 0, padding: int = 0
    ) -> Batch:
        """Rows `start` to `stop` as one rank's share of a global batch of all rows, padding behind them."""
        total = self.table.num_rows
        stop = total if stop is None else stop
        strata = (np.arange(start, stop + padding) + 0.5) / total
        rows = pa.concat_tables([self.table.slice(start, stop - start), self._batcher.padding(padding)])
        cursor = Cursor(0, (Served(1, step),))
        return self._batcher.make(rows, strata.astype(np.float32), noise_seed, cursor, total)

    def rows(self, index: list[int]) -> Batch:
        """Some rows, in an order of their own, on the strata that they have in `batch()`."""
        total = self.table.num_rows
        strata = (np.array(index) + 0.5) / total
        return self._batcher.make(self.table.take(index), strata.astype(np.float32), 1, Cursor(), total)


def _rows(rng: np.random.Generator, num_rows: int) -> pa.Table:
    def draw(field: str, size: int = 1) -> list[int]:
        values = np.minimum(rng.zipf(1.6, size) - 1, NUM_VALUES[field] - 1) + NUM_RESERVED_IDS
        reserved = rng.random(size) < 0.1
        return np.where(reserved, rng.integers(0, NUM_RESERVED_IDS, size), values).tolist()

    columns: dict[str, list[Any]] = {
        "user": [draw("user")[0] for _ in range(num_rows)],
        "history": [draw("item", rng.integers(0, LENGTH + 1)) for _ in range(num_rows)],
        "genres": [draw("genres", rng.integers(1, 4)) for _ in range(num_rows)],
        "item": [draw("item")[0] for _ in range(num_rows)],
        "hour": [draw("hour")[0] for _ in range(num_rows)],
        "place": [draw("place")[0] for _ in range(num_rows)],
    }
    columns["__label"] = (rng.random(num_rows) < 0.4).astype(np.float32).tolist()
    columns["__row_id"] = list(range(1000, 1000 + num_rows))
    return pa.table(columns, schema=encoded_schema(SCHEMA))


def _count(table: pa.Table) -> Statistics:
    fields = {}
    for field in SCHEMA.fields:
        values = table[field.name].combine_chunks()
        flat = (values.flatten() if field.is_list else values).to_numpy(zero_copy_only=False)
        counts = np.bincount(flat, minlength=NUM_RESERVED_IDS + NUM_VALUES[field.table_name])
        seen = counts[NUM_RESERVED_IDS:][counts[NUM_RESERVED_IDS:] > 0]
        shares = seen / seen.sum()
        fields[field.name] = FieldStatistics(
            name=field.name,
            num_values=int(counts[1:].sum()),
            num_missing=int(counts[0]),
            num_out_of_vocabulary=int(counts[1]),
            cardinality=len(seen),
            num_ids=len(counts),
            entropy=float(-(shares * np.log(shares)).sum()),
            counts=counts,
            table=field.table_name,
        )
    return Statistics(table.num_rows, int(np.sum(table["__label"].to_numpy())), fields)


def model_config(**sections: Any) -> ModelConfig:
    """A narrow model under which `genres` and `hour` have full softmaxes, the others sampled ones."""
    values: dict[str, Any] = {
        "dim": DIM,
        "denoiser": {"num_layers": 1},
        "reconstruction": {"full_softmax_max": 8},
        "ctr": {"hidden": [8]},
    }
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return ModelConfig.model_validate(values)


def balance_of(form: BalanceForm, every: int = 1) -> dict[str, Any]:
    """Settings of a form of balancing that probes gradients every so many steps, if it does at all."""
    return {"form": form, "probe_every": every} if FORMS[form].wants_probe else {"form": form}


def make_model(
    log: Log,
    stage: Stage,
    config: ModelConfig | None = None,
    schema: Schema = SCHEMA,
    table_l2: float = 0.0,
    precision: str = "fp32",
    std: float = 0.1,
    probe_every: int | None = None,
) -> HeteGen:
    """The model of a stage on unsharded tables, in training mode."""
    train = TrainConfig.model_validate({"precision": precision, "probe_gradients_every": probe_every})
    config = config or model_config()
    model = build_model(schema, log.statistics, config, train, stage, StageConfig(table_l2=table_l2), 0)
    model.ebc.to_empty(device="cpu")
    for weight in model.ebc.parameters():
        torch.nn.init.normal_(weight, std=std)
    return model


def tables_of(model: HeteGen) -> dict[str, Tensor]:
    """Embedding tables by name."""
    return {name: bag.weight for name, bag in model.ebc.embedding_bags.items()}


def corrupt(log: Log, tokens: Tensor, batch: Batch | None = None, **noise: Any) -> Corrupted:
    """Noises tokens [B, T, D] of a batch, by default the whole log."""
    batch = batch or log.batch()
    corruption = Diffusion(SCHEMA, model_config(noise=noise).noise, tokens.shape[-1], swappable=FULL)
    return corruption(tokens, batch, RowNoise(batch, len(TOKENS)))
