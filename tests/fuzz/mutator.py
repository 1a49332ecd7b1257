"""Hostile bytes made of valid ones: the same seed gives the same bytes."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Texts that stand where JSON has a value; they are what `json.dumps` would not write.
_RAW = (
    "NaN", "Infinity", "-Infinity", "1e400", "-0.0", "1E-400", "1" + "0" * 30, "-1" + "0" * 400,
    "9" * 4000, "9" * 5000, "1.5", "0", "-1", "9223372036854775808", "18446744073709551616",
    "true", "null", '""', '"a"', '"\\ud800"', '"\\u0000"', '"\\uffff"', '"' + "x" * 5000 + '"',
    "[]", "{}", "[[]]", '{"a":{"a":{}}}', "[" * 60 + "]" * 60, "[" * 20_000, '{"":' * 5000,
    "[" + ",".join(["[]"] * 1000) + "]", '"../../../etc/passwd"', '"__class__"', '"region_0"',
    '"finished"', "2147483648", "0.1e1", "1e100", "1e308", '"2026-01-01"', "0x10", "01", "+1",
)  # fmt: skip
_NUMBERS = (
    "-1", "0", "1", "-0.0", "0.5", "1e-400", "1e15", "1e30", "-1e30", "1e31", "1e308", "1e400",
    "NaN", "Infinity", "1000000", "1000000000000000", "2147483648", "9223372036854775807",
    "9223372036854775808", "18446744073709551615", "18446744073709551616", "9" * 400, "true",
)  # fmt: skip
_MARK = "\u0001raw\u0001"
_BYTES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"')


def mutants(seeds: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Endless mutants of valid messages, which are JSON or `.safetensors`: first all with one odd
    number, then whatever chance makes."""
    for payload in seeds:
        yield from _with_odd_numbers(payload)
    chance = random.Random(seed)
    while True:
        payload = chance.choice(seeds)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            payload = chance.choice(_WAYS)(payload, chance, seeds)
        yield payload


def _with_odd_numbers(payload: bytes) -> Iterator[bytes]:
    """A mutant for each number in the message's own fields and each odd one."""
    fields = payload
    if len(payload) > 8 and payload[8:9] == b"{":
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length])
        fields = header["__metadata__"]["fedfog"].encode()
    for match in re.finditer(rb'(?<=":)-?\d[\d.e+-]*', fields):
        for number in _NUMBERS:
            changed = fields[: match.start()] + number.encode() + fields[match.end() :]
            if fields is payload:
                yield changed
                continue
            header["__metadata__"]["fedfog"] = changed.decode()
            text = json.dumps(header).encode()
            yield len(text).to_bytes(8, "little") + text + payload[8 + length :]


def _flip(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    data = bytearray(payload)
    for _ in range(chance.randint(1, 8)):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _overwrite(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    at, what = chance.randint(0, len(payload)), chance.choice(_BYTES) * chance.randint(1, 9)
    return payload[:at] + what + payload[at + len(what) :]


def _insert(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    at = chance.randint(0, len(payload))
    return payload[:at] + chance.randbytes(chance.choice((1, 2, 8, 300))) + payload[at:]


def _cut(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    first, second = sorted((chance.randint(0, len(payload)), chance.randint(0, len(payload))))
    return chance.choice((payload[:first], payload[first:], payload[:first] + payload[second:]))


def _repeat(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    first, second = sorted((chance.randint(0, len(payload)), chance.randint(0, len(payload))))
    return payload[:second] + payload[first:second] * chance.choice((1, 2, 50)) + payload[second:]


def _splice(payload: bytes, chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    other = chance.choice(seeds)
    return payload[: chance.randint(0, len(payload))] + other[chance.randint(0, len(other)) :]


def _length(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    """Lie about the length of the header."""
    length = int.from_bytes(payload[:8], "little")
    lie = chance.choice((0, 1, length - 1, length + 1, length + 8, 1 << 20, 1 << 32, 1 << 63))
    return (lie % (1 << 64)).to_bytes(8, "little") + payload[8:]


def _numbers(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    """Odd values, or too few or too many, at the end, where a model's tensors are."""
    odd = chance.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x01"))
    return payload[: -chance.randint(0, 60) or None] + odd * chance.randint(0, 20)


def _bloat(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    """Far more fields or elements than there can be, now and then."""
    if chance.random() < 0.98:
        return _fields(payload, chance, _seeds)
    number = chance.choice((5_000, 50_000))
    fields = ",".join(f'"{i}":1' for i in range(number))
    at = payload.find(b"{") + 1
    return payload[:at] + chance.choice((fields + ",", '"x":[' + "[]," * number)).encode()


def _fields(payload: bytes, chance: random.Random, _seeds: Sequence[bytes]) -> bytes:
    """Change the message as JSON: types, names, nesting, duplicates."""
    length = int.from_bytes(payload[:8], "little")
    tensors = 8 <= length <= len(payload) - 8
    text, body = (payload[8 : 8 + length], payload[8 + length :]) if tensors else (payload, b"")
    try:
        value = json.loads(text)
        inner = value["__metadata__"]["fedfog"] if tensors else None
        if isinstance(inner, str) and chance.random() < 0.7:
            value["__metadata__"]["fedfog"] = _change(json.loads(inner), chance).decode()
            text = json.dumps(value).encode()
        else:
            text = _change(value, chance)
    except (ValueError, KeyError, TypeError, RecursionError):
        return payload[::-1]
    return len(text).to_bytes(8, "little") + text + body if tensors else text


def _change(value: Any, chance: random.Random) -> bytes:
    """The JSON text of `value`, of which one node is another."""
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            places.append((node, key))
            if isinstance(child, dict | list) and len(places) < 1000:
                todo.append(child)
    if not places:
        return chance.choice(_RAW).encode()
    node, key = chance.choice(places)
    raw = _NUMBERS if isinstance(node[key], int | float) and chance.random() < 0.8 else _RAW
    way = chance.randrange(6)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[chance.choice(("", "x", "schema_version", "run", "A" * 40, key + " "))] = node[key]
    elif way == 2 and isinstance(node, dict):
        text = json.dumps(value, separators=(",", ":"))
        name = json.dumps(key) + ":"
        return text.replace(name, f"{name}{chance.choice(raw)},{name}", 1).encode(
            "utf-8", "replace"
        )
    elif way == 3:
        other, name = chance.choice(places)
        node[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else None))
    else:
        node[key] = _MARK
    text = json.dumps(value, separators=(",", ":"))
    text = text.replace(json.dumps(_MARK), chance.choice(raw))
    return text.encode(chance.choice(("utf-8",) * 20 + ("utf-16", "utf-8-sig")), "replace")


Way = Callable[[bytes, random.Random, Sequence[bytes]], bytes]
_WAYS: tuple[Way, ...] = (
    _flip, _overwrite, _insert, _cut, _repeat, _splice, _length, _numbers,
    _fields, _fields, _fields, _fields, _fields, _bloat,
)  # fmt: skip
