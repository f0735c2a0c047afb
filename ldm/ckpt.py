"""Reads a pickled .ckpt without running it.

The format. Since torch 1.6, `torch.save` writes a zip archive whose members are stored, not compressed:

    NAME/data.pkl     a pickle of the object, in which a tensor is a shape laid over a numbered storage
    NAME/data/0 ...   the storages' bytes, each on a 64-byte boundary
    NAME/byteorder    "little", since torch 2.1; further members say nothing about the content

The threat. A pickle is a program for a small stack machine, and Python's machine imports and calls whatever the
program names: to unpickle a stranger's file is to run it. torch's answer, `weights_only=True`, refuses the official
Stable Diffusion files, which name classes of pytorch_lightning; and it had holes of its own before torch 2.10
(CVE-2025-32434 ran code, CVE-2026-24747 took sizes on trust).

The answer. `_Machine` is a machine of our own: what `_step` does not list does not happen. It builds containers,
numbers, strings and tensors. A name in the file stays a name, in a `Stub`, unless it is one of the types listed below;
called, it gives another stub, unless it is one of the five that `_call` has code of ours for. Nothing is imported,
looked up or called on the file's behalf, and there is no other reader to fall back to.

Sizes are checked before they are used, so memory is bounded by the limits below. Tensors are views of the mapped
file: reading takes no second copy, and writing to one does not reach the file.
"""

import math
import mmap
import pickletools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.archive import Archive, show
from ldm.errors import InputError

MAX_PICKLE = 64 << 20  # bytes of data.pkl; 3,000 tensors take 0.5 MB
MAX_OPCODES = 1 << 19  # a tensor takes 32: enough for 16,000
MAX_ODD_KEYS = 1 << 12  # dictionary keys that are not strings: their hashes can be made to collide
MAX_DEPTH = 64  # containers within containers
MAX_DIMS = 64  # torch's own

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,  # the tensor itself names its type then
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
DTYPES = {str(t): t for t in (*STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, *FLOAT8)}


@dataclass(eq=False, repr=False, slots=True)
class Stub:
    """Something that a file names and we do not have: its name, what it was to be called with, and its state.

    It may contain itself. What was to be appended to it, or stored in it by key, is dropped.
    """

    name: str
    args: Any = ()
    state: Any = None

    def __repr__(self) -> str:
        return f"<stub {show(self.name)}>"


@dataclass(eq=False, repr=False, slots=True)
class _Storage(Stub):
    content: torch.UntypedStorage = None
    dtype: torch.dtype = None


KEYS = (str, bytes, int, float, type(None), Stub)  # of dictionaries; all quickly hashed


