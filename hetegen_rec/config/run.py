"""Everything that defines a run, one section a component. Defaults are meant to be usable."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from hetegen_rec.config.backbone import BackboneConfig
from hetegen_rec.config.balance import BalanceConfig
from hetegen_rec.config.data import DataConfig, Split
from hetegen_rec.config.errors import Section
from hetegen_rec.config.export import ExportConfig
from hetegen_rec.config.incremental import IncrementalConfig, StaleIdsConfig
from hetegen_rec.config.inference import InferenceConfig
from hetegen_rec.config.objective import ObjectiveConfig
from hetegen_rec.config.plan import PlanConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.config.values import Probability, Widths, as_tuple

Stage: TypeAlias = Literal["pretrain", "finetune", "joint", "scratch"]
Frequency: TypeAlias = Literal["log_prior", "log_rate"]
"""What a batch may tell of how often its ids come; see `Batch`."""
GENERATIVE_STAGES: tuple[Stage, ...] = ("pretrain", "joint")
"""Stages that reconstruct noised rows."""
CLICK_STAGES: tuple[Stage, ...] = ("finetune", "joint", "scratch")
"""Stages that train the click head."""
AttentionGuidance: TypeAlias = Literal["none", "query", "query_key", "key_bias", "residual"]
ShardingKind: TypeAlias = Literal[
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]
TableOptimizer: TypeAlias = Literal[
    "rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb"
]
CommunicationPrecision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]


class AttentionConfig(Section):
    """Self-attention of the denoiser and how difficulty guides it (docs/method.md section 6)."""

    num_heads: PositiveInt = 2
    guidance: AttentionGuidance = "residual"
    """Where the gain g_f = sqrt(w_f) acts: `query`, `query_key`, `key_bias` (s_j - mean s added to
    the logits), `residual` (scales the attention branch), or `none`."""


class DenoiserConfig(Section):
    """The transformer that sees the (corrupted) tokens of a row."""

    num_layers: NonNegativeInt = 2
    feedforward_multiplier: PositiveInt = 2
    dropout: Probability = 0.0
    attention: AttentionConfig = AttentionConfig()


class NoiseConfig(Section):
    """The corruption process (docs/method.md section 3)."""

    t_min: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Smallest noise level; t is drawn from U(t_min, 1), stratified over the batch."""
    kind: Literal["mask", "marginal"] = "mask"
    """`mask`: absorbing [MASK] vectors; `marginal`: full-softmax fields may instead take the value
    of another row."""
    marginal_fraction: Probability = 0.2
    """`marginal` only: share of the noised cells that take another row's value."""
    whole_sequence: Probability = 0.2
    """Probability that a sequence is masked as a whole, so that it is learnt from its context."""
    label_in_set: bool = True
    """Diffuse the label too, as one more element of the set."""

    @model_validator(mode="after")
    def _check(self) -> "NoiseConfig":
        if self.kind != "marginal":
            self._refuse_unused(f"with `kind: {self.kind}`", "marginal_fraction")
        return self


class ReconstructionConfig(Section):
    """Heads that predict the masked cells (docs/method.md section 4)."""

    full_softmax_max: NonNegativeInt = 1024
    """Vocabularies up to this size get a full softmax, larger ones a sampled softmax."""
    num_candidates: PositiveInt = 1024
    """Most in-batch candidates of a sampled softmax, per field and rank."""
    temperature: PositiveFloat = 0.07
    """Initial temperature of the cosine logits; learnt per field."""


class CTRConfig(Section):
    """The head that scores a row."""

    head: Literal["label_token", "mlp"] = "mlp"
    """`label_token` reads the denoiser's label token; `mlp` sees all tokens and a first-order term."""
    hidden: Widths = (256, 128)
    dropout: Probability = 0.0


class ModelConfig(Section):
    """The network."""

    dim: PositiveInt = 32
    """Width D of every token."""
    init_std: PositiveFloat = 0.01
    """Standard deviation of the embedding tables at the start."""
    denoiser: DenoiserConfig = DenoiserConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    noise: NoiseConfig = NoiseConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    balance: BalanceConfig = BalanceConfig()
    ctr: CTRConfig = CTRConfig()
    backbone: BackboneConfig = BackboneConfig()

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        key, heads = "denoiser.attention.num_heads", self.denoiser.attention.num_heads
        if self.backbone.name == "autoint":
            key, heads = "backbone.num_heads", self.backbone.num_heads
        if self.dim % heads or self.dim % 4:
            raise ValueError(f"`dim: {self.dim}` must be a multiple of 4 and of `{key}: {heads}`")
        if self.backbone.generate and self.backbone.name == "hetegen" and self.ctr.head != "mlp":
            raise ValueError(
                f"`backbone.generate: true` has no effect with `ctr.head: {self.ctr.head}`, which reads no "
                "fields; remove it, or take `ctr.head: mlp`"
            )
        if self.balance.form in ("aligned", "conditional") and not self.objective.knows_noise_levels:
            raise ValueError(
                f"`balance.form: {self.balance.form}` needs the noise levels and the label that only "
                f"`objective.name: diffusion` has, not `{self.objective.name}`; take another form"
            )
        return self

    @property
    def label_in_set(self) -> bool:
        """Whether the generative stages predict the label, as one more element of the row."""
        return self.objective.knows_noise_levels and self.noise.label_in_set


