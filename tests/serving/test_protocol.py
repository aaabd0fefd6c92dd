"""Frames: byte for byte those of the protocol that robots speak, and safe to read from strangers."""

import contextlib
import random

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from diffusion_policy.serving.protocol import (
    MAX_NESTING,
    ProtocolError,
    Served,
    describe,
    pack,
    read_description,
    unpack,
)

DTYPES = ["?", "i1", "u1", "<i4", ">i8", "<u8", "<f2", "<f4", ">f8"]
ARRAY = bytes.fromhex(  # {"x": array([1, 2], "<f4")}, written from the protocol's description
    "81 a178"
    "84 c40b5f5f6e6461727261795f5f c3"  # b"__ndarray__": True
    "c40464617461 c408 0000803f 00000040"  # b"data": 8 bytes
    "c4056474797065 a33c6634"  # b"dtype": "<f4"
    "c4057368617065 91 02"  # b"shape": [2]
)


@given(arrays.arrays(st.sampled_from(DTYPES).map(np.dtype), arrays.array_shapes(min_dims=0, max_side=4)))
def test_arrays_of_numbers_come_back_as_they_were(array: np.ndarray) -> None:
    found = unpack(pack({"a": array, "nested": {"b": [array]}}))
    for one in (found["a"], found["nested"]["b"][0]):
        assert one.dtype == array.dtype
        np.testing.assert_array_equal(one, array)
        assert not one.flags.writeable


def test_the_bytes_are_those_of_the_protocol() -> None:
    array = np.array([1, 2], "<f4")
    assert pack({"x": array}) == ARRAY
    np.testing.assert_array_equal(unpack(ARRAY)["x"], array)
    scalar = msgpack.packb({"s": {b"__npgeneric__": True, b"data": 3, b"dtype": "<i4"}})
    assert unpack(scalar)["s"] == 3
    assert unpack(scalar)["s"].dtype == np.int32
    assert unpack(pack({"s": np.float32(0.5), "b": np.bool_(True)})) == {"s": 0.5, "b": True}


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([object()]), np.array([1j]), object(), {1, 2}])
def test_what_is_no_number_is_not_sent(value: object) -> None:
    with pytest.raises(ProtocolError, match="cannot be sent"):
        pack({"x": value})


def array_of(**changes: object) -> bytes:
    parts = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"x": parts | {name.encode(): value for name, value in changes.items()}})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "must hold msgpack"),
        (b"\xc1", "must hold msgpack"),
        (ARRAY[:-1], "must hold msgpack"),
        (ARRAY + b"\x00", "must hold msgpack"),
        (b"\x93\x01\x02\x03", "must hold a map; got list"),
        (b"\x91" * 5000 + b"\x01", "must hold msgpack"),
        (b"\xdd\xff\xff\xff\xff", "must hold msgpack"),  # a list of 2^32 items
        (b"\xc7\x02\x01ab", "must hold msgpack"),  # an extension type
        (msgpack.packb({"a": {1: 2}}), "keys must be texts"),
        (array_of(dtype="|O"), "booleans, whole numbers or floats"),
        (array_of(dtype="V4"), "booleans, whole numbers or floats"),
        (array_of(dtype="<c8"), "booleans, whole numbers or floats"),
        (array_of(dtype="i4,i4"), "booleans, whole numbers or floats"),
        (array_of(dtype="g"), "booleans, whole numbers or floats"),
        (array_of(dtype="f16"), "booleans, whole numbers or floats"),
        (array_of(dtype=","), "booleans, whole numbers or floats"),
        (array_of(shape=[0, 2**62], data=b""), "array is too big|too big|negative|size"),
        (msgpack.packb({"s": {b"__npgeneric__": True, b"data": float("nan"), b"dtype": "<i4"}}), "NaN"),
        (msgpack.packb({"a": [[]] * 1000 + [[[]]]}), "more than 1000 lists and maps"),
        (msgpack.packb({"a": [1] * 1025}), "must hold msgpack"),
        (array_of(dtype=7), "booleans, whole numbers or floats"),
        (array_of(shape=[3]), "has 8 bytes of data"),
        (array_of(shape=[2**40, 2**40]), "has 8 bytes of data"),
        (array_of(shape=[-2]), "shape must be"),
        (array_of(shape=[1] * 9), "shape must be"),
        (array_of(shape="2"), "shape must be"),
        (array_of(shape=[True, 2]), "shape must be"),
        (array_of(data="text"), "data must be bytes; got a str"),
        (msgpack.packb({"s": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}), "must hold such a number"),
        (msgpack.packb({"s": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}}), "must hold such a number"),
    ],
)
def test_a_frame_that_is_wrong_is_refused_with_the_reason(frame: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        unpack(frame)


def test_nesting_is_bounded() -> None:
    nested: object = 1
    for _ in range(MAX_NESTING):
        nested = {"a": nested}
    assert unpack(pack(nested))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProtocolError, match="nests more than"):
        unpack(pack({"a": nested}))


def test_mutated_frames_are_read_or_refused(served: Served) -> None:
    rng = random.Random(0)
    for _ in range(3000):
        frame = bytearray(ARRAY if rng.random() < 0.5 else describe(served))
        for _ in range(rng.randint(1, 4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        with contextlib.suppress(ProtocolError):
            unpack(bytes(frame))


def test_a_description_comes_back_and_a_strangers_is_refused(served: Served) -> None:
    assert read_description(describe(served)) == served
    for change, message in (
        ({"protocol": "other"}, "it speaks 'other'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 10**6}, "horizons are at most"),
        ({"noise_shape": [2**30, 2**30]}, "a shape is not one"),
        ({"observation_shapes": {"a\nb": [2]}}, "printable"),
        ({"surprise": 1}, "surprise"),
        ({"action_shape": "x"}, "must be"),
    ):
        with pytest.raises(ProtocolError, match=message):
            read_description(pack(unpack(describe(served)) | change))
    with pytest.raises(ProtocolError, match="the server says 'busy'"):
        read_description("busy")
