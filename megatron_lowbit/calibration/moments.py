"""SyncPointMoments: typical magnitudes and the predictor of one sync point, beside the ranges the paper asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from megatron_lowbit.calibration.predictor_fit import constant_predictor
from megatron_lowbit.calibration.step_observer import BITS
from megatron_lowbit.comm.constants import LoopLimits
from megatron_lowbit.comm.predictor import Predictor

# Shapes: R ranks, H hidden features, K rank of the predictor.

#: What helps where a file lacks something.
AGAIN = "run `megatron-lowbit calibrate` again"
#: Tensors of a predictor are stored under this and their field's name.
PREDICTOR = "predictor_"


@dataclass(frozen=True)
class SyncPointMoments:
    """Root mean squares over tokens, FP32: `[R, H]` of every rank's partial, `[H]` of the sum.

    rest_*: of what is left when the predictor's share is taken out (equal to the others where it is None).
    ratio_R: estimates the root mean square of a row of the sum from that of a rank's partial (`RatioObserver`).
    predictor: None where it did not help on text that it was not fitted to.
    partial_mean: `[R, H]`, each token weighing 1 over its sum's mean square. partial_step, sum_step: static steps of
    least squared error, `[7, R, H]` and `[7, H]`, at 2 to 8 bits. All three are None in files of version 2.
    """

    partial_rms: torch.Tensor
    sum_rms: torch.Tensor
    rest_partial_rms: torch.Tensor
    rest_sum_rms: torch.Tensor
    ratio_R: torch.Tensor
    predictor: Predictor | None
    partial_mean: torch.Tensor | None = None
    partial_step: torch.Tensor | None = None
    sum_step: torch.Tensor | None = None

    def predictor_of_rank(self, rank: int) -> Predictor | None:
        """The `rank` most telling dimensions; None for 0. Raises ValueError for more than were fitted."""
        if rank == 0 or self.predictor is None:
            return None
        whole, fitted = self.predictor, self.predictor.first_HK.shape[1]
        if rank > fitted and fitted < whole.first_HK.shape[0]:
            raise ValueError(
                f"a predictor of rank {rank} was asked for, the calibration has rank {fitted}; calibrate with "
                f"--predictor-rank {rank}"
            )
        return Predictor(
            whole.input_scale_H,
            whole.first_HK[:, :rank].contiguous(),
            whole.offset_K[:rank],
            whole.factor_K[:rank],
            whole.second_RKH[:, :rank].contiguous(),
            whole.scale_H,
        )

    def constant_predictor(self) -> Predictor:
        """Foretells the mean of every rank's partials, whatever the input. Raises ValueError for an older file."""
        return constant_predictor(self._given("partial_mean"))

    def fitted_steps(self, bits: int, foretold: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """FP32 `[R, H]` of partials and `[1, H]` of sums. Raises ValueError for an older file.

        foretold: what a predictor leaves has steps as much smaller as its root mean square is.
        """
        partial, total = (self._given(name)[bits - BITS[0]] for name in ("partial_step", "sum_step"))
        if foretold:
            partial = partial * self.rest_partial_rms / self.partial_rms.clamp_min(1e-30)
            total = total * self.rest_sum_rms / self.sum_rms.clamp_min(1e-30)
        return partial, total[None]

    def _given(self, name: str) -> torch.Tensor:
        found: torch.Tensor | None = getattr(self, name)
        if found is None:
            raise ValueError(f"the calibration lacks {name}, it is an older one; {AGAIN}")
        return found

    def limits(self, foretold: bool) -> LoopLimits:
        """What the closed loop needs, with or without a predictor."""
        if foretold:
            return LoopLimits(self.rest_partial_rms, self.rest_sum_rms, self.ratio_R)
        return LoopLimits(self.partial_rms, self.sum_rms, self.ratio_R)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, for a file."""
        plain = {name: getattr(self, name) for name in (*PLAIN, *LATER) if getattr(self, name) is not None}
        if self.predictor is not None:
            plain |= {PREDICTOR + name: tensor for name, tensor in self.predictor.tensors().items()}
        # clones: a file cannot hold one tensor under two names, as those of a point without predictor are
        return {name: tensor.contiguous().clone() for name, tensor in plain.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], ranks: int, hidden: int) -> SyncPointMoments:
        """Reads what `tensors` gave. Raises ValueError for anything missing, unknown or of a wrong shape."""
        parts = {name: tensor for name, tensor in tensors.items() if name.startswith(PREDICTOR)}
        shapes: dict[str, tuple[int, ...]] = {
            "partial_rms": (ranks, hidden), "sum_rms": (hidden,), "rest_partial_rms": (ranks, hidden),
            "rest_sum_rms": (hidden,), "ratio_R": (ranks,),
        }  # fmt: skip
        if set(LATER) & set(tensors):
            steps = len(BITS)
            later = (ranks, hidden), (steps, ranks, hidden), (steps, hidden)
            shapes |= dict(zip(LATER, later, strict=True))
        expected = {name: (shape, torch.float32) for name, shape in shapes.items()}
        if parts:
            width = parts[PREDICTOR + "offset_K"].numel() if PREDICTOR + "offset_K" in parts else 0
            expected |= {
                PREDICTOR + "input_scale_H": ((hidden,), torch.float32),
                PREDICTOR + "first_HK": ((hidden, width), torch.int8),
                PREDICTOR + "offset_K": ((width,), torch.float32),
                PREDICTOR + "factor_K": ((width,), torch.float32),
                PREDICTOR + "second_RKH": ((ranks, width, hidden), torch.int8),
                PREDICTOR + "scale_H": ((hidden,), torch.float32),
            }
        if set(tensors) != set(expected):
            odd = sorted(set(tensors) ^ set(expected))
            raise ValueError(f"{odd[0]} is missing or unknown")
        for name, (shape, dtype) in expected.items():
            if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
                found = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
                raise ValueError(f"{name} is {found}, expected {dtype} {shape}")
        predictor = None
        if parts:
            predictor = Predictor(**{field.name: parts[PREDICTOR + field.name] for field in fields(Predictor)})
        return cls(**{name: tensors[name] for name in shapes}, predictor=predictor)


#: Of every file with moments, and of those since version 3.
LATER = ("partial_mean", "partial_step", "sum_step")
PLAIN = tuple(field.name for field in fields(SyncPointMoments) if field.name not in ("predictor", *LATER))
