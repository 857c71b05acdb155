"""The back end `fbgemm`: FBGEMM's batched lookup, which decodes and averages rows in one pass over them.

The rows of a table lie as that operator reads them (`IntNBitTableBatchedEmbeddingBags`): those of `fp32` and
`fp16` as in the other back ends, so they share their files, and those of `int8` and `int4` with their scale
and offset, two float16, in front:

| precision | bytes per row of D numbers |
|---|---|
| `fp32`, `fp16` | 4 D, 2 D |
| `int8` | 4 + D |
| `int4` | 4 + D / 2 |

The operator takes the tables as an argument, so they stay in files that are mapped into memory. It runs on
the CPU; on a GPU it wants rows at multiples of 16 bytes, which are not written.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import fbgemm_gpu  # noqa: F401 - registers the operators
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from torch import Tensor, nn

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import TablePrecision
from hetegen_rec.export.lookup import GraphLookup, GroupSlots
from hetegen_rec.scoring.layout import FieldSlots, Layout
from hetegen_rec.scoring.precision import FUSED, Parts

_TYPES: Mapping[TablePrecision, SparseType] = MappingProxyType(
    {
        "fp32": SparseType.FP32,
        "fp16": SparseType.FP16,
        "int8": SparseType.INT8,
        "int4": SparseType.INT4,
    }
)
_SCALE_BYTES = 4
_FLOAT32 = SparseType.FP32.as_int()


def fused_encoder(precision: TablePrecision, dims: Mapping[str, int]) -> Callable[[Tensor], Parts]:
    """What makes the operator's rows of `int8` and `int4` of [N, D] float32.

    Args:
        precision: one of those two.
        dims: width of each table.

    Raises:
        ConfigError: the operator cannot store rows of such a width.
    """
    bits = _TYPES[precision].bit_rate()
    for table, dim in dims.items():
        if dim * bits % 16:
            raise ConfigError(
                f"export.backends: fbgemm stores `{precision}` rows of a width that is a multiple of "
                f"{16 // bits}, but table {table} has {dim}; change that, take another `export.tables`, or "
                "leave out fbgemm"
            )

    def encode(rows: Tensor) -> Parts:
        stored = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, bits)
        # That operator writes scale and offset behind the numbers; the lookup reads them in front.
        return {FUSED: stored.roll(_SCALE_BYTES, dims=1)}

    return encode


class FbgemmLookup(GraphLookup):
    """One call of the operator for each width of tables."""

    def __init__(self, layout: Layout, dims: dict[str, int], precision: TablePrecision) -> None:
        """See `GraphLookup`."""
        super().__init__(layout, dims)
        self._lookups = nn.ModuleList(
            _GroupLookup(group, self._fields, _TYPES[precision]) for group in self.groups
        )

    def forward(self, ids: Tensor, present: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
        """See `GraphLookup.forward`; each group has one array behind its first rows, [rows, bytes] uint8."""
        found: dict[str, Tensor] = {}
        for number, lookup in enumerate(self._lookups):
            first_rows, rows = tables[2 * number : 2 * number + 2]
            found |= lookup(ids, present, first_rows, rows)
        return [found[one.field.name] for one in self._fields]


class _GroupLookup(nn.Module):
    """Every token of the tables of one width is a bag: of one value, or of all values of a field.

    All bags of a token have the same number of slots, so that shapes do not depend on data. Weights in a bag
    make it a mean, and leave out slots without an id.
    """

    placements: Tensor
    types: Tensor
    columns: Tensor
    lengths: Tensor
    places: Tensor

    def __init__(self, group: GroupSlots, fields: Sequence[FieldSlots], stored_as: SparseType) -> None:
        super().__init__()
        self._dim, self._type = group.dim, stored_as
        mine = [one for one in fields if one.start in group.slots]
        self._singles = [slot for one in mine if not one.is_bag for slot in range(one.start, one.stop)]
        self._bags = [one for one in mine if one.is_bag]
        lengths = [1] * len(self._singles) + [one.stop - one.start for one in self._bags]
        first_slots = self._singles + [one.start for one in self._bags]
        self._tokens = {one.field.name: (first_slots.index(one.start), one.num_tokens) for one in mine}
        num_tokens = len(lengths)
        on_host = torch.full((num_tokens,), EmbeddingLocation.HOST.value, dtype=torch.int32)
        self.register_buffer("placements", on_host)
        self.register_buffer("types", torch.full((num_tokens,), stored_as.as_int(), dtype=torch.uint8))
        self.register_buffer("columns", group.dim * torch.arange(num_tokens + 1, dtype=torch.int32))
        self.register_buffer("lengths", torch.tensor(lengths))
        self.register_buffer("places", torch.tensor([group.slots.index(slot) for slot in first_slots]))

    def forward(self, ids: Tensor, present: Tensor, first_rows: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """By field, [B, tokens, dim] float32."""
        batch_size, num_tokens = ids.shape[0], len(self.lengths)
        ends = self.lengths[:, None].expand(num_tokens, batch_size).reshape(-1).cumsum(0)
        pooled = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=rows.reshape(-1),
            uvm_weights=rows.new_empty(0),
            weights_placements=self.placements,
            weights_offsets=first_rows[self.places] * rows.shape[1],
            weights_tys=self.types,
            D_offsets=self.columns,
            total_D=num_tokens * self._dim,
            max_int2_D=0,
            max_int4_D=self._width_as(SparseType.INT4),
            max_int8_D=self._width_as(SparseType.INT8),
            max_float16_D=self._width_as(SparseType.FP16),
            max_float32_D=self._width_as(SparseType.FP32),
            indices=self._by_token(ids.clamp(min=0)),
            offsets=nn.functional.pad(ends, (1, 0)),
            pooling_mode=PoolingMode.SUM.value,
            indice_weights=self._by_token(present.float(), _shares),
            output_dtype=_FLOAT32,
            row_alignment=1,
        )
        tokens = pooled.view(batch_size, num_tokens, self._dim)
        return {name: tokens[:, first : first + count] for name, (first, count) in self._tokens.items()}

    def _by_token(self, cells: Tensor, of_bag: Callable[[Tensor], Tensor] = lambda cells: cells) -> Tensor:
        """[tokens * B * slots of each]: cells [B, S] token after token, those of a bag changed before."""
        singles = cells[:, self._singles].t().reshape(-1)
        bags = [of_bag(cells[:, one.start : one.stop]).reshape(-1) for one in self._bags]
        return torch.cat([singles, *bags])

    def _width_as(self, stored_as: SparseType) -> int:
        """The greatest width of tables that are stored in a way."""
        return self._dim if self._type == stored_as else 0


def _shares(present: Tensor) -> Tensor:
    """[B, V]: how much each cell counts in the mean of its bag, from ones where there is an id."""
    return present / present.sum(1, keepdim=True).clamp(min=1)
