"""Grouped-query attention over this rank's heads, any number of them, none included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.layers.linear import QKVParallelLinear, RowParallelLinear, Tensors
from megatron_lowbit.layers.rotary import rotate
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import cut_evenly

# Shapes: T tokens of all sequences, B sequences, S tokens of one sequence, D head features;
# N query heads of this rank, M its key-value heads, G the most query heads that share one of them here.


class Attention(nn.Module):
    """Causal self-attention with rotary embedding; adds its output to the residual.

    Query heads are dealt evenly; where a key-value head's group is cut between ranks, both hold that head and each
    attends with its own part of the group, so any head count runs at any tensor-parallel size without approximation.
    """

    def __init__(
        self, context: ParallelContext, config: ModelConfig, tensors: Tensors, prefix: str, dtype: torch.dtype,
        sync_point: SyncPoint,
    ) -> None:  # fmt: skip
        super().__init__()
        self.qkv_proj = QKVParallelLinear(context, tensors, prefix, dtype)
        self.o_proj = RowParallelLinear(context, tensors, f"{prefix}.o_proj", dtype, sync_point)
        self.head_dim = config.head_dim
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
        rotary_tables: tuple[torch.Tensor, torch.Tensor],
        batch: TokenBatch,
        layer_cache: tuple[torch.Tensor, torch.Tensor] | None,
        state: object,
    ) -> torch.Tensor:
        """FP32 residual with the attention output added; `layer_cache` (keys, values) is filled in place."""
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(x_TH))
        query, key = rotate(query, rotary_tables), rotate(key, rotary_tables)
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
        longest = max(batch.starts) + 1
        shape = (query_BND.shape[0], self.num_kv_heads, self._widest, self.head_dim)
        if self._groups_are_full:
            grouped = query_BND.view(shape)
        else:  # uneven groups: pad each to the widest; the padding attends to something and is dropped again
            padded = query_BND.new_zeros(shape[0], shape[1] * shape[2], shape[3])
            padded[:, self._group_slots] = query_BND
            grouped = padded.view(shape)
        out = F.scaled_dot_product_attention(
            grouped, keys[:, :, :longest], values[:, :, :longest], attn_mask=batch.decode_mask
        ).flatten(1, 2)
        if not self._groups_are_full:
            out = out[:, self._group_slots]
        return out.flatten(1)

    def _prefill(
        self, query_TND: torch.Tensor, key_TMD: torch.Tensor, value_TMD: torch.Tensor, batch: TokenBatch,
        cache: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Several new tokens a sequence, sequence by sequence: none sees another's tokens or padding."""
        outputs = []
        pieces = (tensor.split(batch.lengths) for tensor in (query_TND, key_TMD, value_TMD))
        for row, (query, key, value) in enumerate(zip(*pieces, strict=True)):
            start, end = batch.starts[row], batch.starts[row] + batch.lengths[row]
            query_NSD, key_MSD, value_MSD = (part.transpose(0, 1) for part in (query, key, value))
            if cache is not None:
                keys, values = cache
                keys[row, :, start:end] = key_MSD
                values[row, :, start:end] = value_MSD
                key_MSD, value_MSD = keys[row, :, :end], values[row, :, :end]
            mask = None
            if start:
                mask = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
            if not self._groups_are_full:  # uneven groups: each query head gets a copy of its key-value head
                key_MSD = key_MSD.index_select(0, self.kv_of_query)
                value_MSD = value_MSD.index_select(0, self.kv_of_query)
            out = F.scaled_dot_product_attention(
                query_NSD[None],
                key_MSD[None],
                value_MSD[None],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self._groups_are_full,
            )
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)
