"""The baselines behind the same tables, reader, optimizers and evaluation as the generative model."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from hetegen_rec.config.backbone import BackboneConfig, BackboneName
from hetegen_rec.config.balance import BalanceConfig
from hetegen_rec.config.run import ModelConfig, Stage
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.models.backbones.autoint import AutoInt
from hetegen_rec.models.backbones.dcnv2 import DCNV2
from hetegen_rec.models.backbones.din import TargetAttentionPooling
from hetegen_rec.models.backbones.factorization import FM, DeepFM
from hetegen_rec.models.backbones.finalmlp import FinalMLP
from hetegen_rec.models.backbones.layers import Deep, FirstOrder
from hetegen_rec.models.backbones.masknet import MaskNet
from hetegen_rec.models.ctr import FieldPooling
from hetegen_rec.models.difficulty import Difficulty
from hetegen_rec.models.generation import FeatureGenerator
from hetegen_rec.models.network import ClickNetwork

_SCORERS: dict[BackboneName, Callable[[Schema, int, BackboneConfig], nn.Module]] = {
    "lr": lambda schema, dim, _: FirstOrder(len(schema.fields), dim),
    "fm": lambda schema, dim, _: FM(len(schema.fields), dim),
    "deepfm": lambda schema, dim, config: DeepFM(len(schema.fields), dim, config),
    "dcnv2": lambda schema, dim, config: DCNV2(len(schema.fields), dim, config),
    "autoint": lambda schema, dim, config: AutoInt(len(schema.fields), dim, config),
    "masknet": lambda schema, dim, config: MaskNet(len(schema.fields), dim, config),
    "finalmlp": lambda schema, dim, config: FinalMLP(schema.field_names, dim, config),
    "din": lambda schema, dim, config: nn.Sequential(nn.Flatten(), Deep(len(schema.fields) * dim, config)),
}
"""What turns the vectors of a row's fields [B, F, D] into logits [B]."""


class Backbone(nn.Module):
    """A baseline: tokens to one vector a field, those regenerated if configured, those to a logit."""

    def __init__(self, schema: Schema, dim: int, config: BackboneConfig) -> None:
        super().__init__()
        self.pooling = (
            TargetAttentionPooling(schema, dim, config) if config.name == "din" else FieldPooling(schema)
        )
        self.generator = FeatureGenerator(len(schema.fields), dim) if config.generate else None
        self.scorer = _SCORERS[config.name](schema, dim, config)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """tokens [B, T, D] and present [B, T] bool -> logits [B]."""
        fields = self.pooling(tokens, present)
        if self.generator is not None:
            fields = self.generator(fields)
        return cast(Tensor, self.scorer(fields))


class NamedBackbone(nn.ModuleDict):
    """A backbone that stands under its name, and with `generate` under one of its own, in the state dict.

    LR and FM have the same weights, but neither loads a checkpoint of the other.
    """

    def __init__(self, schema: Schema, dim: int, config: BackboneConfig) -> None:
        self.key = f"generated_{config.name}" if config.generate else config.name
        super().__init__({self.key: Backbone(schema, dim, config)})

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """tokens [B, T, D] and present [B, T] bool -> logits [B]."""
        logits: Tensor = self[self.key](tokens, present)
        return logits.float()


class BackboneNetwork(ClickNetwork):
    """The network of a baseline. It reconstructs nothing, so no field has a difficulty."""

    def __init__(
        self,
        schema: Schema,
        statistics: Statistics,
        model: ModelConfig,
        stage: Stage,
        *,
        table_l2: float = 0.0,
        autocast: bool = False,
    ) -> None:
        super().__init__(schema, statistics, model, stage, table_l2=table_l2, autocast=autocast)
        self.fields = []
        self.difficulty = Difficulty(0, BalanceConfig()).requires_grad_(False)
        self.backbone = NamedBackbone(schema, model.dim, model.backbone)

    def score(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Click logits [B] of rows [B, T, D]."""
        logits: Tensor = self.backbone(tokens, present)
        return logits
