"""Malicious and broken checkpoints, made byte by byte. FILES: name -> (content, words of the error or None).

Most of them are normal checkpoints, {"extra": ..., "state_dict": {"w": tensor([0., 1., 2., 3.])}}, whose attack is in
"extra", which comes first. None means that the file is read without an error and without running the attack.
"""

import io
import marshal
import random
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from zlib import crc32

import torch
from safetensors.torch import save

COMMAND = "touch canary"
CODE = "open('canary', 'w').close()"


# Opcodes


def text(string: str) -> bytes:
    return b"X" + struct.pack("<L", len(string.encode())) + string.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def data(raw: bytes) -> bytes:
    return b"B" + struct.pack("<L", len(raw)) + raw


def tuple_(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def list_(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_(*arguments) + b"R"


def storage(count: int = 4, key: str = "0", kind: bytes = name("torch", "FloatStorage")) -> bytes:
    return tuple_(text("storage"), kind, text(key), text("cpu"), number(count)) + b"Q"


FLOATS = storage()


def tensor(
    size: Iterable[int] = (4,), stride: Iterable[int] = (1,), offset: int = 0, over: bytes = FLOATS, more: bytes = b""
) -> bytes:
    hooks = call(name("collections", "OrderedDict"))
    places = number(offset), tuple_(*map(number, size)), tuple_(*map(number, stride))
    return call(name("torch._utils", "_rebuild_tensor_v2"), over, *places, b"\x89", hooks, more)


REBUILD = name("torch._utils", "_rebuild_tensor_v2")
PLACES = b"K\0", tuple_(b"K\4"), tuple_(b"K\1"), b"\x89", b"N"  # offset, size, stride, requires_grad, hooks
UNTYPED = storage(16, kind=name("torch.storage", "UntypedStorage"))


def checkpoint(extra: bytes) -> bytes:
    return b"\x80\x02}(" + text("extra") + extra + text("state_dict") + b"}" + text("w") + tensor() + b"su."


# Archives


@dataclass
class Member:
    """A member of a zip archive, and false values for its two headers."""

    name: str
    content: bytes
    central: dict = field(default_factory=dict)
    local: dict = field(default_factory=dict)


def zipped(members: Iterable[Member], count: int | None = None, start: int = 0, length: int = 0) -> bytes:
    """A plain zip archive. `count`, `start` and `length` put false values into its end record."""
    body, directory, members = bytearray(), bytearray(), list(members)
    for member in members:
        size = len(member.content)
        truth = {
            "name": member.name,
            "flags": 0,
            "method": 0,
            "stored": size,
            "size": size,
            "extra": b"",
            "offset": len(body),
        }
        here, there = truth | member.local, truth | member.central
        for out, entry, head in ((body, here, b"PK\3\4\x14\0"), (directory, there, b"PK\1\2\x14\0\x14\0")):
            label, extra = entry["name"].encode(), entry["extra"]
            numbers = crc32(member.content), entry["stored"], entry["size"], len(label), len(extra)
            out += head + struct.pack("<2H4x3L2H", entry["flags"], entry["method"], *numbers)
            out += (struct.pack("<10xL", entry["offset"]) if out is directory else b"") + label + extra
        body += member.content
    count = len(members) if count is None else count
    end = struct.pack("<4x2HLLH", count, count, len(directory) + length, len(body) + start, 0)
    return bytes(body + directory + b"PK\5\6" + end)


WEIGHTS = struct.pack("<4f", 0, 1, 2, 3)


def archive(pickle: bytes, *more: Member, weights: bytes = WEIGHTS, both: dict | None = None, **lies: dict) -> bytes:
    """The archive that torch.save writes for a pickle and one storage, with false values in the storage's headers."""
    lies = {"central": both, "local": both} if both else lies
    members = Member("archive/data.pkl", pickle), Member("archive/data/0", weights, **lies)
    return zipped([*members, Member("archive/version", b"3\n"), *more])


GOOD = checkpoint(b"N")


def saved(thing: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


def repacked(method: int, *more: tuple[str, bytes]) -> bytes:
    """A good checkpoint, packed by zipfile."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for member, content in (("archive/data.pkl", GOOD), ("archive/data/0", WEIGHTS), *more):
            out.writestr(member, content)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as out:
        out.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


# Attacks

SYSTEM, SHELL, PYTHON = name("os", "system"), text(COMMAND), text(CODE)
RUN = call(SYSTEM, SHELL)
OBJECT = name("argparse", "Namespace") + b")\x81"  # an object that takes any attribute
IMPORT_OS = call(name("builtins", "__import__"), text("os"))
MAP = call(name("builtins", "map"), SYSTEM, tuple_(SHELL))
MARSHALLED = call(name("marshal", "loads"), data(marshal.dumps(compile(CODE, "x", "exec"))))
ACTION = name("argparse", "Action")

WORKING = {  # Python's unpickler runs these
    "global-reduce": RUN,
    "stack-global-reduce": text("os") + text("system") + b"\x93" + tuple_(SHELL) + b"R",
    "dotted-name": b"\x80\4" + text("shutil") + text("os.system") + b"\x93" + tuple_(SHELL) + b"R",
    "build-setstate": OBJECT + b"}" + text("__setstate__") + SYSTEM + b"sb" + SHELL + b"b",
    "build-slots-of-class": ACTION
    + b"N}"
    + text("__setstate__")
    + SYSTEM
    + b"s\x86b0"
    + ACTION
    + b")\x81"
    + SHELL
    + b"b",
    "memo": SYSTEM + b"r\xff\x00\x00\x000j\xff\x00\x00\x00" + tuple_(SHELL) + b"R",
    "hidden-by-pop": RUN + b"0N",
    "eval": call(name("builtins", "eval"), PYTHON),
    "exec": call(name("__builtin__", "eval"), text(f"exec({CODE!r})")),
    "getattr": call(call(name("builtins", "getattr"), IMPORT_OS, text("system")), SHELL),
    "list-map": call(name("builtins", "list"), MAP),
    "ordered-dict-of-map": call(name("collections", "OrderedDict"), MAP),
    "set-of-map": call(name("builtins", "set"), MAP),
    "partial": call(call(name("functools", "partial"), SYSTEM, SHELL)),
    "methodcaller": call(call(name("operator", "methodcaller"), text("system"), SHELL), IMPORT_OS),
    "weakref-finalize": call(call(name("weakref", "finalize"), OBJECT, SYSTEM, SHELL)),
    "code-object": call(call(name("types", "FunctionType"), MARSHALLED, call(name("builtins", "globals")))),
    "subprocess": call(name("subprocess", "check_output"), list_(text("touch"), text("canary"))),
    "timeit": call(name("timeit", "timeit"), PYTHON, text("pass"), name("time", "time"), b"K\x01"),
    "pickle-in-pickle": call(name("_pickle", "loads"), data(RUN + b".")),
    "numpy-runstring": call(name("numpy.testing._private.utils", "runstring"), PYTHON, b"}"),
    "torch-collect-env": call(name("torch.utils.collect_env", "run"), SHELL),
    "torch-exec-wrapper": call(name("torch.jit.unsupported_tensor_ops", "execWrapper"), PYTHON, b"}", b"}"),
    "as-key": b"}" + RUN + b"Ns",
    "as-hooks": call(REBUILD, storage(), *PLACES[:-1], RUN),
}
WORKING_REFUSED = {  # Python's unpickler runs these too; our reader refuses them
    "inst": (b"(" + SHELL + b"ios\nsystem\n", "opcode INST"),
    "obj": (b"(" + SYSTEM + SHELL + b"o", "opcode OBJ"),
    "ext1": (b"\x82\x71" + tuple_(SHELL) + b"R", "opcode EXT1"),
    "ext2": (b"\x83\x71\x01" + tuple_(SHELL) + b"R", "opcode EXT2"),
    "ext4": (b"\x84\x71\x01\x01\x00" + tuple_(SHELL) + b"R", "opcode EXT4"),
    "text-opcodes": (b"cos\nsystem\n(V" + COMMAND.encode() + b"\ntR", "opcode UNICODE"),
    "persistent-id-of-call": (tuple_(text("storage"), RUN, text("0"), text("cpu"), b"K\x04") + b"Q", "no storage"),
    "storage-by-call": (tensor(over=RUN), "not a plain view"),
}
OTHER = {  # these attacks need luck, another file or torch's unpickler
    "newobj": (SYSTEM + tuple_(SHELL) + b"\x81", None),
    "newobj-ex": (name("subprocess", "Popen") + tuple_(SHELL) + b"}" + text("shell") + b"\x88s\x92", None),
    "torch-load": (call(name("torch", "load"), text("global-reduce.ckpt")), None),
    "torch-hub": (call(name("torch.hub", "load"), text("."), text("x")), None),
    "numpy-load": (call(name("numpy", "load"), text("x.npy"), b"N", b"\x88"), None),
    "numpy-scalar": (call(name("numpy.core.multiarray", "scalar"), name("numpy", "dtype"), data(b"\0" * 8)), None),
    "rebuild-wrapper": (call(name("torch._utils", "_rebuild_wrapper_subclass"), SYSTEM, SHELL), None),
    "rebuild-from-type": (
        call(name("torch._tensor", "_rebuild_from_type_v2"), SYSTEM, SYSTEM, tuple_(SHELL), b"}"),
        None,
    ),
    "persid": (b"Pos.system\n", "opcode PERSID"),
    "persistent-id-of-callable": (tuple_(text("storage"), SYSTEM, SHELL, SHELL, b"K\x04") + b"Q", "no storage"),
    "persistent-id-is-callable": (SYSTEM + b"Q", "no storage"),
    "persistent-module": (tuple_(text("module"), SYSTEM, text("x.py"), text(CODE)) + b"Q", "no storage"),
    "calls-a-tensor": (tensor() + b")R", "calls something"),
}

# Pickles with false values

FLOOD = 500_000  # opcodes; a little below the limit
V3 = name("torch._utils", "_rebuild_tensor_v3")
LAUGHS = b"]q\0" + b"".join(b"0" + list_(*[b"h" + bytes([i])] * 10) + b"q" + bytes([i + 1]) for i in range(60))
LONG = text("a" * 2**22) + b"q\x000"  # recalled by h 0
CHAIN = (
    name("x", "y") + b"q\0" + b"h\0)R" * (FLOOD // 4) + b"b" * (FLOOD // 4)
)  # each object is the state of the one before it
COLLIDING = (
    b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(10_000)) + b"u"
)  # all keys have the same hash in Python
TENSORS = REBUILD + b"q\x000" + tuple_(storage(), *PLACES) + b"q\x010" + list_(b"h\0h\1R" * (FLOOD // 3))

LYING = {
    "size-negative": (tensor(size=[-4]), "negative"),
    "stride-negative": (tensor(stride=[-1]), "negative"),
    "offset-negative": (tensor(offset=-1), "negative"),
    "size-2**200": (tensor(size=[2**200]), "huge"),
    "size-2**47": (tensor(size=[2**47]), "outside its storage"),
    "size-overflowing": (tensor(size=[2**32, 2**32], stride=[2**32, 1]), "more elements than can be counted"),
    "size-empty-overflowing": (tensor(size=[2**40, 2**40, 0], stride=[1, 1, 1]), "more elements than can be counted"),
    "size-without-stride": (tensor(size=[2, 2]), "missing size"),
    "size-of-strings": (call(REBUILD, storage(), b"K\0", tuple_(text("4")), *PLACES[2:]), "missing size"),
    "size-no-tuple": (call(REBUILD, storage(), b"K\0", b"K\4", *PLACES[2:]), "not a plain view"),
    "dimensions-65": (tensor(size=[1] * 65, stride=[1] * 65), "missing size"),
    "view-too-long": (tensor(size=[5]), "outside its storage"),
    "view-too-far": (tensor(offset=1), "outside its storage"),
    "view-stride-too-far": (tensor(size=[2], stride=[4]), "outside its storage"),
    "view-empty-too-far": (tensor(size=[0], offset=5), "outside its storage"),
    "view-expanded": (tensor(size=[2**40], stride=[0]), "overlaps itself"),
    "view-overlapping": (tensor(size=[2, 3], stride=[1, 1]), "overlaps itself"),
    "view-conjugated": (tensor(more=b"}" + text("conj") + b"\x88s"), "not a plain view"),
    "view-of-one-argument": (call(REBUILD, storage()), "not a plain view"),
    "storage-too-long": (tensor(over=storage(5)), "has 16 bytes"),
    "storage-too-short": (tensor(over=storage(3)), "has 16 bytes"),
    "storage-2**60": (tensor(over=storage(2**60)), "has 16 bytes"),
    "storage-10**600": (tensor(over=storage(10**600)), "has 16 bytes"),
    "storage-negative": (tensor(over=storage(-4)), "has 16 bytes"),
    "storage-missing": (tensor(over=storage(4, "1")), "no member 'data/1'"),
    "storage-elsewhere": (tensor(over=storage(4, "../../../etc/passwd")), "no member"),
    "storage-unknown-type": (tensor(over=storage(kind=name("torch", "QInt8Storage"))), "no storage of a type"),
    "type-misspelt": (call(V3, UNTYPED, *PLACES, name("torch", "float33")), "not a plain view"),
    "type-wider-than-storage": (call(V3, UNTYPED, *PLACES, name("torch", "float64")), "outside its storage"),
    "key-twice": (b"}(" + text("a") + b"N" + text("a") + b"Nu", "'a' twice"),
    "key-list": (b"}]Ns", "a list as the key"),
    "key-tensor": (b"}" + tensor() + b"Ns", "a Tensor as the key"),
    "key-nested-tuple": (b"})\x85Ns", "a tuple as the key"),
    "key-collisions": (COLLIDING, "that are not strings"),
    "items-odd": (b"}(" + text("a") + b"u", "half an item"),
    "items-of-tensor": (tensor() + text("a") + b"Ns", "no dictionary"),
    "append-to-tuple": (b")Na", "no list"),
    "append-to-dictionary": (b"}Na", "no list"),
    "build-on-tensor": (tensor() + b"}" + text("data") + SYSTEM + b"sb", None),
    "parameter-of-string": (call(name("torch._utils", "_rebuild_parameter"), text("x"), b"\x88", b"N"), None),
    "size-class-of-strings": (call(name("torch", "Size"), tuple_(text("x"))), None),
    "memo-index-2**32": (b"Nr\xff\xff\xff\xff", None),
    "memo-empty": (b"h\x63", "recalls entry 99"),
    "string-4-gigabytes": (b"X\xff\xff\xff\xffabc", "pickle is broken"),
    "string-2**62": (b"\x8d" + struct.pack("<Q", 2**62) + b"abc", "pickle is broken"),
    "string-not-utf8": (b"X\2\0\0\0\xff\xfe", "pickle is broken"),
    "bytes-4-gigabytes": (b"B\xff\xff\xff\xffabc", "pickle is broken"),
    "bytes-2**63": (b"\x8e" + struct.pack("<Q", 2**63) + b"abc", "pickle is broken"),
    "bytearray": (b"\x96" + struct.pack("<Q", 1) + b"a", "opcode BYTEARRAY8"),
    "out-of-band": (b"\x97", "opcode NEXT_BUFFER"),
    "dup": (b"N20", "opcode DUP"),
    "long-2-gigabytes": (b"\x8b\xff\xff\xff\x7fabc", "pickle is broken"),
    "long-256-bytes": (b"\x8b\0\1\0\0" + b"a" * 256, "opcode LONG4"),
    "decimal": (b"I" + b"9" * 100_000 + b"\n", "pickle is broken"),
    "frame-2**63": (b"\x95" + struct.pack("<Q", 2**63) + b"N", None),
    "name-of-number": (b"K\1K\1\x93", "name that is no string"),
    "opcode-unknown": (b"\xff", "pickle is broken"),
    "deep-tuples": (b")" + b"\x85" * 200_000, "nested"),
    "deep-lists": (b"]" * 100_000 + b"a" * 99_999, "nested"),
    "deep-stubs": (CHAIN, None),
    "list-in-itself": (b"]q\0h\0a", "within themselves"),
    "dictionary-in-itself": (b"}q\0" + text("a") + b"h\0s", "within themselves"),
    "stub-in-itself": (OBJECT + b"q\0h\0b", None),
    "billion-laughs": (LAUGHS, None),
    "long-name-used-often": (LONG + b"](" + b"h\0h\0\x93" * 200 + b"e", "a name of 8388608 letters"),
    "long-key-twice": (LONG + b"}(" + (tuple_(*[b"h\0"] * 8) + b"N") * 2 + b"u", "key a tuple of 8 twice"),
    "flood-of-marks": (b"(" * FLOOD * 2, "more than 524288 opcodes"),
    "flood-of-dictionaries": (list_(b"}" * FLOOD), None),
    "flood-of-full-dictionaries": (text("a") + b"q\0" + b"0" + list_(b"}h\0Ns" * (FLOOD // 4)), None),
    "flood-of-tensors": (TENSORS, None),
    "stack-empty": (b"00", "not there"),
    "mark-not-set": (b"tt", "never set"),
}
RAW = {  # the whole pickle is bad
    "pickle-empty": (b"", "pickle is broken"),
    "pickle-without-end": (GOOD[:-1], "pickle is broken"),
    "pickle-without-end-of-name": (b"\x80\2cos", "pickle is broken"),
    "pickle-of-nothing": (b"\x80\2.", "one object"),
    "pickle-of-two": (b"\x80\2NN.", "one object"),
    "pickle-with-open-mark": (b"\x80\2N(.", "one object"),
    "pickle-is-archive": (archive(GOOD), "pickle"),
    "pickle-17-mebibytes": (b"N0" * (17 << 19), "at most 16777216"),
}


# Files of another kind, and false headers


def overlapping() -> bytes:
    """An archive in which data/1 lies inside data/0 and has its own header."""
    inside = zipped([Member("archive/data/1", WEIGHTS)])[: 30 + 14 + 16]
    place = 30 + 16 + len(GOOD) + 30 + 14
    return archive(GOOD, Member("archive/data/1", WEIGHTS, central={"offset": place}), weights=inside)


def wide(**values: int) -> dict:
    """Header values that put these fields into a zip64 extra field, with 64 bits each."""
    numbers = [values[key] for key in ("size", "stored", "offset") if key in values]
    extra = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)
    return dict.fromkeys(values, 0xFFFFFFFF) | {"extra": extra}


HALF = {"size": 8, "stored": 8}
FOREIGN = {
    "empty": (b"", "is empty"),
    "web-page": (b"\n<!DOCTYPE html><title>404</title>", "web page"),
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n", "git lfs pull"),
    "safetensors": (save({"w": torch.arange(4.0)}), "is a .safetensors file"),
    "before-1.6": (saved({"w": torch.arange(4.0)}, _use_new_zipfile_serialization=False), "save it as .safetensors"),
    "tar": (tarred(), "save it as .safetensors"),
    "bare-pickle": (b"\x80\2" + RUN + b".", "save it as .safetensors"),
    "noise": (random.Random(0).randbytes(999), "is not a torch checkpoint"),
    "zip-of-text": (zipped([Member("a.txt", b"hello, world")]), "one folder with a data.pkl"),
    "zip-of-nothing": (zipped([]), "not a torch checkpoint"),
    "two-folders": (archive(GOOD, Member("other/data.pkl", GOOD)), "one folder"),
    "pickle-twice": (archive(GOOD, Member("archive/data.pkl", checkpoint(RUN))), "'archive/data.pkl' twice"),
    "storage-twice": (archive(GOOD, Member("archive/data/0", WEIGHTS)), "'archive/data/0' twice"),
    "deflated": (repacked(zipfile.ZIP_DEFLATED), "compressed"),
    "zip-bomb": (repacked(zipfile.ZIP_DEFLATED, ("archive/data/1", bytes(64 << 20))), "compressed"),
    "lzma": (repacked(zipfile.ZIP_LZMA), "compressed"),
    "stored-by-zipfile": (repacked(zipfile.ZIP_STORED), None),
    "encrypted": (archive(GOOD, central={"flags": 1}), "encrypted"),
    "members-overlapping": (overlapping(), "overlap"),
    "two-members-one-place": (archive(GOOD, Member("archive/data/1", b"", central={"offset": 0})), "do not agree"),
    "headers-of-two-names": (archive(GOOD, local={"name": "archive/data/9"}), "do not agree"),
    "headers-of-two-sizes": (archive(GOOD, local=HALF), "do not agree"),
    "headers-of-two-methods": (archive(GOOD, local={"method": 8}), "do not agree"),
    "header-without-size": (archive(GOOD, local={"size": 0, "stored": 0}), "do not agree"),
    "size-beyond-file": (archive(GOOD, both={"size": 2**31, "stored": 2**31}), "outside the file"),
    "size-2**63": (archive(GOOD, both=wide(size=2**63, stored=2**63)), "outside the file"),
    "size-into-neighbour": (archive(GOOD, both={"size": 20, "stored": 20}), "overlap"),
    "offset-beyond-file": (archive(GOOD, central={"offset": 2**31}), "outside the file"),
    "offset-2**63": (archive(GOOD, central=wide(offset=2**63)), "outside the file"),
    "wide-field-missing": (archive(GOOD, both={"size": 2**32 - 1, "stored": 2**32 - 1}), "outside the file"),
    "wide-field-used": (archive(GOOD, both=wide(size=16, stored=16)), None),
    "directory-count": (zipped([Member("archive/data.pkl", GOOD)], count=2), "directory is broken"),
    "directory-start": (zipped([Member("archive/data.pkl", GOOD)], start=-4), "directory is broken"),
    "directory-length": (zipped([Member("archive/data.pkl", GOOD)], length=2**31), "directory is broken"),
    "directory-entry": (archive(GOOD).replace(b"PK\1\2", b"PK\1\3", 1), "directory is broken"),
    "something-behind": (archive(GOOD) + b"PK", "something follows it"),
    "something-in-front": (b"#!/bin/sh\n" + archive(GOOD), "not a torch checkpoint"),
    "big-endian": (archive(GOOD, Member("archive/byteorder", b"big")), "big-endian"),
    "byteorder-long": (archive(GOOD, Member("archive/byteorder", b"little" * 99)), "should have at most 6"),
    "weights-nan": (archive(GOOD, weights=struct.pack("<4f", *[float("nan"), float("inf")] * 2)), None),
    "weights-float8": (saved({"extra": None, "state_dict": {"w": torch.arange(4.0).to(torch.float8_e4m3fn)}}), None),
}

FILES: dict[str, tuple[bytes, str | None]] = (
    {key: (archive(checkpoint(extra)), None) for key, extra in WORKING.items()}
    | {key: (archive(checkpoint(extra)), says) for key, (extra, says) in (WORKING_REFUSED | OTHER | LYING).items()}
    | {key: (archive(pickle), says) for key, (pickle, says) in RAW.items()}
    | FOREIGN
)


# Files damaged at random


def cut(whole: bytes) -> Iterator[bytes]:
    """The file truncated at many places, among them each of the last hundred bytes."""
    for end in (*range(1, len(whole) - 100, len(whole) // 100), *range(len(whole) - 100, len(whole))):
        yield whole[:end]


def mutants(whole: bytes, count: int) -> Iterator[bytes]:
    """The file with a few bytes changed in a zip header, in the pickle or anywhere, or with pickle parts moved."""
    draw = random.Random(0)
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        members = {entry.filename: opened.read(entry) for entry in opened.infolist()}
    pickle = members["archive/data.pkl"]
    first = whole.index(pickle)
    heads = [place for place in range(len(whole)) if whole.startswith(b"PK", place)]
    for i in range(count):
        if i % 4 == 3:
            changed = bytearray(pickle)
            for _ in range(draw.randint(1, 3)):
                to, source = draw.randrange(len(changed)), draw.randrange(len(pickle))
                changed[to : to + draw.randrange(30)] = pickle[source : source + draw.randrange(30)]
            yield zipped(Member(*item) for item in (members | {"archive/data.pkl": bytes(changed)}).items())
            continue
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            places = (
                draw.choice(heads) + draw.randrange(50),
                first + draw.randrange(len(pickle)),
                draw.randrange(len(whole)),
            )
            changed[min(places[i % 4], len(whole) - 1)] = draw.choice([draw.randrange(256), 0, 255, *b"R.c(t0"])
        yield bytes(changed)
