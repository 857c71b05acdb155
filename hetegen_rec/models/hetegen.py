"""The assembly: sharded tables in front, the denoising network behind, one loss per stage."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import GENERATIVE_STAGES, ModelConfig, Stage, StageConfig, TrainConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.models.attention import Guidance
from hetegen_rec.models.backbones.network import BackboneNetwork, NamedBackbone
from hetegen_rec.models.balancing import make_difficulty
from hetegen_rec.models.corruption import LABEL_MASK_ID, Corrupted, Diffusion, RowNoise, uniform_of_batch
from hetegen_rec.models.ctr import LabelHead, MLPHead
from hetegen_rec.models.denoiser import Denoiser
from hetegen_rec.models.difficulty import FieldLosses, Probe
from hetegen_rec.models.embedding import build_tables, table_shapes
from hetegen_rec.models.network import ClickNetwork, Outputs
from hetegen_rec.models.objectives.factory import make_objective
from hetegen_rec.models.reconstruction import RowLosses
from hetegen_rec.models.reduction import mean_over_ranks, num_ranks, sum_over_ranks

_LEAST_SAY = 1e-6
"""Weight of a rank without real rows, so that a step of which every row was skipped divides by no zero."""


class HeteGen(nn.Module):
    """A CTR model: tables and network, the only module that sees the sharded tables.

    Its forward is one line because the sparse pipeline traces it symbolically.
    """

    def __init__(self, ebc: nn.Module, network: ClickNetwork) -> None:
        super().__init__()
        self.ebc = ebc
        self.network = network

    def forward(self, batch: Batch) -> tuple[Tensor, Outputs]:
        """Returns the loss of this rank's rows and what to show of it."""
        return self.network(self.ebc(batch.kjt), batch)


