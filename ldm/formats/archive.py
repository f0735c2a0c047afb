"""The zip archive that torch.save writes: each member, uncompressed, is a range of a memory-mapped file.

Python's zipfile decompresses, and trusts the two headers that describe a member. Here nothing is decompressed, every
number is checked against the file before it is used, and an archive that contradicts itself is refused.
"""

import mmap
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ldm.errors import InputError

MAX_DIRECTORY = 16 << 20  # bytes of the zip directory: 250,000 members


class Archive:
    """The members of a checkpoint, by their names within its one folder. Raises InputError for a broken archive."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data = path, data
        members = _members(data)
        roots = {name.partition("/")[0] for name in members}
        self.members = {name.partition("/")[2]: place for name, place in members.items()}
        if len(roots) > 1 or "data.pkl" not in self.members:
            raise InputError("is a zip archive, but not a torch checkpoint: that is one folder with a data.pkl")
        self.mapped: torch.UntypedStorage | None = None

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a member. Raises InputError if it has more than `limit` bytes."""
        start, stop = self.members[name]
        if stop - start > limit:
            raise InputError(f"its {name} has {stop - start} bytes, and should have at most {limit}")
        return self.data[start:stop]

    def map(self, name: str) -> torch.UntypedStorage:
        """The bytes of a member as a slice of the mapped file. The map is private: writing does not change the file."""
        if name not in self.members:
            raise InputError(f"has no member {show(name)}, to which a tensor refers")
        if self.mapped is None:
            try:
                self.mapped = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=len(self.data))
            except RuntimeError:
                raise InputError("cannot be mapped into memory") from None
        start, stop = self.members[name]
        part = self.mapped[start:stop]
        return part.clone() if start % 16 else part  # torch aligns to 64 bytes; other tools may not


def _members(data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Name -> (start, stop) of each member's bytes.

    Raises InputError for a member that is compressed, lies outside the file, overlaps another or comes twice.
    """
    position, end, count = _directory(data)
    first, spans, members = position, [(position, position)], {}
    while position < end:
        if end - position < 46 or data[position : position + 4] != b"PK\x01\x02":
            raise InputError("its zip directory is broken")
        fields = struct.unpack_from("<4x2x2x2H2x2x4x2L3H2x2x4xL", data, position)
        flags, method, stored, size, name_length, extra_length, comment_length, offset = fields
        name_end = position + 46 + name_length
        raw, extra = data[position + 46 : name_end], data[name_end : name_end + extra_length]
        position = name_end + extra_length + comment_length
        size, stored, offset = _wide(extra, size, stored, offset)
        name = raw.decode("utf-8", "backslashreplace")
        if name in members:
            raise InputError(f"its zip directory has {show(name)} twice")
        if flags & 1 or method or size != stored:
            raise InputError(f"its member {show(name)} is compressed or encrypted, which torch.save never does")
        start = _local(data, raw, size, offset, first)
        members[name] = start, start + size
        spans.append((offset, start + size))
    if position != end or len(members) != count or not members:
        raise InputError("its zip directory is broken")
    if any(stop > following for (_, stop), (following, _) in pairwise(sorted(spans))):
        raise InputError("members of its zip archive overlap")
    return members


def _directory(data: mmap.mmap) -> tuple[int, int, int]:
    """Start, end and number of entries of the zip directory, as the record at the file's end says."""
    end = len(data) - 22
    if end < 76 or data[end : end + 4] != b"PK\x05\x06":
        raise InputError("is cut short, or something follows it: a zip archive's end is missing; fetch it again")
    count, length, start = struct.unpack_from("<4x2x2x2xH2L2x", data, end)
    if data[end - 20 : end - 16] == b"PK\x06\x07":  # zip64, which torch always writes
        end -= 76
        if data[end : end + 4] != b"PK\x06\x06":
            raise InputError("its zip directory is broken")
        count, length, start = struct.unpack_from("<4x8x2x2x4x4x8x3Q", data, end)
    if start + length != end or length > MAX_DIRECTORY:
        raise InputError("its zip directory is broken, or too large")
    return start, end, count


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values, with each 0xFFFFFFFF replaced by the 64-bit value in the zip64 extra field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        body, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            wide = iter([number for (number,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])])
            return [next(wide, value) if value == 0xFFFFFFFF else value for value in values]
    return list(values)


def _local(data: mmap.mmap, raw: bytes, size: int, offset: int, limit: int) -> int:
    """Where a member's bytes start. Raises InputError if the header before them contradicts the directory."""
    name = show(raw.decode("utf-8", "backslashreplace"))
    if offset + 30 > limit:
        raise InputError(f"its member {name} lies outside the file; it is cut short or broken")
    flags, method, stored, length, name_length, extra_length = struct.unpack_from("<6x2H4x4x2L2H", data, offset)
    name_end = offset + 30 + name_length
    sizes = {size, 0} if flags & 8 else {size}  # bit 3: torch writes 0 here, and the sizes after the bytes
    agree = data[offset : offset + 4] == b"PK\x03\x04" and data[offset + 30 : name_end] == raw and not method
    if not agree or not sizes.issuperset(_wide(data[name_end : name_end + extra_length], length, stored)):
        raise InputError(f"its two zip headers of {name} do not agree")
    start = name_end + extra_length
    if start + size > limit:
        raise InputError(f"its member {name} lies outside the file; it is cut short or broken")
    return start


def show(value: Any) -> str:
    """Something from a file as text of one line, at most 80 letters."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"  # its items may be long
    return repr(value[:80] if isinstance(value, (str, bytes)) else value)[:80]
