"""Which implementation of the codec runs: torch everywhere, compiled C on a CPU, Triton on a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from lowbit_kernels.layout import PacketLayout

logger = logging.getLogger(__name__)

_MODULES = {"torch": "reference", "cpu": "cpu", "triton": "triton_backend"}


class Backend(Protocol):
    """What `get_backend` returns: a module with these functions. `reference.py` holds their contract."""

    name: str

    def encode(
        self,
        x_TH: Tensor,
        layout: PacketLayout,
        packet_TB: Tensor,
        inverse_scale: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum: Tensor | None = None,
    ) -> None: ...

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
    ) -> None: ...

    def decode_sum(
        self,
        packets_RTB: Tensor | Sequence[Tensor],
        layout: PacketLayout,
        out_TH: Tensor,
        scale_RH: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum_RH: Tensor | None = None,
    ) -> None: ...

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
    ) -> None: ...

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
    ) -> None: ...


def get_backend(name: str = "auto", device: torch.device | str = "cpu") -> Backend:
    """The codec called `name` ("auto", "torch", "cpu" or "triton") for tensors on `device`.

    "auto" takes Triton on CUDA and compiled C on a CPU where they can be had, else torch, and logs once which one, and
    why the faster one is missing (a warning). All backends give the same bits.
    Raises ValueError where a backend asked for by name cannot run, saying what can and how to get the other.
    """
    device = torch.device(device)
    if name == "auto":
        fast = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
        missing = "" if fast is None else _why_missing(fast, device)
        name = "torch" if fast is None or missing else fast
        _announce(name, device.type, missing)
    elif name not in _MODULES:
        raise ValueError(f"codec backend {name!r} is unknown; allowed: auto, {', '.join(_MODULES)}")
    elif missing := _why_missing(name, device):
        usable = [other for other in _MODULES if not _why_missing(other, device)]
        raise ValueError(f"codec backend {name!r} cannot run on {device}: {missing}. Available: {', '.join(usable)}")
    return cast(Backend, importlib.import_module(f"lowbit_kernels.{_MODULES[name]}"))


def _why_missing(name: str, device: torch.device) -> str:
    """An empty string where backend `name` runs on `device`, else the reason, with the way out."""
    if name == "torch":
        return ""
    if importlib.util.find_spec(f"lowbit_kernels.{_MODULES[name]}") is None:
        return "it is not part of this installation; install megatron-lowbit again"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return cast(str, importlib.import_module(f"lowbit_kernels.{_MODULES[name]}").why_missing(device))


@functools.cache  # once per process and combination
def _announce(name: str, device_type: str, missing: str) -> None:
    if missing:
        logger.warning(
            "codec backend on %s: %s, many times slower than the compiled one: %s", device_type, name, missing
        )
    else:
        logger.info("codec backend on %s: %s", device_type, name)
