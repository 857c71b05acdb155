"""The section `export`: what an artifact for scoring holds."""

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PositiveInt

from hetegen_rec.config.errors import Section
from hetegen_rec.config.values import as_tuple

Backend: TypeAlias = Literal["aten", "fbgemm", "aoti"]
TablePrecision: TypeAlias = Literal["fp32", "fp16", "int8", "int4"]
DensePrecision: TypeAlias = Literal["fp32", "bf16"]
ScoringStrategy: TypeAlias = Literal["plain", "feature_paths", "uncertainty"]


class ExportConfig(Section):
    """What `export` writes (docs/export.md)."""

    backends: Annotated[tuple[Backend, ...], BeforeValidator(as_tuple), Field(min_length=1)] = ("aten",)
    """`aten`: plain tensor operations, runs wherever torch does; `aoti`: compiled for this processor;
    `fbgemm`: FBGEMM's lookups of quantised rows."""
    tables: TablePrecision = "fp32"
    """How embedding rows are stored."""
    dense: DensePrecision = "fp32"
    """Precision of the network behind them."""
    strategies: Annotated[tuple[ScoringStrategy, ...], BeforeValidator(as_tuple)] = ("plain",)
    """Test-time strategies that can be chosen at scoring (section `inference`)."""
    shared_fields: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Fields of the user's side, which a request may bring once for many candidate items."""
    raw_integers: bool = False
    """Also write a graph that takes the raw integers of all fields and makes the ids itself; every field must
    be hashed integers or `numeric`."""
    parity_rows: PositiveInt = 10_000
    """Validation rows, the first ones, on which the artifact is held against the training model."""
