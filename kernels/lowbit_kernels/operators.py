"""Operators: a backend that torch.compile traces through, by calling the operators of `ops.py` while it looks on.

Legend: T tokens, H hidden features, R ranks, B bytes of a packet row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_kernels.backends import Backend
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.ops import layout_text

_OPS = torch.ops.lowbit_kernels


@dataclass(frozen=True)
class Operators:
    """`backend`, step for step: called as it is, or as an operator where torch.compile traces the caller.

    Not always as an operator: one costs some microseconds a call, and gains nothing while nobody traces.
    """

    backend: Backend

    @property
    def name(self) -> str:
        """The backend's."""
        return self.backend.name

    def encode(
        self,
        x_TH: Tensor,
        layout: PacketLayout,
        packet_TB: Tensor,
        inverse_scale: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum: Tensor | None = None,
    ) -> None:
        """See `reference.encode`."""
        if torch.compiler.is_compiling():
            _OPS.encode_out(
                x_TH,
                layout_text(layout),
                packet_TB,
                inverse_scale,
                body_index,
                outlier_index,
                minimum,
                backend=self.name,
            )
        else:
            self.backend.encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index, minimum)

    def decode(
        self,
        packet_TB: Tensor,
        layout: PacketLayout,
        out_TH: Tensor,
        scale: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """See `reference.decode`."""
        if torch.compiler.is_compiling():
            _OPS.decode_out(
                packet_TB,
                layout_text(layout),
                out_TH,
                scale,
                body_index,
                outlier_index,
                minimum,
                add=add,
                backend=self.name,
            )
        else:
            self.backend.decode(packet_TB, layout, out_TH, scale, body_index, outlier_index, minimum, add=add)

    def decode_sum(
        self,
        packets_RTB: Tensor | Sequence[Tensor],
        layout: PacketLayout,
        out_TH: Tensor,
        scale_RH: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum_RH: Tensor | None = None,
    ) -> None:
        """See `reference.decode_sum`."""
        if torch.compiler.is_compiling():
            _OPS.decode_sum_out(
                _listed(packets_RTB),
                layout_text(layout),
                out_TH,
                scale_RH,
                body_index,
                outlier_index,
                minimum_RH,
                backend=self.name,
            )
        else:
            self.backend.decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index, minimum_RH)

    def requantize(
        self,
        packets_RTB: Tensor | Sequence[Tensor],
        layout: PacketLayout,
        packet_TB: Tensor,
        gather_layout: PacketLayout,
        scale_RH: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum_RH: Tensor | None = None,
        *,
        gather_inverse_scale: Tensor | None = None,
        gather_body_index: Tensor | None = None,
        gather_outlier_index: Tensor | None = None,
        gather_minimum: Tensor | None = None,
    ) -> None:
        """See `reference.requantize`."""
        if torch.compiler.is_compiling():
            _OPS.requantize_out(
                _listed(packets_RTB),
                layout_text(layout),
                packet_TB,
                layout_text(gather_layout),
                scale_RH,
                body_index,
                outlier_index,
                minimum_RH,
                gather_inverse_scale=gather_inverse_scale,
                gather_body_index=gather_body_index,
                gather_outlier_index=gather_outlier_index,
                gather_minimum=gather_minimum,
                backend=self.name,
            )
        else:
            self.backend.requantize(
                packets_RTB,
                layout,
                packet_TB,
                gather_layout,
                scale_RH,
                body_index,
                outlier_index,
                minimum_RH,
                gather_inverse_scale=gather_inverse_scale,
                gather_body_index=gather_body_index,
                gather_outlier_index=gather_outlier_index,
                gather_minimum=gather_minimum,
            )

    def decode_add_norm(
        self,
        packet_TB: Tensor,
        layout: PacketLayout,
        residual_TH: Tensor,
        normed_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        scale: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum: Tensor | None = None,
        bias_H: Tensor | None = None,
    ) -> None:
        """See `reference.decode_add_norm`."""
        if torch.compiler.is_compiling():
            _OPS.decode_add_norm_out(
                packet_TB,
                layout_text(layout),
                residual_TH,
                normed_TH,
                weight_H,
                eps,
                scale,
                body_index,
                outlier_index,
                minimum,
                bias_H=bias_H,
                backend=self.name,
            )
        else:
            self.backend.decode_add_norm(
                packet_TB,
                layout,
                residual_TH,
                normed_TH,
                weight_H,
                eps,
                scale,
                body_index,
                outlier_index,
                minimum,
                bias_H=bias_H,
            )


def _listed(packets_RTB: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return list(packets_RTB.unbind(0) if isinstance(packets_RTB, Tensor) else packets_RTB)
