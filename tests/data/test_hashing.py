import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hetegen_rec.data.hashing import (
    hash_bucket,
    hash_bucket_torch,
    hash_strings,
    mix64,
    mix64_torch,
    salt_of,
    uniform,
    uniform_torch,
)

int64s = arrays(np.int64, st.integers(0, 30), elements=st.integers(-(2**63), 2**63 - 1))
salts = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1


def reference_mix(value: int, salt: int) -> int:
    def finalise(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    return finalise((value & MASK) ^ finalise((salt + 0x9E3779B97F4A7C15) & MASK))


def reference_string(text: str, salt: int) -> int:
    data = text.encode()
    state = reference_mix(len(data), salt)
    for start in range(0, len(data), 8):
        word = int.from_bytes(data[start : start + 8], "little")
        z = state ^ word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        state = z ^ (z >> 31)
    return state


@settings(deadline=None)
@given(int64s, salts)
def test_numpy_torch_and_the_written_definition_agree(values: np.ndarray, salt: int) -> None:
    expected = [reference_mix(int(v), salt) for v in values]
    assert mix64(values, salt).tolist() == expected
    assert mix64_torch(torch.from_numpy(values), salt).numpy().view(np.uint64).tolist() == expected


@settings(deadline=None)
@given(int64s, salts, st.integers(1, 2**40))
def test_uniform_numbers_and_buckets_agree_between_numpy_and_torch(values, salt, size) -> None:
    tensor = torch.from_numpy(values)
    drawn = uniform(values, salt)
    assert drawn.dtype == np.float32
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert drawn.tolist() == uniform_torch(tensor, salt).tolist()
    buckets = hash_bucket(mix64(values, salt), size)
    assert ((buckets >= 0) & (buckets < size)).all()
    assert buckets.tolist() == hash_bucket_torch(mix64_torch(tensor, salt), size).tolist()


def test_hashes_are_fixed_for_ever() -> None:
    assert salt_of("user_id") == salt_of("user_id") != salt_of("item_id")
    assert mix64(np.array([0, 1, -1]), 7).tolist() == [reference_mix(v, 7) for v in (0, 1, -1)]
    assert abs(float(uniform(np.arange(100_000), 3).mean()) - 0.5) < 0.005


def test_small_salts_are_unrelated() -> None:
    values = np.arange(1000)
    hashed = {int(h) for salt in range(4) for h in mix64(values, salt)}
    assert len(hashed) == 4000


@settings(deadline=None)
@given(st.lists(st.none() | st.text(max_size=30), max_size=20), salts, st.integers(0, 5))
def test_strings_hash_by_value_whatever_their_layout(texts, salt: int, skip: int) -> None:
    expected = [0 if text is None else reference_string(text, salt) for text in texts]
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(texts, kind)
        assert hash_strings(array, salt).tolist() == expected
        assert hash_strings(array.slice(skip), salt).tolist() == expected[skip:]
        chunked = pa.chunked_array([array.slice(0, skip), array.slice(skip)])
        assert hash_strings(chunked, salt).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 200), max_size=40), st.lists(st.integers(0, 20), max_size=60), salts)
def test_few_long_strings_among_many_short_ones_hash_by_value(long, short, salt: int) -> None:
    texts = ["".join(chr(33 + (7 * i + length) % 90) for i in range(length)) for length in (*long, *short)]
    expected = [reference_string(text, salt) for text in texts]
    assert hash_strings(pa.array(texts, pa.string()), salt).tolist() == expected


def test_padding_does_not_make_strings_equal() -> None:
    texts = ["", "\0", "\0\0", "a", "a\0", "abcdefgh", "abcdefgh\0"]
    assert len(set(hash_strings(pa.array(texts), 0).tolist())) == len(texts)
