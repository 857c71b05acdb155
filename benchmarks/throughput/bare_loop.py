"""The least that trains a sharded model: TorchRec's pipeline over batches made before, and nothing else.

No learning rates, guard, meter, log, progress, watchdog, agreement of ranks, evaluation or checkpoint. What
the trainer takes longer over the same network, optimizers and batches is its own overhead.
"""

from collections.abc import Iterator

from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from hetegen_rec.data.batch import Batch
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.training.setup import ShardedModel


class BareLoop:
    """A model, an optimizer and a pipeline."""

    def __init__(self, model: ShardedModel, optimizer: KeyedOptimizer, runtime: Runtime) -> None:
        model.dmp.train()
        self._pipeline = TrainPipelineSparseDist(model.dmp, optimizer, runtime.device)

    def train(self, batches: Iterator[Batch]) -> None:
        """One step for each of the batches."""
        self._pipeline.reset()  # one that was drained would take nothing from a new iterator
        while True:
            try:
                self._pipeline.progress(batches)
            except StopIteration:
                return
