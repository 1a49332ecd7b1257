"""A recording is a pickle, and a pickle is a program: this reader makes arrays and runs nothing."""

import os
import pickle
import random
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pickle2
from fedfog.ml.pickled_arrays import PickleError, read_arrays

DRAW = np.random.default_rng(1)
ARRAYS: dict[str, Any] = {
    "subject": "S2",
    "signal": {
        "chest": {"ACC": DRAW.normal(size=(300, 3)), "Temp": np.float32(DRAW.normal(size=(9, 1)))},
        "wrist": {"columns": np.asfortranarray(DRAW.normal(size=(5, 3)))},
    },
    "label": np.arange(400, dtype=np.int32),
    "bytes": np.arange(256, dtype=np.uint8),
    "yes": DRAW.random(20) > 0.5,
    "rest": (1, -70_000, True, None, (2, 3)),
}
HEAD = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
FLOATS = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"


def read(content: bytes) -> dict[bytes, Any]:
    return read_arrays(BytesIO(content))


def same(ours: Any, value: Any) -> bool:
    match value:
        case dict():
            return {key.encode() for key in value} == set(ours) and all(
                same(ours[key.encode()], item) for key, item in value.items()
            )
        case str():
            return bool(ours == value.encode())
        case np.ndarray():
            return bool(ours.dtype == value.dtype and np.array_equal(ours, value))
    return bool(ours == value)


@pytest.mark.parametrize("protocol", [0, 2])
def test_what_python_2_wrote_is_read_as_pickle_reads_it(protocol: int) -> None:
    content = pickle2.dumps(ARRAYS, protocol)
    theirs = pickle.loads(content, encoding="latin1")
    assert same(read(content), theirs)
    assert same(read(content), ARRAYS)


def test_array_that_numpy_1_wrote_under_python_2_is_read() -> None:
    """NumPy keeps such a file for its own tests."""
    content = next(Path(np.__file__).parent.rglob("astype_copy.pkl")).read_bytes()
    array = read(b"\x80\x02}U\x01a" + content[2:-1] + b"s.")[b"a"]
    assert np.array_equal(array, pickle.loads(content, encoding="latin1"))


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "value",
    [
        Call(os.mkdir, "ran"),
        Call(os.system, "mkdir ran"),
        Call(eval, "__import__('os').mkdir('ran')"),
        Call(exec, "import os; os.mkdir('ran')"),
        Call(getattr, "", "join"),
        Call(__import__, "antigravity"),
        Call(np.ndarray, (1 << 40,)),
        Call(np.frombuffer, b"12345678"),
        np.array([Call(os.mkdir, "ran")], dtype=object),
        np.array([None], dtype=object),
        np.array(["text"]),
        np.array([1 + 1j]),
        np.float64(1.0),
        np.zeros(2, [("a", "f8")]),
        Exception("text"),
        Path("here"),
        1.5,
        [1],
        {1},
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_but_arrays_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(value, protocol)
    for written in (content, b"(dS'subject'\n" + content[:-1] + b"s."):
        with pytest.raises(PickleError, match=r"asks for|something else|makes no array|holds"):
            read(written)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nmkdir\n(S'ran'\ntR.",
        b"(dS'a'\ncos\nmkdir\n(S'ran'\ntRs.",
        b"(S'ran'\nios\nmkdir\n.",
        b"(cos\nmkdir\nS'ran'\no.",
        b"\x80\x02cos\nmkdir\nU\x03ran\x85\x81.",
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x03ran\x85R.",
        b"cbuiltins\ngetattr\n(S''\nS'join'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'other.pkl'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(I1\ntR.",
        b"\x82\x01.",  # of copyreg's registry
        b"Psomewhere\n.",  # a persistent id
        b"(dS'a'\ncnumpy\nndarray\n(I99999999999\ntRs.",
        b"(dS'a'\n" + HEAD + b"s.",
        b"(dS'a'\n" + FLOATS + b"s.",
        b"(dS'a'\ncnumpy\nndarray\ns.",
        b"(dS'a'\ncnumpy\ndtype\n(S'O8'\nI0\nI1\ntRs.",
        b"(dS'a'\ncnumpy\nndarray\nN(dS'__setstate__'\nI1\nstbs.",
        b"(dS'a'\n" + HEAD + b"(I1\n(I1\nt" + FLOATS + b"I0\n(lp1\nNatbs.",
        b"(dS'a'\n" + HEAD + b"(I1\nI1\n" + FLOATS + b"I0\nS'12345678'\ntbs.",
        b"(dS'a'\n" + HEAD + b"(I1\n(I-1\nI-1\nt" + FLOATS + b"I0\nS'12345678'\ntbs.",
        b"(dS'a'\n" + HEAD + b"(I1\n(S'1'\nt" + FLOATS + b"I0\nS'12345678'\ntbs.",
        b"(dS'a'\n" + HEAD + b"(I1\n(I0\nt" + FLOATS + b"I0\nS''\ntbs.",
        b"(dI1\nI2\ns.",
        b"(I1\nd.",
        b"(dS'a'\ns.",
        b"g7\n.",
        b"N.",
        b"}}.",
        b"}",
        b"",
    ],
)
def test_hostile_opcodes_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PickleError, match="before byte"):
        read(content)
    assert not list(tmp_path.iterdir())