class StageConfig(Section):
    """Budget, optimizers and regularisation of one stage."""

    epochs: PositiveInt = 1
    start_from: str | None = None
    """Directory or URL of the checkpoint (`.../step-N`) to start from, such as one of an earlier run on older
    data: weights, and where it is one of the same stage the optimizers' state. Default: `finetune`
    takes the weights of the newest checkpoint of `pretrain`, the other stages start from nothing."""
    table_lr: PositiveFloat = 0.05
    """Learning rate of the embedding tables."""
    table_eps: PositiveFloat = 1e-8
    """Added to the root of Adagrad's sum of squares. Rows with gradients below it move little: around
    1e-3 (the size of gradients of a mean over a batch) it keeps rarely seen ids near their start."""
    dense_lr: PositiveFloat = 1e-3
    """Learning rate of everything else (AdamW)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of the dense weights; never of the difficulty scalars."""
    warmup: Probability = 0.02
    """Share of the steps over which both learning rates rise linearly from zero."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How both learning rates fall after the warm-up; `linear` and `cosine` end at zero."""
    table_l2: NonNegativeFloat = 0.0
    """Strength of the unbiased estimate of lambda/2 ||E||^2 over whole tables, computed on
    looked-up rows only (docs/method.md section 10)."""
    oov_dropout: NonNegativeFloat = 0.0
    """a: an id seen n times in training is replaced by out-of-vocabulary with probability a/(a+n)."""
    max_grad_norm: PositiveFloat | None = 10.0
    """Clip the dense gradients to this norm, and table gradients to this value; null for none."""
    patience: PositiveInt | None = None
    """Click stages stop after this many evaluations without a better validation AUC; null runs all
    epochs. Either way `evaluate` and `predict` take the checkpoint of the best evaluation."""
    stale_ids: StaleIdsConfig | None = None
    """Holds the table rows of ids that were not seen lately near where they are; `incremental` sets it."""


class StagesConfig(Section):
    """The stages that a run can go through."""

    pretrain: StageConfig = StageConfig(epochs=2)
    finetune: StageConfig = StageConfig(epochs=3, patience=1)
    joint: StageConfig = StageConfig(epochs=5, patience=1)
    scratch: StageConfig = StageConfig(epochs=5, patience=1)

    @model_validator(mode="after")
    def _check(self) -> "StagesConfig":
        if self.pretrain.patience is not None:
            raise ValueError(
                f"`pretrain.patience: {self.pretrain.patience}` has no effect: only click stages stop early, "
                "by their validation AUC; remove it, or set fewer `pretrain.epochs`"
            )
        return self


class TrainConfig(Section):
    """The loop, the same for every stage."""

    batch_size: PositiveInt = 1024
    """Rows of one step over all ranks; must be divisible by the number of ranks."""
    eval_batch_size: PositiveInt = 4096
    """Rows of one evaluation batch over all ranks."""
    max_steps: PositiveInt | None = None
    """Stop a stage after this many steps, whatever its epochs."""
    evaluations_per_epoch: PositiveInt = 1
    log_every: PositiveInt = 20
    """Steps between two lines of log.jsonl and TensorBoard."""
    pipeline: Literal["sparse_dist", "base"] = "sparse_dist"
    """`sparse_dist` overlaps the exchange of ids with the step before."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` autocasts the dense part."""
    table_optimizer: TableOptimizer = "rowwise_adagrad"
    """Fused into the backward pass. CPU kernels know `rowwise_adagrad`, `adagrad` and `sgd`."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What a step whose loss or gradient is NaN, infinite or overflowing does: `stop` ends training with an
    error, `skip` leaves the step's update out on every rank and warns."""
    max_skipped_steps: PositiveInt = 10
    """`skip` only: one more such step of a stage ends training."""
    tensorboard: bool = True
    probe_gradients_every: PositiveInt | None = None
    """Generative stages: steps between two looks at the gradient of every field's loss on shared weights, for
    the log; null for none, at no cost."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.on_non_finite != "skip":
            self._refuse_unused(f"with `on_non_finite: {self.on_non_finite}`", "max_skipped_steps")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written, where, and which of them stay (docs/operations.md).

    One is written after every evaluation and at the end of a stage; the two cadences add others in between.
    """

    directory: str | None = None
    """Where they go, each stage in a directory of its own: a path, or a URL that fsspec knows, such as
    `s3://bucket/run-7`. Default: in the stage's part of `run_dir`."""
    every_steps: PositiveInt | None = None
    """Steps between two checkpoints; null for none."""
    every_minutes: PositiveFloat | None = 30.0
    """Minutes between two checkpoints, by the clock of rank 0; null for none."""
    keep: PositiveInt = 2
    """Newest checkpoints that stay, besides the best."""
    failed_writes_allowed: NonNegativeInt = 2
    """Writes in a row that may fail, each with a warning, before training ends with an error."""


