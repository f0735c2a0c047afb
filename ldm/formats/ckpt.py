"""Reads a pickled .ckpt without running it.

The format. Since torch 1.6, `torch.save` writes a zip archive whose members are stored, not compressed:

    NAME/data.pkl     a pickle of the object, in which a tensor is a shape laid over a numbered storage
    NAME/data/0 ...   the storages' bytes, each on a 64-byte boundary
    NAME/byteorder    "little", since torch 2.1; further members say nothing about the content

Why not torch.load. Unpickling runs what a file says. torch's answer, `weights_only=True`, refuses the official Stable
Diffusion files, which name classes of pytorch_lightning; and it had holes of its own before torch 2.10
(CVE-2025-32434 ran code, CVE-2026-24747 took sizes on trust).

How it is done here. `Archive` opens the zip file and checks every number in it; the `Machine` of unpickle.py builds
the object and runs nothing. This module adds the meaning of torch's names: types, storages, and the five calls in
`_Checkpoint.call`. All other names stay names. There is no other reader to fall back to.

Tensors are views of the mapped file: reading makes no copy, and writing to a tensor does not change the file.
"""

import math
import mmap
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.formats.archive import Archive, show
from ldm.formats.unpickle import Machine, Stub

MAX_PICKLE = 16 << 20  # bytes of data.pkl; 3,000 tensors take 0.5 MB
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
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
PICKLED_DTYPES = {str(t): t for t in (*STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, *_FLOAT8)}


def read_pickle(path: str | Path) -> Any:
    """Returns the object that `torch.save` wrote to `path`: dicts, lists, tuples, numbers, strings and tensors.

    Tensors keep their stored type (float8 included), strides and sharing; they are on the CPU and require no gradient.
    Their values are not read: NaN stays NaN. Sets, the bytes of protocol 2 and all other objects are `Stub`s.
    Raises InputError if the file is not a whole checkpoint: another or an older format, a file that is cut short or
    contradicts itself, a tensor that reaches outside its storage or overlaps itself, a key that comes twice.
    """
    path = Path(path)
    try:
        if os.path.isdir(path):
            raise InputError("is a folder, not a checkpoint")
        if not os.path.isfile(path):
            raise InputError("is a pipe, socket or device" if os.path.exists(path) else "no such file")
        with open(path, "rb") as file:
            head = file.read(512)
            if not head.startswith(b"PK\x03\x04"):
                raise InputError(_other(head))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Checkpoint(Archive(path, data)).load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _other(head: bytes) -> str:
    """Says what a file that is no zip archive probably is, from its first 512 bytes, and what to do."""
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


@dataclass(eq=False, repr=False, slots=True)
class _Storage(Stub):
    content: torch.UntypedStorage = None
    dtype: torch.dtype = None


class _Checkpoint(Machine):
    """Builds the object in an archive: a `Machine` that knows torch's types, storages and tensors."""

    def __init__(self, archive: Archive):
        super().__init__()
        self.archive = archive
        self.slices: dict[str, torch.UntypedStorage] = {}  # by the storage's number, shared by its tensors

    def load(self) -> Any:
        if "byteorder" in self.archive.members and self.archive.read("byteorder", 6) != b"little":
            raise InputError("is big-endian; save it as .safetensors where it was made")
        return self.run(self.archive.read("data.pkl", MAX_PICKLE))

    def named(self, name: str) -> torch.dtype | Stub:
        return PICKLED_DTYPES.get(name) or super().named(name)

    def call(self, name: str, arguments: Any) -> Any:
        """The result of the five calls that we know, made by our own code. Any other call becomes a Stub."""
        match name, arguments:
            case "collections.OrderedDict", ():
                return OrderedDict()
            case "torch.Size", (tuple(size),) if _are_counts(size):
                return torch.Size(size)
            case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3", tuple():
                return _tensor(arguments)
            case "torch._utils._rebuild_parameter", (Tensor() as tensor, _, _):
                return tensor
        return super().call(name, arguments)

    def refer(self, reference: Any) -> _Storage:
        """The storage for ('storage', type, number, device, elements), the only reference that torch.save makes."""
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


def _tensor(arguments: tuple) -> Tensor:
    """A view of a storage: (storage, offset, size, stride, requires_grad, hooks[, dtype]), counted in elements."""
    match arguments:
        case (_Storage() as storage, offset, tuple(size), tuple(stride), _, _):
            dtype = storage.dtype
        case (_Storage() as storage, offset, tuple(size), tuple(stride), _, _, torch.dtype() as dtype):
            pass
        case _:  # a seventh argument that is no type asks for conjugation or negation
            raise InputError("has a tensor that is not a plain view of a storage")
    if not (len(size) == len(stride) and all(_are_counts(numbers) for numbers in (size, stride, (offset,)))):
        raise InputError("has a tensor with a negative, huge or missing size, stride or offset")
    if math.prod(max(length, 1) for length in size) >= 1 << 62:
        raise InputError("has a tensor with more elements than can be counted")  # even if one length is 0
    reach = 1  # distance from the first element to behind the last one, over the dimensions so far
    for step, length in sorted((step, length) for length, step in zip(size, stride, strict=True) if length > 1):
        if step < reach and 0 not in size:
            raise InputError(f"has a tensor of size {show(size)} that overlaps itself; save it .contiguous()")
        reach += step * (length - 1)
    if offset + (0 if 0 in size else reach) > storage.content.nbytes() // dtype.itemsize:
        raise InputError(f"has a tensor of size {show(size)} that reaches outside its storage")
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage.content, offset, size, stride)


def _are_counts(numbers: tuple) -> bool:
    """Whether these numbers can be sizes, strides or offsets."""
    return len(numbers) <= MAX_DIMS and all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)
