"""What `gpu_check` times: every step of the codec on buffers of one format and message size.

Shapes: R ranks, T tokens, H features, D body features, B bytes of a packet row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowbit_kernels import Backend, PacketLayout, reference

#: Options of a layout, but for its features and outliers.
FORMATS: dict[str, dict[str, Any]] = {
    "int4-outlier": {"bits": 4},
    "int4-g64": {"bits": 4, "group_size": 64},
    "int8-g128": {"bits": 8, "group_size": 128},
    "int3-g64": {"bits": 3, "group_size": 64},
    "fp8-g128": {"bits": 8, "group_size": 128, "values": "e4m3"},
    "mxfp4": {"bits": 4, "group_size": 32, "values": "e2m1", "scale_format": "e8m0"},
    "nvfp4": {"bits": 4, "group_size": 16, "values": "e2m1", "scale_format": "e4m3"},
    "lm4-g64": {"bits": 4, "group_size": 64, "values": "lm"},
    "tc4-g64": {"bits": 4, "group_size": 64, "values": "tc"},
}
STEPS = ("encode", "decode", "decode_add", "decode_sum", "requantize", "decode_add_norm")
RANKS = 4
EPS = 1e-5


def layout_of(name: str, hidden: int) -> PacketLayout:
    """The layout of a name in FORMATS; `int4-outlier` sends `hidden // 64` features as BF16, as the paper does."""
    return PacketLayout(features=hidden, outliers=hidden // 64 if name == "int4-outlier" else 0, **FORMATS[name])


@dataclass(frozen=True)
class Step:
    """A launch to time: `run(turn)` works on the buffers whose turn it is; `nbytes` is what it has to move."""

    name: str
    run: Callable[[int], None]
    nbytes: int


class Work:
    """Buffers of one layout for `tokens` tokens, `sets` times over, so that runs in turn do not find theirs in a cache.

    Partials are BF16, sums and the residual stream FP32, normed values BF16; RANKS packets are summed.
    """

    def __init__(
        self, layout: PacketLayout, tokens: int, module: Backend, device: torch.device, sets: int, seed: int = 0
    ) -> None:
        self.layout, self.module, self.sets = layout, module, sets
        generator = torch.Generator(device).manual_seed(seed)
        hidden, body = layout.features, layout.body

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        order = torch.randperm(hidden, generator=generator, device=device)
        outliers = layout.outliers
        self.index: tuple[Tensor | None, Tensor | None] = (None, None)
        if outliers:
            self.index = (order[outliers:].sort().values, order[:outliers].sort().values)
        self.scale_RD: Tensor | None = None
        self.inverse_D: Tensor | None = None
        if layout.needs_static:
            self.scale_RD = (normal(1, body).abs() + 0.3).bfloat16().float().repeat(RANKS, 1)
            self.inverse_D = 1 / self.scale_RD[0]
        self.x = [normal(tokens, hidden).bfloat16() for _ in range(sets)]
        self.packets = [
            torch.empty(RANKS, tokens, layout.row_nbytes, dtype=torch.uint8, device=device) for _ in range(sets)
        ]
        for packets_RTB in self.packets:
            for packet_TB in packets_RTB:
                module.encode(normal(tokens, hidden).bfloat16(), layout, packet_TB, self.inverse_D, *self.index)
        self.packet = [torch.empty_like(packets_RTB[0]) for packets_RTB in self.packets]
        self.out = [torch.zeros(tokens, hidden, device=device) for _ in range(sets)]
        self.normed = [torch.empty_like(x_TH) for x_TH in self.x]
        self.weight_H = normal(hidden)

    def steps(self) -> list[Step]:
        """Every step of STEPS. Static tensors count once, packets and values as often as they are read or written."""
        packet, values = self.packet[0].nbytes, self.out[0].nbytes
        index = sum(part.nbytes for part in self.index if part is not None)
        scale = 0 if self.inverse_D is None else self.inverse_D.nbytes
        static = index + scale
        nbytes = {
            "encode": self.x[0].nbytes + packet + static,
            "decode": packet + values + static,
            "decode_add": packet + 2 * values + static,
            "decode_sum": RANKS * packet + values + index + RANKS * scale,
            "requantize": (RANKS + 1) * packet + 2 * index + (RANKS + 1) * scale,
            "decode_add_norm": packet + 2 * values + self.normed[0].nbytes + self.weight_H.nbytes + static,
        }
        return [Step(name, getattr(self, name), nbytes[name]) for name in STEPS]

    def encode(self, turn: int) -> None:
        self.module.encode(self.x[turn], self.layout, self.packet[turn], self.inverse_D, *self.index)

    def decode(self, turn: int) -> None:
        self.module.decode(self.packets[turn][0], self.layout, self.out[turn], self._scale, *self.index)

    def decode_add(self, turn: int) -> None:
        self.module.decode(self.packets[turn][0], self.layout, self.out[turn], self._scale, *self.index, add=True)

    def decode_sum(self, turn: int) -> None:
        self.module.decode_sum(self.packets[turn], self.layout, self.out[turn], self.scale_RD, *self.index)

    def requantize(self, turn: int) -> None:
        self.module.requantize(
            self.packets[turn], self.layout, self.packet[turn], self.layout, self.scale_RD, *self.index,
            gather_inverse_scale=self.inverse_D, gather_body_index=self.index[0], gather_outlier_index=self.index[1],
        )  # fmt: skip

    def decode_add_norm(self, turn: int) -> None:
        self.module.decode_add_norm(
            *(self.packets[turn][1], self.layout, self.out[turn], self.normed[turn], self.weight_H, EPS),
            *(self._scale, *self.index),
        )

    @property
    def _scale(self) -> Tensor | None:
        return None if self.scale_RD is None else self.scale_RD[0]

    def check(self) -> None:
        """AssertionError unless every step gives what the reference gives on the CPU, on the first set of buffers."""
        golden = copy.copy(self)
        golden.module = cast(Backend, reference)
        golden.index = (_cpu(self.index[0]), _cpu(self.index[1]))
        golden.scale_RD, golden.inverse_D = _cpu(self.scale_RD), _cpu(self.inverse_D)
        golden.weight_H = self.weight_H.cpu()
        for name in ("x", "packets", "packet", "out", "normed"):
            setattr(golden, name, [getattr(self, name)[0].cpu().clone()])
        for step, expected in zip(self.steps(), golden.steps(), strict=True):
            step.run(0)
            expected.run(0)
            for name in ("packet", "out"):
                got, want = getattr(self, name)[0].cpu().view(torch.uint8), getattr(golden, name)[0].view(torch.uint8)
                assert torch.equal(got, want), f"{step.name} of {self.layout}: {name} is not what the reference gives"
        # fp32 sums in another order, 2e-6, then one rounding to bf16, 2^-8
        torch.testing.assert_close(self.normed[0].cpu(), golden.normed[0], rtol=2**-7, atol=0)


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
