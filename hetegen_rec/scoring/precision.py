"""Table rows in few bytes: how they are stored, and read again by plain tensor operations.

| precision | stored per row of D numbers | read as |
|---|---|---|
| `fp32` | D float32 | as they are |
| `fp16` | D float16 | as they are |
| `int8` | D int8 and a float16 scale | scale * q, q in -127 .. 127 |
| `int4` | D / 2 bytes, the even column in the low half, and float16 scale and offset | offset + scale * q |

Scale and offset of a row are chosen so that its largest and smallest numbers can be said, and numbers are
rounded to the nearest that the rounded scale and offset can say. A row of zeros stays a row of zeros.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hetegen_rec.config.export import Backend, TablePrecision

_LEAST_STEP = 2.0**-24
"""The smallest positive float16; rows whose scale is below it are read as zeros."""

FUSED = "fused"
"""The part that the back end `fbgemm` takes of `int8` and `int4` instead: see `export.fbgemm`."""

Parts = dict[str, Tensor]
"""Tensors with one row per table row, by name."""


@dataclass(frozen=True)
class Coding:
    """One way to store rows."""

    names: tuple[str, ...]
    """Of the parts, in the order in which graphs take them."""
    encode: Callable[[Tensor], Parts]
    """[N, D] float32 -> parts."""
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    """Parts [..., *] of any rows -> [..., D] float32."""


def _encode_int8(rows: Tensor) -> Parts:
    scale = (rows.abs().amax(1) / 127.0).half()
    step = scale.float().clamp(min=_LEAST_STEP)
    values = (rows / step[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {"values": values, "scale": scale}


def _decode_int8(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["values"].float() * parts["scale"].float()[..., None]


def _encode_int4(rows: Tensor) -> Parts:
    low, high = rows.amin(1), rows.amax(1)
    scale, offset = ((high - low) / 15.0).half(), low.half()
    step = scale.float().clamp(min=_LEAST_STEP)
    steps = ((rows - offset.float()[:, None]) / step[:, None]).round().clamp(0, 15).to(torch.uint8)
    packed = steps[:, 0::2] | (steps[:, 1::2] << 4)
    return {"values": packed, "scale": torch.stack([scale, offset], dim=1)}


def _decode_int4(parts: Mapping[str, Tensor]) -> Tensor:
    packed, scale = parts["values"], parts["scale"].float()
    steps = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).float()
    return scale[..., 1:] + scale[..., :1] * steps


CODINGS: dict[TablePrecision, Coding] = {
    "fp32": Coding(("values",), lambda rows: {"values": rows}, lambda parts: parts["values"]),
    "fp16": Coding(("values",), lambda rows: {"values": rows.half()}, lambda parts: parts["values"].float()),
    "int8": Coding(("values", "scale"), _encode_int8, _decode_int8),
    "int4": Coding(("values", "scale"), _encode_int4, _decode_int4),
}


def stored_parts(precision: TablePrecision, backend: Backend) -> tuple[str, ...]:
    """The parts of rows that a back end takes, in order."""
    if backend == "fbgemm" and precision in ("int8", "int4"):
        return (FUSED,)
    return CODINGS[precision].names
