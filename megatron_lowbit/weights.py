"""ModelWeights: this process's shards of a checkpoint, from which models with any scheme are built without a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.outliers import sync_point_constants
from megatron_lowbit.checkpoint.fingerprint import fingerprint
from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.checkpoint.reader import CheckpointReader, check_complete
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint
from megatron_lowbit.comm.all_reduce import AllReduce, SingleRankAllReduce, build_all_reduce
from megatron_lowbit.comm.compensation import CompensatedAllReduce, LoopState
from megatron_lowbit.comm.policy import Policy, PolicyLog
from megatron_lowbit.comm.saturation import SaturationCounter, SaturationLog
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.symmetric import SymmetricBuffers, reserve
from megatron_lowbit.comm.sync_point import JoiningAllReduce
from megatron_lowbit.comm.workspace import Workspace
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.sharded import assign_parameters, sharded_parameters
from megatron_lowbit.models.decoder import AllReduceFactory, Decoder, StateFactory
from megatron_lowbit.models.registry import tensor_sources
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import TensorSource

#: Of a sync point's name and its collective.
Wrapper = Callable[[str, AllReduce | CompensatedAllReduce], JoiningAllReduce]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelWeights:
    """Loaded tensors by parameter name. Several models (one a scheme) share them."""

    config: ModelConfig
    context: ParallelContext
    dtype: torch.dtype
    fingerprint: str
    tensors: dict[str, torch.Tensor]

    def build(self, all_reduce: AllReduceFactory, new_state: StateFactory | None = None) -> Decoder:
        """A model over these weights whose sync points use the given collectives, and what they are given each pass."""
        model = Decoder(self.context, self.config, self.dtype, all_reduce, new_state)
        assign_parameters(model, self.tensors)
        return model

    def build_with_scheme(
        self,
        scheme: CommScheme,
        calibration: CommCalibration | None = None,
        backend: str = "auto",
        saturation: SaturationLog | None = None,
        policy: Policy | None = None,
        policy_log: PolicyLog | None = None,
        wrap: Wrapper | None = None,
    ) -> Decoder:
        """A model whose sync points all use `scheme`.

        Called on all ranks alike. Raises ValueError (RankError on several ranks) where the scheme needs a calibration
        that is missing or of another model or size. saturation: gets a counter for every sync point, if given. policy:
        lets small messages of a two-stage scheme go another way (the log counts which); None: the scheme at every size.
        wrap: gives what stands at each sync point in place of its collective, to look at what goes through.
        """
        symmetric = None
        if scheme.portable and backend in ("auto", "triton"):
            symmetric = reserve(self.context, scheme.for_dtype(self.dtype), self.config.hidden_size)
        model = self.context.together(
            lambda: self._build_with_scheme(
                scheme, calibration, backend, saturation, policy, policy_log, symmetric, wrap
            )
        )
        self.context.agree_same(repr(scheme), "the communication scheme")
        self.context.agree_same(policy and policy.to_json(), "the policy")
        # a rank decodes with its own copy of the senders' scales: other numbers there, and replicas drift apart unseen
        used = calibration.digest()[:12] if scheme.needs_calibration and calibration is not None else None
        self.context.agree_same(used, "the calibration")
        return model

    def _build_with_scheme(
        self,
        scheme: CommScheme,
        calibration: CommCalibration | None,
        backend: str,
        saturation: SaturationLog | None,
        policy: Policy | None,
        policy_log: PolicyLog | None,
        symmetric: SymmetricBuffers | None,
        wrap: Wrapper | None,
    ) -> Decoder:
        if self.context.size == 1:
            return self.build(lambda name: SingleRankAllReduce())
        if scheme.needs_calibration and calibration is not None:
            calibration.check_fits(self.fingerprint, self.context.size, "file")
        scheme = scheme.for_dtype(self.dtype)

        workspace, points = Workspace(), self.config.sync_points

        def all_reduce(name: str) -> AllReduce | JoiningAllReduce:
            counter = None if saturation is None else saturation.setdefault(name, SaturationCounter())
            own = scheme.at(name, points)
            constants = sync_point_constants(own, name, self.config.hidden_size, calibration, self.context.device)
            collective = build_all_reduce(
                self.context, own, self.config.hidden_size, constants, backend, name, counter, policy, policy_log,
                workspace, self.dtype, symmetric=symmetric, post_norm=self.config.post_norms,
            )  # fmt: skip
            return collective if wrap is None else wrap(name, collective)

        return self.build(all_reduce, (lambda batch: LoopState()) if scheme.loop else None)


def load_weights(
    path: Path,
    context: ParallelContext,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelWeights:
    """Reads what this rank holds from a converted checkpoint of any size, or a Hugging Face directory.

    dtype: of weights and activations; by default FP32 for a checkpoint converted to FP32, else BF16.
    progress: called with (done, total) tensors. A failure on one rank is raised on all of them (RankError).
    """
    weights = context.together(lambda: _read(open_checkpoint(path), context, dtype, progress))
    context.agree_same([weights.fingerprint[:12], str(weights.dtype)], "the model and its dtype")
    return weights


def _read(
    reader: CheckpointReader,
    context: ParallelContext,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> ModelWeights:
    check_complete(reader, tensor_sources(reader.config))
    if isinstance(reader, TensorParallelCheckpoint):
        for name in reader.files_for_rank(*context.shard):
            reader.verify_file(name)
    if dtype is None:
        stored = reader.dtype("model.embed_tokens.weight")
        converted_fp32 = isinstance(reader, TensorParallelCheckpoint) and stored == torch.float32
        dtype = torch.float32 if converted_fp32 else torch.bfloat16
    skeleton = Decoder(context, reader.config, dtype, lambda name: SingleRankAllReduce())
    parameters = list(sharded_parameters(skeleton))
    tensors = {}
    for done, (name, parameter, sources) in enumerate(parameters):
        tensor = torch.cat([_shard(reader, source, context) for source in sources])
        tensors[name] = tensor.to(device=context.device, dtype=parameter.dtype)
        if progress is not None:
            progress(done + 1, len(parameters))
    return ModelWeights(reader.config, context, dtype, fingerprint(reader), tensors)


def _shard(reader: CheckpointReader, source: TensorSource, context: ParallelContext) -> torch.Tensor:
    if source.rule.dim is None:
        return reader.read(source.name)
    return reader.read_span(source.name, source.rule.dim, *source.rule.span(*context.shard))
