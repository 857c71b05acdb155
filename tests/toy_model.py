"""A small model with sharded tables, and its rows, for tests that need any such model."""

from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from hetegen_rec.config.run import DistributedConfig, StageConfig, TableConfig
from hetegen_rec.distributed.optimizers import attach_table_optimizer, make_optimizer
from hetegen_rec.distributed.planning import agree_on_plan
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.sharding import init_tables, shard_model

TABLES = {"user": 11, "item": 23, "tiny": 2}
DIM = 8
KEYS = {"user": ["user"], "item": ["item", "history"], "tiny": ["tiny"]}
GLOBAL_ROWS = 12
STAGE = StageConfig(table_lr=0.1, weight_decay=0.1)


class Toy(nn.Module):
    """Scores rows from four looked-up tokens; `difficulty` shifts the score."""

    def __init__(self, tables: dict[str, int] = TABLES) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(
                    name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=KEYS[name]
                )
                for name, rows in tables.items()
            ],
        )
        torch.manual_seed(0)
        self.keys = [key for name in tables for key in KEYS[name]]
        self.hidden = nn.Linear(len(self.keys) * DIM, 4)
        self.score = nn.Linear(4, 1)
        self.frozen_head = nn.Linear(4, 1).requires_grad_(False)  # as of another stage
        self.difficulty = nn.Parameter(torch.zeros(3))

    def forward(self, kjt: KeyedJaggedTensor) -> torch.Tensor:
        embedded = self.ebc(kjt)
        tokens = torch.cat([embedded[key] for key in self.keys], dim=1)
        return self.score(torch.tanh(self.hidden(tokens))).squeeze(1) + self.difficulty.sum()


def rows_of(rank: int, world_size: int) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """One rank's share of the same global batch."""
    count = GLOBAL_ROWS // world_size
    index = torch.arange(rank * count, (rank + 1) * count)
    ids = {"user": index % 11, "item": (index * 7) % 23, "history": (index * 5 + 1) % 23, "tiny": index % 2}
    values = torch.cat([ids[key] for keys in KEYS.values() for key in keys])
    lengths = torch.ones(len(values), dtype=torch.int32)
    keys = [key for keys in KEYS.values() for key in keys]
    return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths), (index % 3 == 0).float()


class Job:
    """A sharded toy with its optimizer on this rank."""

    def __init__(
        self,
        runtime: Runtime,
        sharding: str | None,
        table_optimizer: Any = "rowwise_adagrad",
        tables: dict[str, int] = TABLES,
        stage: StageConfig = STAGE,
    ) -> None:
        default = TableConfig(sharding=(sharding,)) if sharding else TableConfig()  # type: ignore[arg-type]
        config = DistributedConfig(tables={"default": default})
        toy = Toy(tables)
        attach_table_optimizer(toy.ebc, table_optimizer, stage, "cpu")
        self.runtime = runtime
        self.plan = agree_on_plan(runtime, toy, config, GLOBAL_ROWS)
        self.model = shard_model(toy, self.plan, runtime, config)
        init_tables(self.model, seed=1, std=0.5)
        self.optimizer = make_optimizer(self.model, stage, table_optimizer, difficulty_lr=0.05)
        self.rows, self.labels = rows_of(runtime.rank, runtime.world_size)

    def train(self, steps: int) -> None:
        """Steps on the global batch."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(self.model(self.rows), self.labels)
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def scores(self) -> list[float]:
        """Scores of the global batch, on every rank."""
        parts = self.runtime.gather(self.model(self.rows).tolist())
        return [score for part in parts for score in part]
