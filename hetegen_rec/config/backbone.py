"""Which model scores a row: the network of this project, or a known one on the same tables."""

from typing import Literal, TypeAlias

from pydantic import PositiveFloat, PositiveInt, model_validator

from hetegen_rec.config.errors import Section
from hetegen_rec.config.schema import Schema
from hetegen_rec.config.values import Probability, Texts, Widths

BackboneName: TypeAlias = Literal[
    "hetegen", "lr", "fm", "deepfm", "dcnv2", "autoint", "masknet", "finalmlp", "din"
]

_SETTINGS: dict[BackboneName, tuple[str, ...]] = {
    "hetegen": (),
    "lr": (),
    "fm": (),
    "deepfm": ("hidden", "dropout"),
    "dcnv2": ("hidden", "dropout", "num_layers", "structure", "rank"),
    "autoint": ("hidden", "dropout", "num_layers", "num_heads"),
    "masknet": ("hidden", "dropout", "num_blocks", "block_width", "reduction_ratio"),
    "finalmlp": ("hidden", "dropout", "num_heads", "gate_hidden", "first_gate", "second_gate"),
    "din": ("hidden", "dropout", "attention_hidden"),
}
"""What each backbone reads besides `name` and `generate`."""


class BackboneConfig(Section):
    """What scores a row (docs/method.md section 12).

    In stage `scratch` all but `hetegen` are baselines, which read nothing of `model` besides this section,
    `dim` and `init_std`, so that one file can describe a comparison. In the other stages the denoiser shapes
    the tables by which they score.
    """

    name: BackboneName = "hetegen"
    """`hetegen` is the denoiser with the head `model.ctr`; the others score looked-up rows alone."""
    generate: bool = False
    """Regenerate every field's vector from all fields before it is scored (SFG, arXiv 2512.14041)."""
    hidden: Widths = (256, 128)
    """Layers of the deep part; of both streams of `finalmlp`. Empty: none, which leaves a linear part."""
    dropout: Probability = 0.0
    """After every hidden layer, and on the attention of `autoint`."""
    num_layers: PositiveInt = 3
    """`dcnv2`: cross layers; `autoint`: attention layers."""
    num_heads: PositiveInt = 2
    """`autoint`: heads of attention; `finalmlp`: blocks of the bilinear fusion."""
    structure: Literal["parallel", "stacked"] = "parallel"
    """`dcnv2` only: the deep part beside the cross layers, or behind them."""
    rank: PositiveInt | None = None
    """`dcnv2` only: rank of the cross matrices; null for full matrices."""
    num_blocks: PositiveInt = 3
    """`masknet` only: mask blocks side by side."""
    block_width: PositiveInt = 64
    """`masknet` only: width of what a block puts out."""
    reduction_ratio: PositiveFloat = 1.0
    """`masknet` only: width of a mask's hidden layer relative to that of the mask."""
    gate_hidden: Widths = (64,)
    """`finalmlp` only: hidden layers of the feature gates."""
    first_gate: Texts = ()
    """`finalmlp` only: fields that the gate of the first stream looks at, such as those of the user; none
    for a gate that is the same for all rows."""
    second_gate: Texts = ()
    """`finalmlp` only: the same for the second stream, such as fields of the item."""
    attention_hidden: Widths = (64, 32)
    """`din` only: hidden layers that weigh an item of the history against the target item."""

    @model_validator(mode="after")
    def _check(self) -> "BackboneConfig":
        self._refuse_all_but(f"with `name: {self.name}`", "name", "generate", *_SETTINGS[self.name])
        if self.name == "finalmlp" and (not self.hidden or self.hidden[-1] % self.num_heads):
            raise ValueError(
                f"`hidden: {list(self.hidden)}` must end with a multiple of `num_heads: {self.num_heads}`, "
                "into which the fusion of the two streams cuts it"
            )
        return self

    def check_schema(self, schema: Schema) -> None:
        """Raises ValueError if this backbone needs fields that the schema lacks."""
        for key in ("first_gate", "second_gate"):
            unknown = sorted(set(getattr(self, key)) - set(schema.field_names))
            if unknown:
                names = ", ".join(schema.field_names)
                raise ValueError(
                    f"`model.backbone.{key}` names {', '.join(unknown)}, but fields are: {names}"
                )
        if self.name == "din" and not any(field.kind == "sequence" for field in schema.fields):
            raise ValueError(
                "`model.backbone.name: din` compares an item with a history of items, but no field of "
                "`features` is of kind `sequence`; add one, or take another backbone"
            )
