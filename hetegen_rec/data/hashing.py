"""Fixed, salted 64-bit hashing, bit for bit the same in numpy, in torch and on any machine.

The mix is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) over `value XOR finalise(salt + gamma)`: a bijection for every salt, so
different integers never collide in 64 bits, and different salts give unrelated hashes.

A string of n bytes (UTF-8) starts from the mix of n and folds in its 8-byte little-endian words,
the last one padded with zeros. All arithmetic is modulo 2**64.
"""

import hashlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

UInt64Array: TypeAlias = npt.NDArray[np.uint64]

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MASK = (1 << 64) - 1
_WORD = 8  # bytes
_UNIFORM_BITS = 24  # what a float32 in [0, 1) holds exactly
_FEW = 32  # strings for which a call of numpy costs more than a loop over them


def salt_of(name: str) -> int:
    """The salt of a table or a purpose, in [0, 2**64): the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def mix64(values: npt.NDArray[Any], salt: int) -> UInt64Array:
    """Hashes 64-bit integers.

    Args:
        values: uint64 or int64 of any shape; int64 is taken by its bits.
        salt: any integer; equal salts give equal hashes.

    Returns:
        uint64 of the same shape.
    """
    return _finalise(values.view(np.uint64) ^ np.uint64(_scalar_mix(salt)))


def mix64_torch(values: torch.Tensor, salt: int) -> torch.Tensor:
    """The bits of `mix64` as an int64 tensor; plain tensor operations, so it can be exported."""
    first, second, third = _SHIFTS
    mixed = values ^ _signed(_scalar_mix(salt))
    mixed = (mixed ^ _shift_right(mixed, first)) * _signed(_MULTIPLIERS[0])
    mixed = (mixed ^ _shift_right(mixed, second)) * _signed(_MULTIPLIERS[1])
    return mixed ^ _shift_right(mixed, third)


def uniform(values: npt.NDArray[np.int64], salt: int) -> npt.NDArray[np.float32]:
    """One number in [0, 1) for every value: the top 24 bits of its hash, exact in float32."""
    top = mix64(values, salt) >> np.uint64(64 - _UNIFORM_BITS)
    return top.astype(np.float32) * np.float32(2.0**-_UNIFORM_BITS)


def uniform_torch(values: torch.Tensor, salt: int) -> torch.Tensor:
    """The same numbers as `uniform`, as a float32 tensor."""
    top = _shift_right(mix64_torch(values, salt), 64 - _UNIFORM_BITS)
    return top.to(torch.float32) * 2.0**-_UNIFORM_BITS


def hash_bucket(hashes: UInt64Array, num_buckets: int) -> npt.NDArray[np.int64]:
    """Buckets in [0, num_buckets): the hash without its lowest bit, modulo.

    The lowest bit goes so that `hash_bucket_torch`, which has only signed integers, agrees.
    """
    return (hashes >> np.uint64(1)).astype(np.int64) % num_buckets


def hash_bucket_torch(hashes: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """The same buckets as `hash_bucket`, from the int64 hashes of `mix64_torch`."""
    return _shift_right(hashes, 1) % num_buckets


def hash_strings(array: pa.Array | pa.ChunkedArray, salt: int) -> UInt64Array:
    """Hashes strings over their Arrow buffers, in time that grows with their bytes.

    Args:
        array: `string` or `large_string`, sliced or chunked as it comes.
        salt: as in `mix64`.

    Returns:
        [len(array)] uint64; 0 for nulls.
    """
    if isinstance(array, pa.ChunkedArray):
        hashed = [hash_strings(chunk, salt) for chunk in array.chunks]
        return np.concatenate(hashed) if hashed else np.empty(0, np.uint64)
    starts, lengths, words = _words(array.cast(pa.large_string()))
    hashes = mix64(lengths, salt)
    # Each turn folds one more word into the strings that still have bytes left, until few are that long.
    active = np.flatnonzero(lengths)
    done = 0
    while len(active) >= _FEW:
        left = lengths[active] - done
        word = words[starts[active] + done] & _low_bytes(left)
        hashes[active] = _finalise(hashes[active] ^ word)
        done += _WORD
        active = active[left > _WORD]
    for place in active:
        folded = np.arange(done, lengths[place], _WORD)
        rest = words[starts[place] + folded] & _low_bytes(lengths[place] - folded)
        hashes[place] = _fold(int(hashes[place]), rest.tolist())
    if array.null_count:
        hashes[array.is_null().to_numpy(zero_copy_only=False)] = 0
    return hashes


def _words(array: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], UInt64Array]:
    """Start and length in bytes of each string, and the 8-byte word at every byte position."""
    _, offset_buffer, data = array.buffers()
    if len(array) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    padded = np.zeros(last - first + _WORD, np.uint8)
    if last > first:
        padded[: last - first] = np.frombuffer(data, np.uint8)[first:last]
    words: UInt64Array = np.ndarray((last - first + 1,), np.dtype("<u8"), padded.data, strides=(1,))
    return offsets[:-1] - first, np.diff(offsets), words


def _low_bytes(count: npt.NDArray[np.int64]) -> UInt64Array:
    """Masks that keep the `count` lowest bytes of a word, all eight from 8 up; count is positive."""
    missing = 8 * (_WORD - np.minimum(count, _WORD))
    return np.uint64(_MASK) >> missing.astype(np.uint64)


def _finalise(mixed: UInt64Array) -> UInt64Array:
    first, second, third = (np.uint64(shift) for shift in _SHIFTS)
    mixed = (mixed ^ (mixed >> first)) * np.uint64(_MULTIPLIERS[0])
    mixed = (mixed ^ (mixed >> second)) * np.uint64(_MULTIPLIERS[1])
    return mixed ^ (mixed >> third)


def _scalar_mix(salt: int) -> int:
    return _fold(0, [(salt + _GAMMA) & _MASK])


def _fold(hashed: int, words: list[int]) -> int:
    """`_finalise(hashed ^ word)` for one word after the other, in plain integers."""
    first, second, third = _SHIFTS
    one, two = _MULTIPLIERS
    for word in words:
        mixed = hashed ^ word
        mixed = (mixed ^ (mixed >> first)) * one & _MASK
        mixed = (mixed ^ (mixed >> second)) * two & _MASK
        hashed = mixed ^ (mixed >> third)
    return hashed


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _shift_right(values: torch.Tensor, shift: int) -> torch.Tensor:
    """Logical shift of int64: torch's own keeps the sign."""
    return (values >> shift) & ((1 << (64 - shift)) - 1)