def test_refusal_says_what_the_file_asks_for() -> None:
    with pytest.raises(PickleError, match=r"it asks for posix\.system, which is no part of"):
        read(pickle.dumps(Call(os.system, "true"), 2))


def of_shape(*shape: int) -> bytes:
    lengths = b"".join(b"L%dL\n" % length for length in shape)
    return b"(dS'a'\n" + HEAD + b"(I1\n(" + lengths + b"t" + FLOATS + b"I0\nS'12345678'\ntbs."


def test_array_as_long_as_its_bytes_is_read() -> None:
    assert read(of_shape(1))[b"a"].shape == (1,)


@pytest.mark.parametrize(
    "content",
    [
        of_shape(1 << 40),
        of_shape(1 << 32, 1 << 32),
        of_shape(*[1 << 62] * 1000),
        of_shape(0, 1 << 40),
        b"}T\xff\xff\xff\x7f.",
        b"}T\xff\xff\xff\xff.",
        b"}\x8a\xff.",
        b"}r\xff\xff\xff\xff",
        b"}p99999999999\n",
        b"}" * 3_000_000,
        b"(" * 3_000_000,
        b"(" * 30_000 + b"t" * 30_000 + b"N.",
        # As a key, its hash would take for ever, or all of the process's stack.
        b"(d)" + b"q\x01h\x01\x86" * 60 + b"Ns.",
        b"(d)" + b"\x85" * 90_000 + b"Ns.",
        b"}I" + b"9" * 1_000_000 + b"\n",
        # A long string that is said once must not be copied as often as it is named.
        b"(d" + b"S'" + b"a" * 100_000 + b"'\np1\n" + b"g1\nN" * 20_000 + b"s.",
    ],
    ids=range(16),
)
def test_memory_and_time_are_bounded_whatever_the_file_claims(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PickleError):
            read(content)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10 * len(content) + 20_000_000


def test_long_string_that_many_items_share_is_in_memory_once() -> None:
    items = b"".join(b"S'%d'\ng1\ns" % number for number in range(10_000))
    tracemalloc.start()
    try:
        value = read(b"(dS'a'\nS'" + b"a" * 1_000_000 + b"'\np1\ns" + items + b".")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(value) == 10_001
    assert most < 20_000_000


@pytest.mark.filterwarnings("ignore:invalid:DeprecationWarning")
@pytest.mark.parametrize("protocol", [0, 2])
def test_file_that_is_cut_or_altered_anywhere_is_read_or_refused(protocol: int) -> None:
    content = pickle2.dumps(
        {"subject": "S2", "label": np.arange(3, dtype=np.int32), "x": np.ones((2, 2))}, protocol
    )
    for end in range(len(content)):
        with pytest.raises(PickleError):
            read(content[:end])
    draw = random.Random(protocol)
    for _ in range(3000):
        mutant = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            mutant[draw.randrange(len(mutant))] = draw.choice(content + bytes(range(256)))
        try:
            read(bytes(mutant))
        except PickleError:
            continue
