"""CommCalibration: one file of statistics for all sync points of one model at one tensor-parallel size."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_lowbit.calibration.moments import AGAIN, SyncPointMoments
from megatron_lowbit.files import replacing

FORMAT = "megatron-lowbit-calibration"
VERSION = 3
#: Version 1 had ranges alone, version 2 no means and fitted steps.
READABLE = ("1", "2", "3")
STATISTICS = ("partial_min", "partial_max", "sum_min", "sum_max")


@dataclass(frozen=True)
class SyncPointStatistics:
    """Ranges seen at one sync point, FP32: of each rank's partial `[R, H]` and of their sum `[H]`.

    moments: what schemes beyond the paper use; None in files that have ranges alone.
    """

    partial_min: torch.Tensor
    partial_max: torch.Tensor
    sum_min: torch.Tensor
    sum_max: torch.Tensor
    moments: SyncPointMoments | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, for a file."""
        found = {name: getattr(self, name).contiguous() for name in STATISTICS}
        return found if self.moments is None else found | self.moments.tensors()


@dataclass(frozen=True)
class CommCalibration:
    """Statistics by sync point name, and what they belong to.

    fingerprint: `checkpoint.fingerprint` of the model. The file holds statistics, not a scheme's constants, so that
    new schemes can use old files.
    """

    fingerprint: str
    tp: int
    hidden: int
    sequences: int
    length: int
    text_sha256: str
    sync_points: dict[str, SyncPointStatistics]

    def save(self, path: Path, also: Mapping[str, str] | None = None) -> None:
        """Writes beside `path`, then renames: an interrupted run leaves no half file. also: more metadata."""
        tensors = {
            f"{name}.{statistic}": tensor
            for name, point in self.sync_points.items()
            for statistic, tensor in point.tensors().items()
        }
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "fingerprint": self.fingerprint,
            "tp": str(self.tp),
            "hidden": str(self.hidden),
            "sequences": str(self.sequences),
            "length": str(self.length),
            "text_sha256": self.text_sha256,
        }
        with replacing(path) as beside:
            save_file(tensors, beside, {**metadata, **(also or {})})

    @classmethod
    def load(cls, path: Path) -> CommCalibration:
        """Raises FileNotFoundError or ValueError that says what is wrong with the file and how to make a new one."""
        if not path.is_file():
            raise FileNotFoundError(f"calibration file {path} not found; make it with `megatron-lowbit calibrate`")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a calibration file (format {metadata.get('format')!r}); {AGAIN}")
                if metadata.get("version") not in READABLE:
                    raise ValueError(
                        f"calibration {path} has version {metadata.get('version')!r}, this program reads "
                        f"versions {', '.join(READABLE)}; {AGAIN}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, struct.error) as error:
            raise ValueError(f"calibration {path} is damaged ({error}); {AGAIN}") from error
        try:
            tp, hidden, sequences, length = (int(metadata[key]) for key in ("tp", "hidden", "sequences", "length"))
            fingerprint, text_sha256 = metadata["fingerprint"], metadata["text_sha256"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"calibration {path} is damaged (its header: {error}); {AGAIN}") from error
        expected = {
            "partial_min": (tp, hidden),
            "partial_max": (tp, hidden),
            "sum_min": (hidden,),
            "sum_max": (hidden,),
        }
        points: dict[str, dict[str, torch.Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, _, statistic = full_name.rpartition(".")
            if statistic in expected and (tuple(tensor.shape) != expected[statistic] or tensor.dtype != torch.float32):
                raise ValueError(
                    f"calibration {path}: {full_name} is {tensor.dtype} {tuple(tensor.shape)}, expected float32 "
                    f"{expected[statistic]}; {AGAIN}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"calibration {path}: {full_name} holds values that are not finite; {AGAIN}")
            points.setdefault(name, {})[statistic] = tensor
        incomplete = [name for name, statistics in points.items() if not set(STATISTICS) <= set(statistics)]
        if incomplete or not points:
            raise ValueError(f"calibration {path} lacks statistics of {incomplete or 'every sync point'}; {AGAIN}")
        sync_points = {}
        for name, statistics in points.items():
            ranges = {statistic: statistics.pop(statistic) for statistic in STATISTICS}
            try:
                moments = SyncPointMoments.from_tensors(statistics, tp, hidden) if statistics else None
            except ValueError as error:
                raise ValueError(f"calibration {path}: sync point {name}: {error}; {AGAIN}") from error
            sync_points[name] = SyncPointStatistics(**ranges, moments=moments)
        return cls(
            fingerprint=fingerprint,
            tp=tp,
            hidden=hidden,
            sequences=sequences,
            length=length,
            text_sha256=text_sha256,
            sync_points=sync_points,
        )

    def digest(self) -> str:
        """Hex SHA-256 of the statistics: equal where every constant derived from them is."""
        digest = hashlib.sha256()
        for name, point in sorted(self.sync_points.items()):
            digest.update(name.encode())
            for statistic, tensor in sorted(point.tensors().items()):
                digest.update(statistic.encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def check_fits(self, fingerprint: str, tp: int, where: str) -> None:
        """Raises ValueError where the statistics are of another model or tensor-parallel size."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"calibration {where} belongs to another model (fingerprint {self.fingerprint[:12]}, this model has "
                f"{fingerprint[:12]}); calibrate this model with `megatron-lowbit calibrate`"
            )
        if self.tp != tp:
            raise ValueError(
                f"calibration {where} was made for {self.tp} tensor-parallel ranks, this run has {tp}; "
                f"calibrate with `megatron-lowbit calibrate … --tp {tp}` (or --virtual-tp {tp})"
            )
