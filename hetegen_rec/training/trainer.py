"""The loop of one stage: steps, evaluations, early stop, checkpoints."""

import logging
import math
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from hetegen_rec.config.run import RunConfig, Stage, StageConfig
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.reader import BatchSource, Reader
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.heaps import give_back_memory
from hetegen_rec.distributed.planning import plan_as_json
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.schedule import LearningRates
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.distributed.watchdog import Watchdog
from hetegen_rec.models.network import Outputs
from hetegen_rec.training.agreement import Agreement, Wishes
from hetegen_rec.training.checkpoint_writer import Best, CheckpointWriter
from hetegen_rec.training.guard import NumericalGuard
from hetegen_rec.training.logs import RunLog
from hetegen_rec.training.meter import Meter
from hetegen_rec.training.progress import StageProgress
from hetegen_rec.training.scoring import measure, score_rows
from hetegen_rec.training.setup import ShardedModel, make_pipeline, rows_per_step
from hetegen_rec.training.state import StageState

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one stage, from wherever its state says.

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
    train_reader: BatchSource
    valid_reader: Reader

    # what stays
    writer: CheckpointWriter
    log: RunLog

    # what may end it early
    guard: NumericalGuard
    stop: StopRequest
    watchdog: Watchdog

    # where it stands
    state: StageState

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        model: ShardedModel,
        optimizer: KeyedOptimizer,
        statistics: Statistics,
        readers: tuple[BatchSource, Reader],
        state: StageState,
        writer: CheckpointWriter,
        log: RunLog,
        stop: StopRequest,
        watchdog: Watchdog,
        runtime: Runtime,
    ) -> None:
        self.config, self.stage, self.model = config, stage, model
        self.optimizer, self.runtime, self.statistics = optimizer, runtime, statistics
        self.train_reader, self.valid_reader = readers
        self.state, self.writer, self.log = state, writer, log
        self.stop, self.watchdog = stop, watchdog
        self.guard = NumericalGuard(model.network, config.features, config.train, runtime)
        self.guard.skipped_steps = state.skipped_steps
        budget = self.stage_config
        self.rates = LearningRates(optimizer, self.total_steps, budget.warmup, budget.decay, state.step)
        self._pipeline = make_pipeline(model.dmp, self.guard.gated(optimizer), config.train, runtime.device)
        self._meter = Meter()
        self._rows_per_step = rows_per_step(config, runtime)
        self._agreement = Agreement(runtime)
        self._batches: Iterator[Batch] | None = None
        self._segment_end = 0
        self._num_skips_counted = 0
        self._saved_step = state.step
        self._saved_at = self._timed_at = time.monotonic()

    @property
    def stage_config(self) -> StageConfig:
        """Budget and optimizers of this stage."""
        return self.config.stage(self.stage)

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage if it is not stopped early."""
        steps = self.stage_config.epochs * self.train_reader.batches_per_epoch
        return min(steps, self.config.train.max_steps or steps)

    def run(self) -> bool:
        """Trains to the end of the budget or until the validation AUC stops growing.

        Returns:
            Whether the stage is finished. It is not where the process was asked to stop; its newest
            checkpoint then holds everything that was trained.

        Raises:
            NonFiniteError: a loss or gradient was not finite, and that is not to be skipped.
            CheckpointError: too many checkpoints could not be written.
            DataError: rows could not be read.
        """
        self.model.dmp.train()
        title = f"{self.config.name} {self.stage}"
        with (
            self.watchdog.watching(),
            StageProgress(title, self.total_steps, self.state.step, enabled=self.runtime.is_main) as progress,
        ):
            is_finished = self._run(progress)
            with self.watchdog.paused("finishing the last checkpoint"):
                self.writer.finish()
        logger.info("%s: %d steps done", title, self.state.step)
        return is_finished

    def _run(self, progress: StageProgress) -> bool:
        try:
            while True:
                if self.state.evaluation_due:
                    self._finish_segment(progress)
                if self._is_over():
                    return True
                self.train_segment(progress)
        except _Stopped:
            if self._saved_step != self.state.step:
                self._save()
            return False

    def _is_over(self) -> bool:
        """Whether the budget is used up, or the validation AUC stopped growing."""
        state, budget = self.state, self.stage_config
        is_last_epoch = state.cursor.epoch + 1 >= budget.epochs
        if is_last_epoch and not self.train_reader.batches_left(state.cursor):
            return True
        if self.config.train.max_steps is not None and state.step >= self.config.train.max_steps:
            return True
        is_stuck = budget.patience is not None and state.evaluations_without_gain >= budget.patience
        return is_stuck and self.model.network.scores_clicks

    def train_segment(self, progress: StageProgress) -> None:
        """Trains up to the next evaluation, which is left to the caller.

        Raises:
            _Stopped: on all ranks after the same step.
        """
        batches = islice(self._open_batches(), self._batches_to_evaluation())
        self._pipeline.reset()  # one that was drained would take nothing from a new iterator
        while True:
            self._seed_dropout()
            try:
                outputs: Outputs = self._pipeline.progress(batches)
            except StopIteration:
                return
            self._take_note(outputs, progress)
            del outputs  # or it would be held while the next step makes its own
            self._act(self._agreement.share(self._wishes()))

    def _open_batches(self) -> Iterator[Batch]:
        """The batches from the cursor on; one iterator serves all segments of an epoch."""
        state = self.state
        if not self.train_reader.batches_left(state.cursor):
            state.cursor, state.batches = Cursor(state.cursor.epoch + 1), 0
            self._batches = None
        if self._batches is None:
            self._batches = self.train_reader.epoch(state.cursor)
        return self._batches

    def _batches_to_evaluation(self) -> int:
        state, reader = self.state, self.train_reader
        segment = math.ceil(reader.batches_per_epoch / self.config.train.evaluations_per_epoch)
        count = min(segment - state.batches % segment, reader.batches_left(state.cursor))
        if self.config.train.max_steps is not None:
            count = min(count, self.config.train.max_steps - state.step)
        self._segment_end = state.batches + count
        return count

    def _seed_dropout(self) -> None:
        """Makes dropout a function of seed, step and rank, so that a resumed run draws the same."""
        source = np.random.SeedSequence((self.config.seed, self.state.step, self.runtime.rank))
        seed = int(source.generate_state(1, np.uint64)[0])
        if self.runtime.device.type == "cuda":
            torch.cuda.default_generators[self.runtime.device.index].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _take_note(self, outputs: Outputs, progress: StageProgress) -> None:
        state = self.state
        state.step += 1
        state.batches += 1
        state.cursor = outputs.batch.cursor
        state.evaluation_due = state.batches == self._segment_end
        self.rates.advance()
        if self.guard.end_step(state.step):
            self._meter.add(outputs, self._rows_per_step)
        self.watchdog.beat(f"step {state.step + 1} of {self.stage}")
        progress.advance()
        if state.step % self.config.train.log_every == 0 or state.step == self.total_steps:
            self._log_window(progress)

    def _wishes(self) -> Wishes:
        minutes = self.config.checkpoints.every_minutes
        is_late = minutes is not None and time.monotonic() - self._saved_at >= 60.0 * minutes
        return Wishes(
            stop=self.stop.requested is not None,
            save=is_late and self.runtime.is_main,
            report=bool(self.guard.flag),
        )

    def _act(self, wishes: Wishes) -> None:
        """Does what the ranks agreed on after the step before, and what is due after this one."""
        every = self.config.checkpoints.every_steps
        is_due = every is not None and self.state.step % every == 0
        if not (wishes or is_due or self.state.evaluation_due):
            return
        # No checkpoint and no evaluation may see what the step just trained has broken.
        self.guard.settle()
        wishes = wishes | self._agreement.reach(self._wishes())
        if wishes.report:
            self.guard.report()
            self.state.skipped_steps = self.guard.skipped_steps
        if wishes.stop:
            raise _Stopped
        if (is_due or wishes.save) and not self.state.evaluation_due:
            self._save()

    def _log_window(self, progress: StageProgress) -> None:
        if self._meter.is_empty:
            return
        network, step = self.model.network, self.state.step
        values = self._meter.read(network.difficulty, network.fields)
        self._meter.reset()
        epoch = step / self.train_reader.batches_per_epoch
        rows = step * self._rows_per_step
        values = {"epoch": round(epoch, 4), "rows": rows, **values}
        values["learning_rate"] = self.rates.by_name()
        self.log.write("train", step, values)
        progress.show(step, values["samples_per_second"], values["loss"])

    def _finish_segment(self, progress: StageProgress) -> None:
        """Evaluates and saves."""
        metrics = self._evaluate()
        state, auc = self.state, metrics.get("auc")
        is_best = auc is not None and auc > state.best_auc
        if auc is not None:  # rows of one class say nothing about when to stop
            state.best_auc = max(auc, state.best_auc)
            state.evaluations_without_gain = 0 if is_best else state.evaluations_without_gain + 1
            progress.note(f"valid AUC {auc:.4f}" + (" (best)" if is_best else ""))
        state.evaluation_due = False
        self._save(metrics, Best("auc", state.best_auc) if is_best else None)
        give_back_memory()  # what the evaluation took is not needed until the next one

    def _count_skipped_rows(self) -> None:
        """Adds what the readers of all ranks have left out since the last time. A collective."""
        skipped = self.train_reader.skipped
        new = sum(rows.num_rows for rows in skipped[self._num_skips_counted :])
        self._num_skips_counted = len(skipped)
        total = sum(self.runtime.gather(new))
        if total:
            self.state.skipped_rows += total
            if self.runtime.is_main:
                logger.warning(
                    "%d training rows could not be read and were left out, %d so far",
                    total,
                    self.state.skipped_rows,
                )

    def _evaluate(self) -> dict[str, Any]:
        """Validation metrics; none in a pre-training that leaves the label out.

        Raises:
            _Stopped: on all ranks after the same batch.
        """
        network = self.model.network
        if not (network.scores_clicks or self.config.model.label_in_set):
            return {}
        self._detach_pipeline()
        predictions = score_rows(self.model.dmp, self.valid_reader, self.runtime, self._between_batches)
        self._agreement.settle()
        with self.watchdog.paused("computing the metrics"):
            metrics = measure(predictions, self.config, self.statistics, self.runtime)
        self._attach_pipeline()
        epoch = self.state.step / self.train_reader.batches_per_epoch
        shown = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self.log.write("evaluation", self.state.step, {"epoch": round(epoch, 4), "split": "valid", **shown})
        self._meter.reset()
        return shown

    def _between_batches(self) -> None:
        self.watchdog.beat(f"the evaluation after step {self.state.step} of {self.stage}")
        if self._agreement.share(self._wishes()).stop:
            self._agreement.settle()
            raise _Stopped

    def _detach_pipeline(self) -> None:
        """Gives the tables their own forward back, so that evaluation does not mix with steps."""
        if isinstance(self._pipeline, TrainPipelineSparseDist):
            self._pipeline.detach()
        self.model.dmp.eval()

    def _attach_pipeline(self) -> None:
        self.model.dmp.train()
        if isinstance(self._pipeline, TrainPipelineSparseDist):
            self._pipeline.attach(self.model.dmp)

    def _save(self, metrics: dict[str, Any] | None = None, best: Best | None = None) -> None:
        """Begins a checkpoint of everything trained so far."""
        state, now = self.state, time.monotonic()
        state.seconds += now - self._timed_at
        self._saved_at = self._timed_at = now
        self._count_skipped_rows()
        metadata = {
            "stage": self.stage,
            "state": state.as_json(),
            "rows": {
                "train": {"source": self.statistics.fingerprint, "num_rows": self.train_reader.num_rows}
            },
            "metrics": metrics or {},
            "plan": plan_as_json(self.model.plan),
            "config": self.config.model_dump(mode="json"),
        }
        with self.watchdog.paused(f"saving step {state.step} of {self.stage}"):
            if state.step == self._saved_step:  # an evaluation that was due when the stage was resumed
                self.writer.relabel(state.step, metadata, best)
            else:
                self.writer.save(state.step, self.model.dmp, self.optimizer, metadata, best)
        self._saved_step = state.step


class _Stopped(Exception):
    """All ranks agreed to stop."""