def read(path: str | Path) -> Any:
    """Returns the object that `torch.save` wrote to `path`: dicts, lists, tuples, numbers, strings and tensors.

    Tensors have the stored type (float8 included), strides and sharing, are on the CPU and require no gradient. Their
    values are not looked at: NaN stays NaN. Sets, the bytes of protocol 2 and all other objects are `Stub`s.
    Raises InputError for anything but a whole checkpoint: another or an older format, a file that is cut short or
    contradicts itself, a tensor that reaches outside its storage or overlaps itself, a key that comes twice.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError("is a folder, not a checkpoint" if path.is_dir() else "no such file")
        with open(path, "rb") as file:
            head = file.read(512)
            if not head.startswith(b"PK\x03\x04"):
                raise InputError(_other(head))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Machine(Archive(path, data)).run()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _other(head: bytes) -> str:
    """What a file that is no zip archive is likely to be, from its first 512 bytes, and what to do."""
    if not head:
        return "is empty; fetch it again"
    if head[8:9] == b"{":
        return "is a .safetensors file; give it that suffix"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a checkpoint; fetch it again"
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "is in torch's format of before 1.6, or a bare pickle; where it was made, save it as .safetensors"
    return "is not a torch checkpoint"


class _Machine:
    """A stack of stacks: MARK opens one, and the opcode that takes the marked items closes it."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.slices: dict[str, torch.UntypedStorage] = {}  # one for all tensors that share it
        self.stacks: list[list] = [[]]
        self.memo: dict[int, Any] = {}
        self.odd_keys = 0

    def run(self) -> Any:
        if "byteorder" in self.archive.members and self.archive.read("byteorder", 6) != b"little":
            raise InputError("is big-endian; save it as .safetensors where it was made")
        for count, (opcode, argument, _) in enumerate(_decode(self.archive.read("data.pkl", MAX_PICKLE))):
            if count == MAX_OPCODES:
                raise InputError(f"its pickle has more than {MAX_OPCODES} opcodes")
            self._step(opcode.name, argument)
        if len(self.stacks) > 1 or len(self.stacks[0]) != 1:
            raise InputError("its pickle does not end with one object")
        _insist_shallow(self._top())
        return self._top()

    def _step(self, opcode: str, argument: Any) -> None:
        """One opcode. This is all that a file can make us do."""
        push, pop, marked = self._push, self._pop, self._marked
        match opcode:
            case "PROTO" | "FRAME" | "STOP":  # a frame's length only helps those who read from a stream
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                push(argument)
            case "MARK":
                self.stacks.append([])
            case "POP":
                pop(1)
            case "POP_MARK" | "ADDITEMS":
                marked()
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                push(self._recall(argument))
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(pop(int(opcode[-1]))))
            case "TUPLE":
                push(tuple(marked()))
            case "EMPTY_LIST":
                push([])
            case "APPEND":
                self._extend(pop(1))
            case "APPENDS":
                self._extend(marked())
            case "EMPTY_DICT":
                push({})
            case "SETITEM":
                self._set(pop(2))
            case "SETITEMS":
                self._set(marked())
            case "EMPTY_SET":
                push(Stub("builtins.set"))
            case "FROZENSET":
                push(Stub("builtins.frozenset", tuple(marked())))
            case "GLOBAL":
                push(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                push(_named(*pop(2)))
            case "REDUCE" | "NEWOBJ":
                push(self._call(*pop(2)))
            case "NEWOBJ_EX":
                push(self._call(*pop(3)[:2]))
            case "BUILD":
                self._build(*pop(1))
            case "BINPERSID":
                push(self._storage(*pop(1)))
            case _:
                raise InputError(f"uses the pickle opcode {opcode}, which torch.save does not")

    def _call(self, function: Any, arguments: Any) -> Any:
        """What a file calls. Five names mean something, and it is our code that answers; a Stub notes any other."""
        if not isinstance(function, Stub):
            raise InputError("its pickle calls something that is not a name")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                return OrderedDict()
            case "torch.Size", (tuple(size),) if _are_counts(size):
                return torch.Size(size)
            case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3", tuple():
                return _tensor(arguments)
            case "torch._utils._rebuild_parameter", (Tensor() as tensor, _, _):
                return tensor
        return Stub(function.name, arguments)

    def _storage(self, reference: Any) -> _Storage:
        """('storage', type, number, device, elements): all that torch.save refers to outside the pickle."""
        match reference:
            case ("storage", Stub(name=kind), str(key), _, int(count)) if kind in STORAGES:
                dtype = STORAGES[kind]
            case _:
                raise InputError("its pickle refers to something that is no storage of a type we know")
        if key not in self.slices:
            self.slices[key] = self.archive.map(f"data/{key}")
        content = self.slices[key]
        if content.nbytes() != count * dtype.itemsize:
            raise InputError(f"its storage {show(key)} has {content.nbytes()} bytes, not {show(count)} x {dtype}")
        return _Storage(kind, content=content, dtype=dtype)

    def _build(self, state: Any) -> None:
        """Sets the state of the object on top; an OrderedDict's, where modules keep a version, is dropped."""
        if isinstance(self._top(), Stub):
            self._top().state = state

    def _extend(self, items: list) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Stub):
            raise InputError("its pickle appends to something that is no list")

    def _set(self, pairs: list) -> None:
        target = self._top()
        if isinstance(target, Stub):
            return
        if not isinstance(target, dict) or len(pairs) % 2:
            raise InputError("its pickle sets items of something that is no dictionary, or half an item")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            parts = key if type(key) is tuple and len(key) <= 8 else (key,)
            self.odd_keys += type(key) is not str
            if not all(isinstance(part, KEYS) for part in parts):
                raise InputError(f"has a {type(key).__name__} as the key of a dictionary")
            if self.odd_keys > MAX_ODD_KEYS:
                raise InputError(f"has over {MAX_ODD_KEYS} keys that are not strings")
            if key in target:
                raise InputError(f"has the key {show(key)} twice in one dictionary")
            target[key] = value

    def _recall(self, index: int) -> Any:
        if index not in self.memo:
            raise InputError(f"its pickle recalls entry {index}, which it never made")
        return self.memo[index]

    def _push(self, value: Any) -> None:
        self.stacks[-1].append(value)

    def _top(self) -> Any:
        if not self.stacks[-1]:
            raise InputError("its pickle uses an object that is not there")
        return self.stacks[-1][-1]

    def _pop(self, count: int) -> list:
        stack = self.stacks[-1]
        if len(stack) < count:
            raise InputError("its pickle uses an object that is not there")
        taken, stack[-count:] = stack[-count:], []
        return taken

    def _marked(self) -> list:
        if len(self.stacks) < 2:
            raise InputError("its pickle closes a mark that it never set")
        return self.stacks.pop()


