"""What the pickle of a PyTorch weight file says, found out without unpickling it.

A pickle is a program for a small stack machine, and calls whatever functions it names. Here its instructions are read
one by one, and the only ones followed are those of a table of tensors: constants, tuples, lists, dicts, and three
names that stand for descriptions. Nothing is imported, nothing is called, and keys are strings.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lowbit.checkpoint.tensor_file import StoredTensor, is_addressable

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
TABLE, TENSOR, PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
NAMES = {TABLE, TENSOR, PARAMETER, *(f"torch.{name}" for name in STORAGES)}

# of pickle protocol 2, which torch writes and reads
CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
WORDS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class ForeignPickle(ValueError):
    """A sound pickle that asks for more than weights need."""


@dataclass(frozen=True)
class _Name:
    """A function or class that the pickle names."""

    dotted: str


@dataclass(frozen=True)
class _Storage:
    """offset: bytes from the start of the file; count: values."""

    dtype: torch.dtype
    offset: int
    count: int


def read_pickle(data: bytes, records: Mapping[str, tuple[int, int]]) -> Any:
    """What torch.load would return, a StoredTensor for each tensor.

    records: (offset, nbytes) in the file of each storage's bytes, by its key. Raises ForeignPickle where something else
    than weights is asked for; for damage ValueError, LookupError or TypeError.
    """
    machine = _Machine(records)
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise ValueError("its pickle has no end")


class _Machine:
    def __init__(self, records: Mapping[str, tuple[int, int]]) -> None:
        self.stack: list[Any] = []
        self._records = records
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One instruction, named as pickletools names it."""
        stack = self.stack
        if name in CONSTANTS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in WORDS:
            stack.append(WORDS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "TUPLE" or name in TUPLES:
            stack.append(tuple(self._popped(TUPLES.get(name))))
        elif name in ("APPEND", "APPENDS"):
            items = self._popped(1 if name == "APPEND" else None)
            _of_kind(list, stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._popped(2 if name == "SETITEM" else None))
        elif name == "GLOBAL":
            stack.append(_known_name(argument.replace(" ", ".")))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            called, arguments = self._popped(2)
            stack.append(_described(called, _of_kind(tuple, arguments)))
        elif name == "BUILD":
            stack.pop()  # torch hangs the versions of modules on a state dict, which say nothing about weights
            _of_kind(dict, stack[-1])
        elif name != "PROTO":
            raise ForeignPickle(f"its pickle uses the instruction {name}")

    def _popped(self, count: int | None) -> list[Any]:
        """The last `count` things on the stack, None: all since the last mark."""
        start = self._marks.pop() if count is None else len(self.stack) - count
        if not 0 <= start <= len(self.stack):
            raise ValueError("its pickle takes more than it made")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _set_items(self, items: list[Any]) -> None:
        table = _of_kind(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise ForeignPickle(f"a table has a {type(key).__name__} for a name")
            if key in table:
                raise ValueError(f"the name {key!r} stands there twice")
            table[key] = value

    def _storage(self, description: Any) -> _Storage:
        kind, name, key, _, count = _of_kind(tuple, description)
        dtype = STORAGES.get(_of_kind(_Name, name).dotted.removeprefix("torch."))
        if kind != "storage" or dtype is None or not isinstance(key, str) or key not in self._records:
            raise ValueError("its pickle describes a storage that is not there")
        offset, nbytes = self._records[key]
        if type(count) is not int or count * dtype.itemsize != nbytes:
            raise ValueError(f"storage {key} has {nbytes} bytes, expected {count!r} values of {dtype}")
        return _Storage(dtype, offset, count)


def _of_kind(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has a {type(value).__name__} where it needs a {kind.__name__.strip('_')}")
    return value


def _known_name(dotted: str) -> _Name:
    if dotted not in NAMES:
        raise ForeignPickle(f"its pickle asks for {dotted[:80]!r}, which was not run")
    return _Name(dotted)


def _described(called: Any, arguments: tuple[Any, ...]) -> Any:
    """The result of a call, for the three that weights need."""
    dotted = _of_kind(_Name, called).dotted
    if dotted == TABLE and arguments in ((), ([],)):
        return {}
    if dotted == PARAMETER and arguments:
        return _of_kind(StoredTensor, arguments[0])
    if dotted == TENSOR and len(arguments) >= 4:
        return _tensor(*arguments[:4])
    raise ValueError(f"its pickle calls {dotted} in a way that torch.save does not")


def _tensor(storage: Any, start: Any, shape: Any, strides: Any) -> StoredTensor:
    """`start` and strides count values of the storage."""
    _of_kind(_Storage, storage), _of_kind(tuple, shape), _of_kind(tuple, strides)
    if not all(type(number) is int and number >= 0 for number in (start, *shape, *strides)):
        raise ValueError("a tensor has an offset, extent or stride that is no whole number from 0 on")
    if len(shape) != len(strides) or not is_addressable(shape):
        raise ValueError(f"a tensor has {len(shape)} extents and {len(strides)} strides, or is too large to exist")
    if start + math.prod(shape) > storage.count:
        raise ValueError(f"a tensor of shape {shape} at {start} leaves its storage of {storage.count} values")
    offset = storage.offset + start * storage.dtype.itemsize
    # an extent of 1 may come with any stride, also one that leads out of the tensor
    tidy = tuple(1 if extent == 1 else stride for extent, stride in zip(shape, strides, strict=True))
    if _is_row_major(shape, tidy):
        return StoredTensor(storage.dtype, shape, offset)
    axes = sorted((axis for axis, extent in enumerate(shape) if extent != 1), key=lambda axis: -tidy[axis])
    if not _is_row_major(tuple(shape[axis] for axis in axes), tuple(tidy[axis] for axis in axes)):
        raise ForeignPickle(f"a tensor of shape {shape} and strides {strides} is a view of another")
    return StoredTensor(storage.dtype, shape, offset, tidy)


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return 0 in shape or all(
        extent == 1 or stride == right for extent, stride, right in zip(shape, strides, expected, strict=True)
    )