class HeteGenNetwork(ClickNetwork):
    """Corruption, denoiser, heads and difficulty: everything that is replicated.

    The objective (`model.objective`) decides which corruption and which heads.

    Stages (docs/method.md section 7): `pretrain` reconstructs noised rows, the label among them; `finetune`
    and `scratch` score clean rows; `joint` does both on one lookup.

    A `backbone` in the place of the click head scores the looked-up rows alone. The denoiser then shapes the
    tables in the generative stages, and takes no part in scoring.
    """

    column_of_element: Tensor
    probe_every: int | None = None
    """Steps between two probes of the gradients for the log, besides those of the form of balancing."""

    def __init__(
        self,
        schema: Schema,
        statistics: Statistics,
        model: ModelConfig,
        stage: Stage,
        *,
        table_l2: float = 0.0,
        oov_dropout: float = 0.0,
        autocast: bool = False,
    ) -> None:
        super().__init__(schema, statistics, model, stage, table_l2=table_l2, autocast=autocast)
        self.reconstruction, self.corruption = make_objective(schema, statistics, model, oov_dropout)
        self.fields = self.reconstruction.fields
        self.denoiser = Denoiser(len(schema.tokens), model.dim, model.denoiser)
        self.difficulty = make_difficulty(len(self.fields), model.balance)
        self.label_head = LabelHead(model.dim)
        self.backbone = self.ctr_head = None
        if model.backbone.name != "hetegen":
            self.backbone = NamedBackbone(schema, model.dim, model.backbone)
        elif model.ctr.head == "mlp":
            self.ctr_head = MLPHead(schema, model.dim, model.ctr, generate=model.backbone.generate)
        self.has_padding = any(field.kind == "sequence" for field in schema.fields)
        self._index_fields(schema)
        self._freeze_unused()

    def _index_fields(self, schema: Schema) -> None:
        """Maps each element of the set to its column of the difficulty; the last is "none"."""
        none = len(self.fields)
        columns = {name: column for column, name in enumerate(self.fields)}
        owners = [columns.get(token.field, none) for token in schema.tokens] + [none]
        self.register_buffer("column_of_element", torch.tensor(owners), persistent=False)

    @property
    def is_generative(self) -> bool:
        """Whether this stage reconstructs noised rows."""
        return self.stage in GENERATIVE_STAGES

    def _freeze_unused(self) -> None:
        """What a stage does not train gets no gradient, no decay and no traffic."""
        scorer = self.backbone or self.ctr_head
        if not self.is_generative:
            _freeze(self.reconstruction, self.corruption, self.difficulty)
            if self.backbone is not None:
                _freeze(self.denoiser)
        if not self.scores_clicks and scorer is not None:
            _freeze(scorer)
        diffuses_label = self.is_generative and self.config.label_in_set
        reads_label = self.scores_clicks and scorer is None
        if not (diffuses_label or reads_label):
            _freeze(self.label_head)

    def score(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Click logits [B] of rows taken as clean, the label masked.

        Args:
            tokens: [B, T, D], looked up or put in their place.
            present: [B, T] bool, False for positions that do not exist.
        """
        if self.scores_clicks and self.backbone is not None:
            logits: Tensor = self.backbone(tokens, present)
            return logits
        hidden = self.denoise(tokens, present, tokens.new_zeros(tokens.shape[0], dtype=torch.float32))
        if self.ctr_head is None or not self.scores_clicks:
            return self.label_head(hidden).float()
        return self.ctr_head(tokens, hidden, present).float()

    def denoise(self, tokens: Tensor, present: Tensor, noise_level: Tensor) -> Tensor:
        """Hidden vectors [B, T + 1, D] of rows [B, T, D] at noise levels [B], the label masked."""
        masked = torch.full((tokens.shape[0],), LABEL_MASK_ID, device=tokens.device)
        return self.denoiser(tokens, masked, noise_level, self.guidance(), self._padding(present))

    @property
    def unread(self) -> Sequence[str]:
        """From scratch, heads and difficulty stay as they begin, which is neutral."""
        return ("reconstruction", "difficulty") if self.stage == "scratch" else ()

    @property
    def scorers(self) -> Sequence[str]:
        """The click head, or the backbone in its place."""
        return ("ctr_head", "backbone")

    @property
    def mask_tokens(self) -> Tensor | None:
        """[T, D]: the [MASK] vector of every token; None if what scores a row has not learnt them."""
        return None if self.backbone is not None else self.denoiser_masks

    @property
    def denoiser_masks(self) -> Tensor | None:
        """[T, D]: the [MASK] vector of every token; None if no stage up to this one has trained them."""
        return None if self.stage == "scratch" else self.corruption.mask_tokens

    def guidance(self) -> Guidance:
        """Gains and key biases over the T + 1 elements; the label and unscored fields are neutral."""
        gain, bias = self.difficulty.gain(), self.difficulty.key_bias()
        gain = torch.cat([gain, gain.new_ones(1)])
        bias = torch.cat([bias, bias.new_zeros(1)])
        return Guidance(gain[self.column_of_element], bias[self.column_of_element])

    def _padding(self, present: Tensor) -> Tensor | None:
        return functional.pad(~present, (0, 1)) if self.has_padding else None

    def generative_terms(
        self, tokens: Tensor, present: Tensor, batch: Batch
    ) -> tuple[dict[str, Tensor], FieldLosses | None]:
        """The balanced reconstruction of the noised rows, and its per-field losses."""
        if not self.is_generative:
            return {}, None
        hidden, corrupted, rows = self.reconstruct(tokens, present, batch)
        local, fields = self._reduce(rows, corrupted)
        label = self._label_loss(hidden, batch, corrupted) if self.config.label_in_set else None
        for_form = self.difficulty.wants_probe and _is_one_in(self.config.balance.probe_every, batch)
        if for_form or (self.probe_every is not None and _is_one_in(self.probe_every, batch)):
            fields.probe = self._probe(local, fields, label)
        self.difficulty.observe(fields, fields.probe if for_form else None)
        weighted = self.difficulty.weights() * self._relative_to_form(local, fields)
        num_parts = 1 if self.difficulty.uses_cross_entropy else len(self.fields)
        terms = {
            "generative": weighted.sum() / num_parts,
            "calibration": self.difficulty.calibration(fields),
        }
        if label is not None:
            terms["label"] = label
        return terms, fields

    def reconstruct(
        self, tokens: Tensor, present: Tensor, batch: Batch
    ) -> tuple[Tensor, Corrupted, RowLosses]:
        """Corrupts clean tokens [B, T, D]; returns hidden vectors [B, T + 1, D], their source, and losses."""
        noise = RowNoise(batch, tokens.shape[1])
        corrupted = self.corruption(tokens, batch, noise)
        hidden = self.denoiser(
            corrupted.tokens,
            corrupted.label_ids,
            corrupted.noise_level,
            self.guidance(),
            self._padding(present),
        )
        return hidden, corrupted, self.reconstruction(hidden, tokens, batch, corrupted, noise)

    def _reduce(self, rows: RowLosses, corrupted: Corrupted) -> tuple[Tensor, FieldLosses]:
        """This rank's share [F, K] of the global mean losses (with gradient), and their values.

        Summed over ranks and divided by their number, as gradients are, the shares give the mean
        over the targets of the global batch, however they are spread.
        """
        num_bins = self.difficulty.num_bins
        bins = _one_hot_bins(corrupted.noise_level, num_bins)  # [B, K]
        # Not as matrix products, which autocast would round to bf16.
        sums = (rows.loss.float()[..., None] * bins[:, None]).sum(0)  # [F, K]
        counts = (rows.is_target[..., None] * bins[:, None]).sum(0)
        # A rank's chance level counts by its targets, and hardly at all where it has none.
        say = counts.sum(1, keepdim=True) + _LEAST_SAY
        levels = torch.stack([rows.chance, rows.baseline, torch.ones_like(rows.chance)], 1) * say
        packed = torch.cat([sums.detach(), counts, levels], 1)
        total = sum_over_ranks(packed)
        count = total[:, num_bins : 2 * num_bins]
        fields = FieldLosses(
            cross_entropy=total[:, :num_bins] / count.clamp(min=1.0),
            share=count / count.sum(1, keepdim=True).clamp(min=1.0),
            chance=total[:, -3] / total[:, -1],
            baseline=total[:, -2] / total[:, -1],
        )
        share = sums * num_ranks() / count.sum(1, keepdim=True).clamp(min=1.0)
        return share, fields

    def _relative_to_form(self, local: Tensor, fields: FieldLosses) -> Tensor:
        return local if self.difficulty.uses_cross_entropy else local / fields.chance[:, None]

    def _label_loss(self, hidden: Tensor, batch: Batch, corrupted: Corrupted) -> Tensor:
        """Mean cross-entropy over the masked labels of the global batch (this rank's share)."""
        logits = self.label_head(hidden).float()
        masked = ((corrupted.label_ids == LABEL_MASK_ID) & (batch.row_ids >= 0)).float()
        loss = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        count = sum_over_ranks(masked.sum())
        return (loss * masked).sum() * num_ranks() / count.clamp(min=1.0)

    def _probe(self, local: Tensor, fields: FieldLosses, label: Tensor | None) -> Probe:
        """Gradients of every field's loss and of the label loss on the last shared weight."""
        weight = self.denoiser.shared_weight
        losses = [*(local.sum(1) / fields.chance)]
        if label is not None:
            losses.append(label)
        rows = [torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten() for loss in losses]
        gradients = mean_over_ranks(torch.stack(rows).float())
        of_fields = gradients[: len(self.fields)]
        norms = of_fields.norm(dim=1)
        if label is None:
            return Probe(norms, alignment=None)
        return Probe(norms, functional.cosine_similarity(of_fields, gradients[-1:], dim=1))


def build_model(
    schema: Schema,
    statistics: Statistics,
    model: ModelConfig,
    train: TrainConfig,
    stage: Stage,
    stage_config: StageConfig,
    seed: int,
) -> HeteGen:
    """Builds the model of one stage: tables on meta, the network seeded alike on every rank.

    Raises:
        ConfigError: the stage cannot train this model on these data.
    """
    torch.manual_seed(seed)
    table_l2, autocast = stage_config.table_l2, train.precision == "bf16"
    network: ClickNetwork
    if stage == "scratch" and model.backbone.name != "hetegen":
        network = BackboneNetwork(schema, statistics, model, stage, table_l2=table_l2, autocast=autocast)
    else:
        network = HeteGenNetwork(
            schema,
            statistics,
            model,
            stage,
            table_l2=table_l2,
            oov_dropout=stage_config.oov_dropout,
            autocast=autocast,
        )
        network.probe_every = train.probe_gradients_every
        _check_reconstruction(network)
    return HeteGen(build_tables(schema, table_shapes(schema, statistics, model.dim)), network)


def _check_reconstruction(network: HeteGenNetwork) -> None:
    if not network.is_generative:
        return
    if not network.fields:
        raise ConfigError(
            f"stage `{network.stage}` has nothing to reconstruct: no field of the schema has "
            "`reconstruct: true` and at least two values in the training rows"
        )
    if isinstance(network.corruption, Diffusion) and network.corruption.lacks_swaps:
        raise ConfigError(
            "model.noise.kind: marginal takes other rows' values for fields with a full softmax, and there "
            "are none; raise `model.reconstruction.full_softmax_max` to the size of a vocabulary, or use "
            "`mask`"
        )


def _is_one_in(every: int, batch: Batch) -> bool:
    """True for one step in `every` on average, chosen without state and equally on every rank."""
    return uniform_of_batch(batch) * every < 1.0


def _one_hot_bins(level: Tensor, num_bins: int) -> Tensor:
    index = (level * num_bins).long().clamp(max=num_bins - 1)
    return functional.one_hot(index, num_bins).float()


def _freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)
