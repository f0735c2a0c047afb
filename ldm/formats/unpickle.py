"""A pickle machine that runs nothing.

The threat. A pickle is a program for a small stack machine, and Python's machine imports and calls whatever the
program names: to unpickle a stranger's file is to run it.

The answer. `Machine` is a machine of our own that can only do what `_step` lists. It builds containers, numbers and
strings. A name in the file becomes a `Stub`, and calling a stub makes another stub: nothing is imported, looked up or
called for the file. A subclass that knows what some names mean overrides `named`, `call` and `refer` with its own code.

Sizes are checked before they are used, so memory is bounded by the limits below.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ldm.errors import InputError
from ldm.formats.archive import show

MAX_OPCODES = 1 << 19  # enough for 16,000 tensors, of 32 opcodes each
MAX_ODD_KEYS = 1 << 12  # dictionary keys that are not strings: a file can make their hashes collide
MAX_GLOBAL_NAME = 1 << 10  # letters of "module.attribute"; each use of the name makes a new string
MAX_DEPTH = 64  # containers within containers


@dataclass(eq=False, repr=False, slots=True)
class Stub:
    """Stands for an object that a file names and that is never made: its name, its call's arguments, its state.

    It may contain itself. Items that the file appends to it, or stores in it by key, are dropped.
    """

    name: str
    args: Any = ()
    state: Any = None

    def __repr__(self) -> str:
        return f"<stub {show(self.name)}>"


KEYS = (str, bytes, int, float, type(None), Stub)  # what a dictionary's keys may be: all are hashed quickly


class Machine:
    """Runs one pickle on a stack of stacks: MARK opens a stack, and the opcode that takes its items closes it."""

    def __init__(self):
        self.stacks: list[list] = [[]]
        self.memo: dict[int, Any] = {}
        self.odd_keys = 0

    def run(self, pickle: bytes) -> Any:
        """The object that the pickle builds. Raises InputError if the pickle is broken or asks for anything else."""
        for count, (opcode, argument, _) in enumerate(_decode(pickle)):
            if count == MAX_OPCODES:
                raise InputError(f"its pickle has more than {MAX_OPCODES} opcodes")
            self._step(opcode.name, argument)
        if len(self.stacks) > 1 or len(self.stacks[0]) != 1:
            raise InputError("its pickle does not end with one object")
        _check_shallow(self._top())
        return self._top()

    def named(self, name: str) -> Any:
        """What a name, "module.attribute", stands for."""
        return Stub(name)

    def call(self, name: str, arguments: Any) -> Any:
        """The result of calling what a Stub names."""
        return Stub(name, arguments)

    def refer(self, reference: Any) -> Any:
        """What a persistent id, a reference to something outside the pickle, stands for."""
        raise InputError("its pickle refers to something outside it")

    def _step(self, opcode: str, argument: Any) -> None:
        """Runs one opcode. A file can make the machine do nothing but what stands here and in `_step_container`."""
        push, pop, marked = self._push, self._pop, self._marked
        match opcode:
            case "PROTO" | "FRAME" | "STOP":  # a frame only helps readers of a stream
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
            case "GLOBAL":
                push(self._name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                push(self._name(*pop(2)))
            case "REDUCE" | "NEWOBJ":
                push(self._call(*pop(2)))
            case "NEWOBJ_EX":
                push(self._call(*pop(3)[:2]))
            case "BUILD":
                self._build(*pop(1))
            case "BINPERSID":
                push(self.refer(*pop(1)))
            case _:
                self._step_container(opcode)

    def _step_container(self, opcode: str) -> None:
        """Runs one opcode that makes or fills a container."""
        push, pop, marked = self._push, self._pop, self._marked
        match opcode:
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
            case _:
                raise InputError(f"uses the pickle opcode {opcode}, which torch.save does not")

    def _name(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise InputError("its pickle has a name that is no string")
        if len(module) + len(name) > MAX_GLOBAL_NAME:
            raise InputError(f"its pickle has a name of {len(module) + len(name)} letters")
        return self.named(f"{module}.{name}")

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Stub):
            raise InputError("its pickle calls something that is not a name")
        return self.call(function.name, arguments)

    def _build(self, state: Any) -> None:
        """Sets the state of the Stub on top. An OrderedDict's state, in which modules keep a version, is dropped."""
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
    """(opcode, argument, position) of each opcode, from the standard library's disassembler, which runs nothing."""
    try:
        yield from pickletools.genops(pickle)
    except ValueError as error:
        raise InputError(f"its pickle is broken: {show(str(error))}") from None


def _check_shallow(root: Any) -> None:
    """Raises InputError for containers nested too deeply, or within themselves: walking them might never end."""
    level = {0: [root]}
    for _ in range(MAX_DEPTH + 1):
        inner = (item for box in level.values() for item in (box.values() if isinstance(box, dict) else box))
        level = {id(item): item for item in inner if isinstance(item, (dict, list, tuple))}
    if level:
        raise InputError(f"has containers nested over {MAX_DEPTH} deep, or within themselves")
