"""Damages bytes, JSON texts and .safetensors files at random, in ways that disks, scripts and strangers do."""

import copy
import json
import random
import struct
from typing import Any

NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
PIECES = [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\x7f", b"[" * 1000, b'{"a":' * 100, b"\n", b'"']

HUGE = "a number of 5000 digits"  # json.dumps can't write it
ODD = [None, True, False, -1, 0, 1, 2, 3, 7, 16, 64, 1000, 2**20, 2**31, 2**63, 2**64, 10**30, 10**400, HUGE]
ODD += [0.0, -0.0, 0.5, 1e-320, 1e-30, 1e30, 1e308, -1e308, float("nan"), float("inf"), -float("inf")]
ODD += ["", "x", "x" * 5000, "\0", "\ud800", "\u202e\u0301", "\n\r\x1b[31m", "../../etc/passwd", "/dev/zero", "gelu"]
ODD += [[], {}, [[]], [0], [0] * 10_000, ["x", 1], {"a": {}}, {"": None}, [[1, 2], [3]], {"content": 1}]


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """The content with some bytes changed, removed, added or repeated. The first 200 are changed as often as others."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else min(len(data), rng.randrange(200))
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.randrange(256)
            case 2:
                del data[at : at + rng.choice([1, 8, 100, len(data)])]
            case 3:
                data[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
            case 4:
                piece = rng.choice(PIECES)
                data[at : at + len(piece)] = piece
            case 5:
                data += data[at : at + rng.choice([1, 100, 10_000])]
            case 6:
                number = rng.choice([*NUMBERS, rng.getrandbits(64)])
                data[at : at + 8] = struct.pack(rng.choice("<>") + "Q", number)
    return bytes(data)


def damage_json(rng: random.Random, text: str) -> bytes:
    """A JSON text that is damaged as a tree, as bytes, or both."""
    if rng.random() < 0.02:
        return rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"\0" * 1000, b"1" * 100_000])
    if rng.random() < 0.75:
        text = json.dumps(damage_tree(rng, json.loads(text))).replace(json.dumps(HUGE), "9" * 5000)
    return damage_bytes(rng, text.encode()) if rng.random() < 0.25 else text.encode()


def damage_tree(rng: random.Random, tree: Any) -> Any:
    """A JSON value with some of its parts removed, renamed, swapped, or replaced by odd ones. Changes `tree`."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        box = pick_box(rng, tree)
        if box is None or rng.random() < 0.02:
            return odd(rng)
        keys = list(box) if isinstance(box, dict) else list(range(len(box)))
        key, other = rng.choice(keys), rng.choice(keys)
        match rng.randrange(6):
            case 0:
                del box[key]
            case 1 if isinstance(box, dict):
                name = rng.choice(["", "x", "\0", "\ud800", key[:-1], key * 3, *keys[:20]])
                box[name] = box.pop(key)
            case 2:
                box[key], box[other] = box[other], box[key]
            case 3 if type(box[key]) in (int, float) and abs(box[key]) < 1e30:
                box[key] = rng.choice([-box[key], box[key] + 1, box[key] * 2, box[key] / 2, [box[key]], str(box[key])])
            case _:
                box[key] = odd(rng)
    return tree


def pick_box(rng: random.Random, tree: Any) -> dict | list | None:
    """The tree or an object or list in it that is not empty, if there is one."""
    box = None
    while isinstance(tree, dict | list) and tree and (box is None or rng.random() < 0.7):
        box, tree = tree, rng.choice(list(tree.values()) if isinstance(tree, dict) else tree)
    return box


def odd(rng: random.Random) -> Any:
    """A value that few files have where it lands, or one that is nested deeply."""
    if rng.random() > 0.05:
        return copy.deepcopy(rng.choice(ODD))
    tree: Any = 1
    for _ in range(rng.choice([10, 40, 500])):
        tree = [tree] if rng.random() < 0.5 else {"a": tree}
    return tree


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A .safetensors file that is damaged in its metadata, its numbers, the rest of its header, or as bytes."""
    if rng.random() < 0.3:
        return damage_bytes(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.get("__metadata__", {})
    inner = [key for key, text in metadata.items() if text.startswith("{")]
    if inner and rng.random() < 0.5:
        key = rng.choice(inner)
        metadata[key] = damage_json(rng, metadata[key]).decode(errors="replace")
    elif rng.random() < 0.3:
        at = rng.randrange(max(1, len(body) - 8))
        body = body[:at] + rng.choice([b"\xff" * 4, struct.pack("<f", float("nan")), b"\0" * 8]) + body[at + 4 :]
    else:
        header = damage_tree(rng, header)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).replace(json.dumps(HUGE), "9" * 5000)
    return struct.pack("<Q", len(text.encode(errors="replace"))) + text.encode(errors="replace") + body