def _decode(pickle: bytes) -> Iterator[tuple]:
    """(opcode, argument, position) by the standard library's disassembler, which runs nothing."""
    try:
        yield from pickletools.genops(pickle)
    except ValueError as error:
        raise InputError(f"its pickle is broken: {show(str(error))}") from None


def _named(module: Any, name: Any) -> torch.dtype | Stub:
    if not isinstance(module, str) or not isinstance(name, str):
        raise InputError("its pickle has a name that is no string")
    return DTYPES.get(f"{module}.{name}") or Stub(f"{module}.{name}")


def _tensor(arguments: tuple) -> Tensor:
    """A view of a storage: (storage, offset, size, stride, requires_grad, hooks[, dtype]), counted in elements."""
    match arguments:
        case (_Storage() as storage, offset, tuple(size), tuple(stride), _, _):
            dtype = storage.dtype
        case (_Storage() as storage, offset, tuple(size), tuple(stride), _, _, torch.dtype() as dtype):
            pass
        case _:  # anything in a seventh place but a type asks for conjugation or negation
            raise InputError("has a tensor that is not a plain view of a storage")
    if not (len(size) == len(stride) and all(_are_counts(numbers) for numbers in (size, stride, (offset,)))):
        raise InputError("has a tensor with a negative, huge or missing size, stride or offset")
    if math.prod(max(length, 1) for length in size) >= 1 << 62:
        raise InputError("has a tensor with more elements than can be counted")  # also where one length is 0
    reach = 1  # elements from the first to the last, over the dimensions so far
    for step, length in sorted((step, length) for length, step in zip(size, stride, strict=True) if length > 1):
        if step < reach and 0 not in size:
            raise InputError(f"has a tensor of size {show(size)} that overlaps itself; save it .contiguous()")
        reach += step * (length - 1)
    if offset + (0 if 0 in size else reach) > storage.content.nbytes() // dtype.itemsize:
        raise InputError(f"has a tensor of size {show(size)} that reaches outside its storage")
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage.content, offset, size, stride)


def _are_counts(numbers: tuple) -> bool:
    """Whether these can be sizes, strides or offsets."""
    return len(numbers) <= MAX_DIMS and all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)


def _insist_shallow(root: Any) -> None:
    """Refuses containers nested so deeply, or within themselves, that whoever walks them would not come back."""
    level = {0: [root]}
    for _ in range(MAX_DEPTH + 1):
        inner = (item for box in level.values() for item in (box.values() if isinstance(box, dict) else box))
        level = {id(item): item for item in inner if isinstance(item, (dict, list, tuple))}
    if level:
        raise InputError(f"has containers nested over {MAX_DEPTH} deep, or within themselves")
