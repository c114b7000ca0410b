"""MXFP4 weights of gpt-oss checkpoints, presented as the bf16 tensors that transformers makes of them.

The format is OCP Microscaling Formats (MX) v1.0, section 5: blocks of 32 values of 4 bits (E2M1) share one byte, the
exponent of a power of two (E8M0). Every product is exact in bf16, whose exponents reach as far.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_lowbit.checkpoint.reader import check_span
from megatron_lowbit.checkpoint.stored_view import ReadableFile
from megatron_lowbit.checkpoint.tensor_file import StoredTensor

# Shapes: E experts, O output features, I input features, G = I/32 blocks of a row, N rows of any kind.

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
BLOCK_NBYTES = BLOCK // 2
SCALE_BIAS = 127
SCALE_NAN = 255
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantise(blocks_NGB: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    """bf16 `[N, G * 32]` of packed values, uint8 `[N, G, 16]`, and their exponents, uint8 `[N, G]`.

    The low half of a byte comes first; a half byte is the sign and an index of `MAGNITUDES`; a block's factor is
    2^(exponent - 127), and exponent 255 makes it NaN, as the format says.
    """
    rows, groups = scales_NG.shape
    nibbles = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], dtype=torch.bfloat16)
    pairs = torch.stack((nibbles.repeat(16), nibbles.repeat_interleave(16)), dim=1)
    values = pairs.index_select(0, blocks_NGB.flatten().int()).view(rows, groups, BLOCK)
    exponents = torch.arange(SCALE_NAN + 1, dtype=torch.float64) - SCALE_BIAS
    factors = torch.exp2(exponents).to(torch.bfloat16)
    factors[SCALE_NAN] = torch.nan
    return values.mul_(factors.index_select(0, scales_NG.flatten().int()).view(rows, groups, 1)).flatten(1)


def with_mxfp4_dequantised(files: Mapping[str, ReadableFile]) -> dict[str, ReadableFile]:
    """The same tensors, each pair `NAME_blocks [E, O, G, 16]`, `NAME_scales [E, O, G]` replaced by NAME `[E, I, O]`.

    Shape and orientation are those of transformers' parameters. Raises ValueError naming file and tensor where one of
    a pair is missing or the two do not fit.
    """
    result = {name: file for name, file in files.items() if not name.endswith((BLOCKS, SCALES))}
    for name, file in files.items():
        base, ending = name[: -len(BLOCKS)], name[-len(BLOCKS) :]
        if ending not in (BLOCKS, SCALES):
            continue
        partner = base + (SCALES if ending == BLOCKS else BLOCKS)
        if partner not in files:
            raise ValueError(f"{file.path}: MXFP4 tensor {name} is there without {partner}; download the weights again")
        if base in result and ending == BLOCKS:
            raise ValueError(f"{file.path}: there is {base} beside {name}; one of them must go")
        if ending == BLOCKS:
            result[base] = Mxfp4Tensor(base, file, files[partner])
    return result


class Mxfp4Tensor:
    """A ReadableFile of one tensor, `name`: bf16 `[E, I, O]`, unpacked expert by expert as it is asked for.

    Memory: what was asked for, and one expert.
    """

    def __init__(self, name: str, blocks: ReadableFile, scales: ReadableFile) -> None:
        self.path = blocks.path
        self._name, self._blocks, self._scales = name, blocks, scales
        packed, exponents = blocks.tensors[name + BLOCKS], scales.tensors[name + SCALES]
        if (
            packed.dtype != torch.uint8
            or exponents.dtype != torch.uint8
            or len(packed.shape) != 4
            or packed.shape[3] != BLOCK_NBYTES
            or packed.shape[:3] != exponents.shape
        ):
            raise ValueError(
                f"{self.path}: MXFP4 tensor {name} has blocks {packed.dtype} {packed.shape} and scales "
                f"{exponents.dtype} {exponents.shape}; expected uint8 [experts, rows, columns / 32, 16] and "
                "[experts, rows, columns / 32]; download the weights again"
            )
        experts, rows, groups = exponents.shape
        self.tensors = {name: StoredTensor(torch.bfloat16, (experts, groups * BLOCK, rows), packed.offset)}

    def read(self, name: str) -> torch.Tensor:
        return self.read_span(name, 0, 0, self.tensors[name].shape[0])

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`[start, stop)` along `dim`, contiguous and the caller's own."""
        stored = self.tensors[name]
        out = torch.empty(check_span(name, stored.shape, dim, start, stop), dtype=stored.dtype)
        if not out.numel():
            return out
        for row, expert in enumerate(range(start, stop) if dim == 0 else range(stored.shape[0])):
            whole_IO = self._expert(expert)
            out[row] = whole_IO if dim == 0 else whole_IO.narrow(dim - 1, start, stop - start)
        return out

    def _expert(self, expert: int) -> torch.Tensor:
        """`[I, O]` of one expert, as a transposed view of what the file holds."""
        blocks_OGB = self._blocks.read_span(self._name + BLOCKS, 0, expert, expert + 1)[0]
        scales_OG = self._scales.read_span(self._name + SCALES, 0, expert, expert + 1)[0]
        return dequantise(blocks_OGB, scales_OG).t()
