"""The loop of one stage: steps, evaluations, early stop, checkpoints."""

import logging
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from hetegen_rec.config.run import RunConfig, Stage, StageConfig
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.reader import Reader
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.planning import plan_as_json
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.schedule import LearningRates
from hetegen_rec.models.hetegen import Outputs
from hetegen_rec.training.checkpoint import Checkpoints
from hetegen_rec.training.logs import RunLog
from hetegen_rec.training.meter import Meter
from hetegen_rec.training.progress import StageProgress
from hetegen_rec.training.scoring import measure, score_rows
from hetegen_rec.training.setup import ShardedModel

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one stage.

    An epoch is cut into equal segments with an evaluation after each. Every segment is an iterator
    of its own, which the sparse pipeline drains before the evaluation takes the model.
    """

    # what is trained
    config: RunConfig
    stage: Stage
    model: ShardedModel
    optimizer: KeyedOptimizer
    rates: LearningRates

    # on what
    runtime: Runtime
    statistics: Statistics
    train_reader: Reader
    valid_reader: Reader

    # what stays
    checkpoints: Checkpoints
    log: RunLog

    # where it stands
    step: int
    best_auc: float
    evaluations_without_gain: int

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        model: ShardedModel,
        optimizer: KeyedOptimizer,
        statistics: Statistics,
        readers: tuple[Reader, Reader],
        checkpoints: Checkpoints,
        log: RunLog,
        runtime: Runtime,
    ) -> None:
        self.config, self.stage, self.model = config, stage, model
        self.optimizer, self.runtime, self.statistics = optimizer, runtime, statistics
        self.train_reader, self.valid_reader = readers
        self.checkpoints, self.log = checkpoints, log
        self.step, self.best_auc, self.evaluations_without_gain = 0, -math.inf, 0
        budget = self.stage_config
        self.rates = LearningRates(optimizer, self.total_steps, budget.warmup, budget.decay)
        self._pipeline = self._make_pipeline()
        self._meter = Meter()
        self._epoch = 0

    @property
    def stage_config(self) -> StageConfig:
        """Budget and optimizers of this stage."""
        return self.config.stage(self.stage)

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage if it is not stopped early."""
        steps = self.stage_config.epochs * self.train_reader.batches_per_epoch
        return min(steps, self.config.train.max_steps or steps)

    def _make_pipeline(self) -> TrainPipelineBase | TrainPipelineSparseDist:
        kind = TrainPipelineSparseDist if self.config.train.pipeline == "sparse_dist" else TrainPipelineBase
        return kind(self.model.dmp, self.optimizer, self.runtime.device)

    def run(self) -> None:
        """Trains to the end of the budget or until the validation AUC stops growing."""
        self.model.dmp.train()
        title = f"{self.config.name} {self.stage}"
        with StageProgress(title, self.total_steps, enabled=self.runtime.is_main) as progress:
            for epoch in range(self.stage_config.epochs):
                if not self._train_epoch(epoch, progress):
                    break
        logger.info("%s: %d steps done", title, self.step)

    def _train_epoch(self, epoch: int, progress: StageProgress) -> bool:
        """Trains one epoch; returns whether to go on with the next."""
        self._epoch = epoch
        batches = self.train_reader.epoch(epoch)
        segments = self.config.train.evaluations_per_epoch
        per_segment = math.ceil(self.train_reader.batches_per_epoch / segments)
        left = self.train_reader.batches_per_epoch
        while left > 0:
            count = min(per_segment, left, self.total_steps - self.step)
            self._train_segment(islice(batches, count), progress)
            left -= count
            is_last = self.step >= self.total_steps
            if self._finish_segment(progress) or is_last:
                return False
        return True

    def _train_segment(self, batches: Iterator[Batch], progress: StageProgress) -> None:
        while True:
            try:
                outputs: Outputs = self._pipeline.progress(batches)
            except StopIteration:
                return
            self.step += 1
            self.rates.advance()
            self._meter.add(outputs, self.config.train.batch_size)
            progress.advance()
            if self.step % self.config.train.log_every == 0 or self.step == self.total_steps:
                self._log_window(progress)

    def _log_window(self, progress: StageProgress) -> None:
        network = self.model.network
        values = self._meter.read(network.difficulty, network.fields)
        self._meter.reset()
        epoch = self.step / self.train_reader.batches_per_epoch
        rows = self.step * self.config.train.batch_size
        values = {"epoch": round(epoch, 4), "rows": rows, **values}
        values["learning_rate"] = self.rates.by_name()
        self.log.write("train", self.step, values)
        progress.show(self.step, values["samples_per_second"], values["loss"])

    def _finish_segment(self, progress: StageProgress) -> bool:
        """Evaluates and saves; returns whether the stage should stop early."""
        metrics = self._evaluate()
        auc: float | None = metrics.get("auc")
        is_best = auc is not None and auc > self.best_auc
        if auc is not None:  # rows of one class say nothing about when to stop
            self.best_auc = max(auc, self.best_auc)
            self.evaluations_without_gain = 0 if is_best else self.evaluations_without_gain + 1
            progress.note(f"valid AUC {auc:.4f}" + (" (best)" if is_best else ""))
        self._save(metrics, is_best=is_best)
        patience = self.stage_config.patience
        is_stuck = patience is not None and self.evaluations_without_gain >= patience
        return is_stuck and self.model.network.scores_clicks

    def _evaluate(self) -> dict[str, Any]:
        """Validation metrics; none in a pre-training that leaves the label out."""
        network = self.model.network
        if not (network.scores_clicks or self.config.model.noise.label_in_set):
            return {}
        self._detach_pipeline()
        predictions = score_rows(self.model.dmp, self.valid_reader, self.runtime)
        metrics = measure(predictions, self.config, self.statistics, self.runtime)
        self._attach_pipeline()
        epoch = self.step / self.train_reader.batches_per_epoch
        shown = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self.log.write("evaluation", self.step, {"epoch": round(epoch, 4), "split": "valid", **shown})
        self._meter.reset()
        return shown

    def _detach_pipeline(self) -> None:
        """Gives the tables their own forward back, so that evaluation does not mix with steps."""
        if isinstance(self._pipeline, TrainPipelineSparseDist):
            self._pipeline.detach()
        self.model.dmp.eval()

    def _attach_pipeline(self) -> None:
        self.model.dmp.train()
        if isinstance(self._pipeline, TrainPipelineSparseDist):
            self._pipeline.attach(self.model.dmp)

    def _save(self, metrics: dict[str, Any], *, is_best: bool) -> None:
        plan = plan_as_json(self.model.plan)
        metadata = {"stage": self.stage, "epoch": self._epoch, "metrics": metrics, "plan": plan}
        self.checkpoints.save(self.step, self.model.dmp, self.optimizer, metadata)
        if is_best:
            self.checkpoints.mark_best(self.step, "auc", self.best_auc)
