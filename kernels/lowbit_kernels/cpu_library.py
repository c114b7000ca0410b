"""The compiled codec as ctypes sees it: the shared library beside this file, and a packet's layout as a C struct."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from lowbit_kernels.codebooks import levels, thresholds
from lowbit_kernels.layout import PacketLayout

# Layout of csrc/rows.h, in its order; the enumerations there count as these do.
_VALUES = ("int", "e4m3", "e2m1", "lm", "nf4", "tc")
_SCALE_FORMATS = ("bf16", "e4m3", "e8m0")
_NUMBERS = (
    *("body", "groups", "codes_nbytes", "row_scale_offset", "scales_offset", "scales_end", "minimums_offset"),
    *("outliers_offset", "row_nbytes"),
)
_MOST_PLANES = 3
_MOST_LEVELS = 32
_MOST_THRESHOLDS = 16


class CLayout:
    """A layout as the C functions take it, and the shapes of what goes with it, as `checks.py` wants them.

    Asking the layout for them takes longer than encoding a short row.

    struct: `Layout` of csrc/rows.h. static, minimum, body_index, outlier_index: None where of no use to the layout.
    """

    __slots__ = ("body_index", "features", "minimum", "outlier_index", "row_nbytes", "static", "struct")

    def __init__(self, layout: PacketLayout) -> None:
        numbers = [layout.features, layout.bits, layout.group_size, layout.outliers, _VALUES.index(layout.values)]
        numbers += [_SCALE_FORMATS.index(layout.scale_format), layout.asymmetric, layout.prescaled]
        numbers += [getattr(layout, field) for field in _NUMBERS]
        numbers.append(len(layout.planes))
        for planes in (layout.planes, layout.plane_offsets):
            numbers += [*planes, *[0] * (_MOST_PLANES - len(planes))]
        numbers += _code_book(layout)
        self.struct = (ctypes.c_int64 * len(numbers))(*numbers)
        self.features = layout.features
        self.row_nbytes = layout.row_nbytes
        self.static = (layout.body,) if layout.needs_static else None
        self.minimum = (layout.body,) if layout.needs_minimum else None
        self.body_index = (layout.body,) if layout.outliers else None
        self.outlier_index = (layout.outliers,) if layout.outliers else None


def _code_book(layout: PacketLayout) -> list[int]:
    """Its levels, then its thresholds, as fp32 numbers in pairs, filled up: none exceeds infinity.

    Thresholds between a trellis's levels are of no use: a code does not choose among all of them.
    """
    book = list(levels(layout.values, layout.bits))
    book += [0.0] * (_MOST_LEVELS - len(book))
    between = () if layout.has_trellis else thresholds(layout.values, layout.bits)
    book += [*between, *[math.inf] * (_MOST_THRESHOLDS - len(between))]
    return list(struct.unpack(f"={len(book) // 2}q", struct.pack(f"={len(book)}f", *book)))


c_layout = functools.lru_cache(maxsize=256)(CLayout)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, from the folder of this package. Raises FileNotFoundError, saying how to build it."""
    folder = Path(__file__).parent
    paths = [folder / f"_codec{suffix}" for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"the compiled codec is not in {folder}; install a C compiler (gcc or clang), then pip install again"
        )
    library = ctypes.CDLL(str(found))
    pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    packets = (pointer, pointer, integer, integer)  # R of them, their row sizes, R, T
    rows = (pointer, integer, pointer, integer, pointer)  # scales, minimums, and the distance of their rows; outliers
    # Without types, a Python int would travel as a C int, which is too short for a pointer.
    library.lowbit_encode.argtypes = [
        *(pointer, pointer, integer, flag, integer, pointer, integer, pointer, pointer, pointer)
    ]
    library.lowbit_decode.argtypes = [
        *(pointer, pointer, integer, integer, pointer, integer, pointer, pointer, pointer, flag)
    ]
    library.lowbit_decode_sum.argtypes = [pointer, *packets, pointer, integer, *rows, flag]
    library.lowbit_requantize.argtypes = [
        *(pointer, *packets, *rows),
        *(pointer, pointer, integer, pointer, pointer, pointer),
    ]
    library.lowbit_foretell_codes.argtypes = [
        *(pointer, integer, flag, integer, pointer, pointer, integer, integer, pointer, pointer, pointer)
    ]
    library.lowbit_encode_feedback.argtypes = [
        *(pointer, pointer, integer, flag, integer, pointer, integer, pointer, pointer, pointer, pointer),
        *(pointer, pointer, integer),
    ]
    library.lowbit_requantize_feedback.argtypes = [
        *(pointer, *packets, *rows),
        *(pointer, pointer, integer, pointer, pointer, pointer, pointer, pointer, integer),
    ]
    library.lowbit_decode_foretold.argtypes = [
        *(pointer, pointer, integer, integer, pointer, integer, pointer, pointer, pointer, pointer)
    ]
    library.lowbit_rotate.argtypes = [pointer, integer, integer, pointer, integer, flag]
    library.lowbit_rotate.restype = None
    library.lowbit_encode_mixed.argtypes = [
        *(pointer, pointer, integer, flag, integer, pointer, integer, pointer, pointer)
    ]
    library.lowbit_decode_mixed.argtypes = [pointer, *packets, pointer, integer, pointer, pointer, flag]
    library.lowbit_only_plain.argtypes = [flag]
    library.lowbit_only_plain.restype = None
    return library
