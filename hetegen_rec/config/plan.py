"""The section `plan`: the cluster that `hetegen plan` lays a run out for. Training does not read it."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, PositiveInt

from hetegen_rec.config.errors import Section
from hetegen_rec.config.schema import Schema

_WORLD = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")


@dataclass(frozen=True)
class World:
    """Ranks on hosts."""

    num_hosts: int
    local_size: int
    """Ranks per host."""

    @property
    def size(self) -> int:
        """Ranks over all hosts."""
        return self.num_hosts * self.local_size


def _is_world(value: str) -> str:
    if not _WORLD.fullmatch(value):
        raise ValueError(f"`{value}` is not of the form HOSTSxRANKS, such as 2x8")
    return value


class PlanConfig(Section):
    """What to plan for (docs/capacity.md)."""

    world: Annotated[str, AfterValidator(_is_world)] = "1x8"
    """Hosts and ranks per host, as in `torchx run dist.ddp -j 2x8`."""
    hardware: str = "h100"
    """A shipped profile (`h100`, `h200`, `a100`, `cpu`), or the path of a YAML file like theirs."""
    expected_values: dict[str, PositiveInt] = {}
    """How many values a field with `vocabulary: vocab` will have, by name: the size of its table before
    `prepare` has counted. Where data are prepared their statistics are taken instead."""

    def check_schema(self, schema: Schema) -> None:
        """Raises ValueError if a number of values is expected of what is no exact vocabulary."""
        exact = [field.name for field in schema.table_owners if field.vocabulary == "vocab"]
        for name in self.expected_values:
            if name not in exact:
                raise ValueError(
                    f"`plan.expected_values.{name}` is not a field with `vocabulary: vocab`, which are: "
                    f"{', '.join(exact) or 'none'}; remove it"
                )

    @property
    def parsed_world(self) -> World:
        """The world as numbers."""
        hosts, ranks = self.world.split("x")
        return World(int(hosts), int(ranks))
