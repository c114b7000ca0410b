"""Triton: `rotation.rotate`, in one launch for each run of transforms. One program is one tile of one row.

Legend: T tokens, H hidden features.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.pack import as_bits, as_float, one_nan
from lowbit_kernels.rotation import Rotation, check_rows, scale_of, sign_bits

#: Values of a tile that holds several transforms.
TILE = 1024


def rotate(rows_TH: Tensor, rotation: Rotation, inverse: bool = False) -> None:
    """See `rotation.rotate`."""
    check_rows(rows_TH, rotation)
    tokens = rows_TH.shape[0]
    for run in () if tokens == 0 else reversed(rotation.runs) if inverse else rotation.runs:
        values = run.size * run.count
        tile = max(run.size, min(TILE, triton.next_power_of_2(values)))
        tiles = triton.cdiv(values, tile)
        _rotate[(tokens * tiles,)](
            rows_TH,
            rows_TH.stride(0),
            None if run.number is None else sign_bits(run, rows_TH.device),
            run.start,
            values,
            tiles,
            LOG_SIZE=run.size.bit_length() - 1,
            SCALE=scale_of(run.size),
            INVERSE=inverse,
            TILE=tile,
            num_warps=max(1, min(16, tile // 256)),
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=["tiles"])
def _rotate(
    rows: tl.tensor,
    stride: tl.tensor,
    signs: tl.tensor,
    start: tl.tensor,
    values: tl.tensor,
    tiles: tl.tensor,
    LOG_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Transforms of 2^LOG_SIZE of `values` features from `start` on. A signed run is one, which fills its tile."""
    program = tl.program_id(0)
    at = (program % tiles) * TILE + tl.arange(0, TILE)
    mask = at < values
    here = rows + (program // tiles).to(tl.int64) * stride + start + at
    x = tl.load(here, mask=mask, other=0.0)
    if signs is not None and not INVERSE:
        x = as_float(as_bits(x) ^ tl.load(signs + at))
    for step in tl.static_range(LOG_SIZE):
        x = _butterflies(x, 1 << step, TILE)
    x = x * SCALE
    if signs is not None and INVERSE:
        x = as_float(as_bits(x) ^ tl.load(signs + at))
    tl.store(here, as_float(one_nan(x)), mask=mask)


@triton.jit
def _butterflies(x: tl.tensor, HALF: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """a + b and a - b of every two values that lie HALF apart."""
    pairs = tl.permute(tl.reshape(x, (TILE // (2 * HALF), 2, HALF)), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (TILE,))
