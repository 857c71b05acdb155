"""What the generative stages predict, and from what."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field as Bounded
from pydantic import PositiveInt, model_validator

from hetegen_rec.config.errors import Section
from hetegen_rec.config.schema import Field, Schema
from hetegen_rec.config.values import Texts

ObjectiveName: TypeAlias = Literal["diffusion", "next_item", "masked_features", "replaced_features"]

_SETTINGS: dict[ObjectiveName, tuple[str, ...]] = {
    "diffusion": (),
    "next_item": ("masked",),
    "masked_features": ("share", "num_negatives"),
    "replaced_features": ("share",),
}
"""What each objective reads besides `name`."""


class ObjectiveConfig(Section):
    """The objective of `pretrain`, and of the generative half of `joint` (docs/method.md section 13).

    All but `diffusion` leave the label out of the set and read nothing of `model.noise`, those of MAP nothing
    of `model.reconstruction` either. These sections may stay as they are, so that one file can describe a
    comparison.
    """

    name: ObjectiveName = "diffusion"
    """`diffusion`: of the whole row, as in DGenCTR and HeteGenCTR; `next_item`: the clicked item from the
    rest of its row, as in GenCTR; `masked_features` and `replaced_features`: as in MAP."""
    masked: Texts | None = None
    """`next_item` only, required there: fields that give away which item it is, such as its age or its number
    of clicks. They are masked with `features.item`, but not predicted. All others are given, such as the
    item's category. `[]` if no field gives the item away."""
    share: Annotated[float, Bounded(gt=0.0, lt=1.0)] = 0.3
    """`masked_features` and `replaced_features`: share of a row's cells that are masked or replaced."""
    num_negatives: PositiveInt = 25
    """`masked_features` only: values of other rows that the true one is told from."""

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        self._refuse_all_but(f"with `name: {self.name}`", "name", *_SETTINGS[self.name])
        if self.name == "next_item" and self.masked is None:
            raise ValueError(
                "`name: next_item` needs `masked`: the fields besides `features.item` that give away which "
                "item it is, such as its age or its number of clicks; `masked: []` if none do"
            )
        return self

    @property
    def knows_noise_levels(self) -> bool:
        """Whether rows are noised at different levels t, and the label with them."""
        return self.name == "diffusion"

    @property
    def knows_vocabularies(self) -> bool:
        """Whether small fields get a softmax over their vocabulary; else values are known by vectors."""
        return self.name in ("diffusion", "next_item")

    def predicts(self, field: Field, schema: Schema) -> bool:
        """Whether this field of the schema is one to predict."""
        return field.reconstruct and (self.name != "next_item" or field.name == schema.item)

    def check_schema(self, schema: Schema) -> None:
        """Raises ValueError if this objective needs fields that the schema lacks."""
        if self.name != "next_item":
            return
        if schema.item is None:
            raise ValueError(
                "`model.objective.name: next_item` predicts the item, and `features.item` does not say which "
                "field that is; name it, or take another objective"
            )
        if not schema.field(schema.item).reconstruct:
            raise ValueError(
                f"`model.objective.name: next_item` predicts the item, and field {schema.item!r} has "
                "`reconstruct: false`; remove that, or take another objective"
            )
        others = [name for name in schema.field_names if name != schema.item]
        wrong = sorted(set(self.masked or ()) - set(others))
        if wrong:
            raise ValueError(
                f"`model.objective.masked` names {', '.join(wrong)}, but fields besides the item, which is "
                f"masked anyway, are: {', '.join(others)}"
            )
