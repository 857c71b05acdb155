"""Kinds of values that several sections have."""

from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, Field, PositiveInt


def as_tuple(value: object) -> object:
    """A list, or a single text, as the tuple that it means; anything else as it is."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Texts: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Widths: TypeAlias = Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]
"""Widths of hidden layers, from the input on; none for no hidden layer."""
