"""Grouped-query attention over this rank's heads, any number of them, none included."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.attend import attend
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.layers.linear import QKVParallelLinear, RowParallelLinear, Tensors
from megatron_lowbit.layers.norm import RMSNorm
from megatron_lowbit.layers.rotary import Tables, rotate
from megatron_lowbit.layers.sharded import ShardedModule
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import cut_evenly

# Shapes: T tokens of all sequences, B sequences, S new tokens of one sequence, E all its tokens, D head features;
# N query heads of this rank, M its key-value heads, W the most query heads that share one of them here.

#: Queries of a sequence that attend together where masks or scores would otherwise grow with its square.
_QUERIES_AT_ONCE = 512


class Attention(ShardedModule):
    """Causal self-attention with rotary embedding; adds its output to the residual.

    Query heads are dealt evenly; where a key-value head's group is cut between ranks, both hold that head and each
    attends with its own part of the group, so any head count runs at any tensor-parallel size without approximation.
    """

    sinks: torch.Tensor | None

    def __init__(
        self, context: ParallelContext, config: ModelConfig, tensors: Tensors, prefix: str, dtype: torch.dtype,
        sync_point: SyncPoint, window: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(context)
        self.qkv_proj = QKVParallelLinear(context, tensors, prefix, dtype)
        self.o_proj = RowParallelLinear(context, tensors, f"{prefix}.o_proj", dtype, sync_point)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            eps, offset = config.rms_norm_eps, config.norm_offset
            self.q_norm = RMSNorm(context, tensors[f"{prefix}.q_norm.weight"], eps, dtype, offset)
            self.k_norm = RMSNorm(context, tensors[f"{prefix}.k_norm.weight"], eps, dtype, offset)
        if config.attention_sinks:
            self.add_parameter("sinks", torch.float32, tensors[f"{prefix}.sinks"])
        else:
            self.sinks = None
        self.window = window
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.softcap = config.attention_softcap
        self._written_out = config.attention_softcap is not None or config.attention_sinks
        rank, size = context.shard
        first, stop = cut_evenly(config.num_heads, size)[rank]
        groups = [head // config.heads_per_kv_head for head in range(first, stop)]
        self.num_heads = len(groups)
        self.num_kv_heads = len(set(groups))
        local = [group - groups[0] for group in groups]
        #: local key-value head of each local query head
        self.kv_of_query = torch.tensor(local, dtype=torch.int64, device=context.device)
        widest = max((local.count(group) for group in local), default=0)
        slots = [group * widest + local[:head].count(group) for head, group in enumerate(local)]
        self._group_slots = torch.tensor(slots, dtype=torch.int64, device=context.device)
        self._widest = widest
        self._groups_are_full = len(local) == widest * self.num_kv_heads

    def forward(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        rotary: Tables,
        batch: TokenBatch,
        layer_cache: tuple[torch.Tensor, torch.Tensor] | None,
        state: object,
    ) -> torch.Tensor:
        """FP32 residual with the attention output added; `layer_cache` (keys, values) is filled in place."""
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(x_TH))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if self.num_heads == 0:
            attended = query.flatten(1)
        elif layer_cache is not None and batch.is_decode:
            attended = self._decode(query, key, value, batch, layer_cache)
        else:
            attended = self._prefill(query, key, value, batch, layer_cache)
        return self.o_proj(attended, residual_TH, x_TH, state)

    def _decode(
        self, query_BND: torch.Tensor, key_BMD: torch.Tensor, value_BMD: torch.Tensor, batch: TokenBatch,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """One new token for each sequence. The query heads of a group attend together as rows of one product."""
        keys, values = cache
        rows = torch.arange(len(batch.lengths), device=query_BND.device)
        keys[rows, :, batch.positions_T] = key_BMD
        values[rows, :, batch.positions_T] = value_BMD
        first, end, mask = batch.decode_view(self.window)
        key_BMED, value_BMED = keys[:, :, first:end], values[:, :, first:end]
        grouped = self._grouped(query_BND)
        if self._written_out:
            if mask is None:
                mask = torch.ones((), dtype=torch.bool, device=query_BND.device)
            sinks = None if self.sinks is None else self._grouped(self.sinks[None, :, None])
            out = attend(grouped, key_BMED, value_BMED, mask, self.scale, self.softcap, sinks)
        else:
            out = F.scaled_dot_product_attention(grouped, key_BMED, value_BMED, attn_mask=mask, scale=self.scale)
        return self._ungrouped(out).flatten(1)

    def _prefill(
        self, query_TND: torch.Tensor, key_TMD: torch.Tensor, value_TMD: torch.Tensor, batch: TokenBatch,
        cache: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Several new tokens a sequence, sequence by sequence: none sees another's tokens or padding."""
        outputs = []
        pieces = (tensor.split(batch.lengths) for tensor in (query_TND, key_TMD, value_TMD))
        for row, (query_SND, key, value) in enumerate(zip(*pieces, strict=True)):
            start, end = batch.starts[row], batch.starts[row] + batch.lengths[row]
            key_MED, value_MED = key.transpose(0, 1), value.transpose(0, 1)
            if cache is not None:
                keys, values = cache
                keys[row, :, start:end] = key_MED
                values[row, :, start:end] = value_MED
                key_MED, value_MED = keys[row, :, :end], values[row, :, :end]
            together = _QUERIES_AT_ONCE if self._written_out or self.window is not None else end - start
            for block_SND in query_SND.split(together):
                stop = start + len(block_SND)
                first = 0 if self.window is None else max(0, start + 1 - self.window)
                seen = key_MED[:, first:stop], value_MED[:, first:stop]
                outputs.append(self._attend_causally(block_SND, *seen, start - first, batch))
                start = stop
        return torch.cat(outputs)

    def _attend_causally(
        self, query_SND: torch.Tensor, key_MED: torch.Tensor, value_MED: torch.Tensor, before: int, batch: TokenBatch
    ) -> torch.Tensor:
        """`[S, N * D]`: queries behind `before` of the keys, each of which sees its window of those up to its own."""
        queries, keys = len(query_SND), key_MED.shape[1]
        if self._written_out:
            mask_SE = batch.causal_mask(before, queries, self.window)
            grouped_MQD = self._grouped(query_SND).permute(1, 2, 0, 3).flatten(1, 2)
            sink_MQ1 = None
            if self.sinks is not None:
                sink_MQ1 = self._grouped(self.sinks[None, :, None])[0].repeat_interleave(queries, dim=1)
            mask_QE = mask_SE.repeat(self._widest, 1)
            out = attend(grouped_MQD, key_MED, value_MED, mask_QE, self.scale, self.softcap, sink_MQ1)
            return self._ungrouped(out.unflatten(1, (self._widest, queries)).permute(2, 0, 1, 3)).flatten(1)
        # without a mask torch takes a quicker way
        is_plain = before == 0 and (self.window is None or self.window >= keys)
        if not self._groups_are_full:  # uneven groups: each query head gets a copy of its key-value head
            key_MED = key_MED.index_select(0, self.kv_of_query)
            value_MED = value_MED.index_select(0, self.kv_of_query)
        out = F.scaled_dot_product_attention(
            query_SND.transpose(0, 1)[None],
            key_MED[None],
            value_MED[None],
            attn_mask=None if is_plain else batch.causal_mask(before, queries, self.window),
            is_causal=is_plain,
            scale=self.scale,
            enable_gqa=self._groups_are_full,
        )
        return out[0].transpose(0, 1).flatten(1)

    def _grouped(self, x_TND: torch.Tensor) -> torch.Tensor:
        """`[T, M, W, D]`: the query heads of each key-value head.

        Uneven groups are padded to the widest; the padding attends to something and is dropped again.
        """
        shape = (x_TND.shape[0], self.num_kv_heads, self._widest, x_TND.shape[2])
        if self._groups_are_full:
            return x_TND.reshape(shape)
        padded = x_TND.new_zeros(shape[0], shape[1] * shape[2], shape[3])
        padded[:, self._group_slots] = x_TND
        return padded.view(shape)

    def _ungrouped(self, x_TMWD: torch.Tensor) -> torch.Tensor:
        """`[T, N, D]` again."""
        x = x_TMWD.flatten(1, 2)
        return x if self._groups_are_full else x[:, self._group_slots]
