"""A stage that was trained: its checkpoint, the model that scores by it, and its evaluation."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetegen_rec.config.data import Split
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import CLICK_STAGES, GENERATIVE_STAGES, RunConfig, Stage
from hetegen_rec.data.reader import Reader
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.evaluation.predictions import Predictions
from hetegen_rec.evaluation.results import (
    FieldReconstruction,
    StageEvaluation,
    read_evaluation,
    write_evaluation,
)
from hetegen_rec.inference.scorer import StrategyScorer
from hetegen_rec.training import stages
from hetegen_rec.training.checkpoint import CheckpointInfo, Checkpoints
from hetegen_rec.training.held_out import measure_reconstruction
from hetegen_rec.training.scoring import (
    measure,
    open_scorer,
    score_rows,
    score_rows_by,
    write_predictions,
)
from hetegen_rec.training.setup import ShardedModel, build_sharded, open_split


@dataclass(frozen=True)
class Choice:
    """A trained stage and its checkpoint, of which nothing was loaded yet."""

    config: RunConfig
    runtime: Runtime
    stage: Stage
    asked_for: str | None
    """The checkpoint that was named; None: the stage's best, or its newest."""
    statistics: Statistics
    checkpoints: Checkpoints
    checkpoint: CheckpointInfo

    @property
    def directory(self) -> Path:
        """The stage's directory."""
        return self.config.stage_dir(self.stage)

    def load(self) -> "TrainedStage":
        """Builds the model as the checkpoint has it, and the strategy of `inference`. A collective.

        Raises:
            ConfigError: the checkpoint does not fit the configuration, or the model cannot do the strategy.
        """
        model = build_sharded(self.config, self.stage, self.statistics, self.runtime)
        stages.load_checkpoint(self.config, self.checkpoints, self.checkpoint, self.statistics, model)
        return TrainedStage(
            self, model, open_scorer(self.config, self.stage, self.statistics, model, self.runtime)
        )


def choose(
    config: RunConfig, runtime: Runtime, stage: Stage | None = None, checkpoint: str | None = None
) -> Choice:
    """Finds the checkpoint to score with. A collective.

    Args:
        config: of the run.
        runtime: this process's view of the job.
        stage: default: the first trained click stage.
        checkpoint: a checkpoint's directory; default: the stage's best, or its newest; of `pretrain` its
            newest, which fine-tuning goes on from too.

    Raises:
        ConfigError: nothing is trained yet, or the directory is no checkpoint of this stage.
    """
    stage = stage or _first_trained(config)
    statistics = stages.prepare_data(config, runtime)
    checkpoints = stages.open_checkpoints(config, stage, statistics, runtime)
    if checkpoint:
        chosen: CheckpointInfo | None = checkpoints.check(checkpoint)
    else:
        chosen = checkpoints.latest() if stage == "pretrain" else checkpoints.best()
    if chosen is None:
        raise ConfigError(
            f"{checkpoints.store.location} holds no checkpoint; train that stage first: `hetegen {stage}`"
        )
    return Choice(config, runtime, stage, checkpoint, statistics, checkpoints, chosen)


@dataclass(frozen=True)
class TrainedStage:
    """A trained stage, ready to score."""

    choice: Choice
    model: ShardedModel
    scorer: StrategyScorer | None
    """The strategy of `inference.strategy`; None for `plain`."""

    def score(self, reader: Reader) -> Predictions:
        """This rank's share of a reader's rows, scored."""
        if self.scorer is None:
            return score_rows(self.model.dmp, reader, self.choice.runtime)
        return score_rows_by(self.scorer, reader, self.choice.runtime)

    def score_split(self, split: Split) -> Predictions:
        """This rank's share of a split, scored."""
        return self.score(self._open(split))

    def account(self) -> dict[str, Any]:
        """How the rows since the last account were scored, and at what cost. A collective."""
        if self.scorer is None:
            return {"strategy": "plain", "passes_per_row": 1.0, "time_multiple": 1.0}
        return self.scorer.account()

    def evaluate(self, scored: Iterable[Split]) -> None:
        """Scores splits, has a generative stage reconstruct the validation rows, and writes both beside
        the stage's checkpoints. A collective.
        """
        choice = self.choice
        results: dict[str, dict[str, Any]] = {}
        temperature = None
        for split in scored:
            if split == "train":
                continue
            predictions = self.score_split(split)
            metrics = measure(predictions, choice.config, choice.statistics, choice.runtime, temperature)
            results[split] = {**metrics, "inference": self.account()}
            if split == "valid":
                temperature = results[split]["temperature"]
            write_predictions(predictions, choice.directory / "predictions" / split, choice.runtime)
        evaluation: StageEvaluation = {
            "run": choice.config.name,
            "stage": choice.stage,
            "checkpoint": choice.checkpoint.location,
            "step": choice.checkpoint.step,
            "asked_for": _asked_for(choice.config, choice.asked_for),
            "splits": results,
        }
        if choice.stage in GENERATIVE_STAGES:
            evaluation["reconstruction"] = {"valid": self._reconstruct("valid")}
        if choice.runtime.is_main:
            write_evaluation(choice.directory, evaluation)

    def _reconstruct(self, split: Split) -> dict[str, FieldReconstruction]:
        """How well the noised cells of a split are predicted, by field."""
        choice = self.choice
        return measure_reconstruction(self.model, self._open(split), choice.config.features, choice.runtime)

    def _open(self, split: Split) -> Reader:
        choice = self.choice
        return open_split(choice.config, split, choice.statistics, choice.runtime, stage=choice.stage)


def is_evaluated(config: RunConfig, stage: Stage, runtime: Runtime) -> bool:
    """Whether a stage's evaluation is the one of its best checkpoint by this configuration, and no other
    one that `evaluate` has put in its place; training would have removed it. As rank 0 finds it.
    """
    found = read_evaluation(config.stage_dir(stage))
    return runtime.broadcast(found is not None and found.get("asked_for") == _asked_for(config, None))


def _asked_for(config: RunConfig, checkpoint: str | None) -> dict[str, Any]:
    """What decides about an evaluation besides the training."""
    return {"checkpoint": checkpoint, **config.model_dump(mode="json", include={"inference", "evaluation"})}


def _first_trained(config: RunConfig) -> Stage:
    for stage in CLICK_STAGES:
        if config.stage_dir(stage).exists():
            return stage
    raise ConfigError(
        f"{config.run_dir} holds no trained click stage; run `finetune`, `joint` or `scratch` first"
    )