class TableConfig(Section):
    """What the planner may do with one table."""

    sharding: Annotated[tuple[ShardingKind, ...], BeforeValidator(as_tuple)] = ()
    """Sharding types to choose from; empty leaves the choice (never `data_parallel`)."""
    kernel: Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"] | None = None
    """Compute kernel; null leaves the choice."""


class DistributedConfig(Section):
    """Sharding and communication."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    tables: dict[str, TableConfig] = {}
    """Constraints per table, by the name of the field that owns it; `default` is for all others."""
    host_memory_gb: PositiveFloat | None = None
    """Memory for tables per host, shared by its ranks; default: 80 % of what the machine has."""
    device_memory_gb: PositiveFloat | None = None
    """CUDA memory for tables per device; default: what the device has."""
    forward_precision: CommunicationPrecision = "fp32"
    """Precision in which embeddings travel between ranks."""
    backward_precision: CommunicationPrecision = "fp32"
    """Precision in which their gradients travel."""
    timeout_seconds: PositiveInt = 600
    """A rank that makes no progress for so long ends the job, with the stack traces of every rank."""


class EvaluationConfig(Section):
    """What `evaluate` reports."""

    cold_user_rows: PositiveInt = 5
    """Users with 1 to this many training rows count as nearly cold."""
    head_share: Probability = 0.8
    """Items outside the head that covers this share of the training rows are the long tail."""
    calibration_bins: PositiveInt = 10


class RunConfig(Section):
    """One run, from raw data to report: the content of one YAML file."""

    name: str
    """Name of the run in logs and reports."""
    run_dir: str
    """Directory of everything this run writes: checkpoints, logs, scores, report."""
    seed: NonNegativeInt = 0
    data: DataConfig
    features: Schema
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    stages: StagesConfig = StagesConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    inference: InferenceConfig = InferenceConfig()
    incremental: IncrementalConfig = IncrementalConfig()
    export: ExportConfig = ExportConfig()
    plan: PlanConfig = PlanConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        owners = {field.name for field in self.features.table_owners} | {"default"}
        for name in self.distributed.tables:
            if name not in owners:
                raise ValueError(
                    f"`distributed.tables.{name}` is not a table; tables are: {', '.join(sorted(owners))}"
                )
        for name in self.export.shared_fields:
            if name not in self.features.field_names:
                raise ValueError(
                    f"`export.shared_fields: {name}` is not a field; fields are: "
                    f"{', '.join(self.features.field_names)}"
                )
        lanes = self.data.lanes
        if lanes and self.train.batch_size % lanes:
            raise ValueError(
                f"`train.batch_size: {self.train.batch_size}` must be divisible by `data.lanes: {lanes}`"
            )
        self.plan.check_schema(self.features)
        self.model.backbone.check_schema(self.features)
        self.model.objective.check_schema(self.features)
        if self.model.balance.form == "aligned" and not self.model.label_in_set:
            raise ValueError(
                "`model.balance.form: aligned` compares with the click gradient and needs "
                "`model.noise.label_in_set: true`"
            )
        return self

    def stage(self, stage: Stage) -> StageConfig:
        """Budget and optimizers of one stage."""
        config: StageConfig = getattr(self.stages, stage)
        return config

    def frequencies(self, stage: Stage) -> frozenset[Frequency]:
        """What the losses of a stage read: of candidates when they reconstruct, of table rows for L2."""
        read: set[Frequency] = set()
        if stage in GENERATIVE_STAGES:
            read.add("log_prior")
        if self.stage(stage).table_l2:
            read.add("log_rate")
        return frozenset(read)

    def stage_dir(self, stage: Stage) -> Path:
        """Directory of one stage's checkpoints and logs."""
        return Path(self.run_dir) / stage

    def checkpoints_dir(self, stage: Stage) -> str:
        """Directory or URL of one stage's checkpoints."""
        if self.checkpoints.directory is None:
            return str(self.stage_dir(stage) / "checkpoints")
        return f"{self.checkpoints.directory.rstrip('/')}/{stage}"

    def splits(self) -> Iterator[Split]:
        """The splits that have files, in order."""
        names: tuple[Split, ...] = ("train", "valid", "test")
        return (split for split in names if self.data.raw_paths(split))
