"""Decoder: embedding, layers, final norm and head of a decoder-only transformer, tensor-parallel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron_lowbit.comm.all_reduce import AllReduce
from megatron_lowbit.comm.sync_point import JoiningAllReduce, SyncPoint
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.attention import Attention
from megatron_lowbit.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from megatron_lowbit.layers.kv_cache import KVCache, TokenBatch
from megatron_lowbit.layers.linear import Tensors
from megatron_lowbit.layers.mlp import GatedMLP
from megatron_lowbit.layers.moe import MoE
from megatron_lowbit.layers.norm import RMSNorm
from megatron_lowbit.layers.rotary import Rotary, Tables
from megatron_lowbit.layers.sharded import ShardedModule
from megatron_lowbit.models.registry import tensor_sources
from megatron_lowbit.parallel import ParallelContext

# Shapes: T tokens of all sequences, H hidden features.

#: The collective of the sync point with this name.
AllReduceFactory = Callable[[str], AllReduce | JoiningAllReduce]
#: Makes what a scheme carries from sync point to sync point through one forward pass.
StateFactory = Callable[[TokenBatch], object]


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each behind a norm and ending at a sync point."""

    def __init__(
        self, context: ParallelContext, config: ModelConfig, tensors: Tensors, layer: int, dtype: torch.dtype,
        all_reduce: AllReduceFactory,
    ) -> None:  # fmt: skip
        super().__init__()
        prefix = f"model.layers.{layer}"
        window = config.window_of(layer)
        self.has_local_rotary = window is not None and config.rope_local_theta is not None

        def norm(name: str, dtype: torch.dtype) -> RMSNorm:
            source = tensors[f"{prefix}.{name}.weight"]
            return RMSNorm(context, source, config.rms_norm_eps, dtype, config.norm_offset)

        self.input_layernorm = norm("input_layernorm", dtype)
        # named as in checkpoints: Gemma's `post_attention_layernorm` really is behind the attention, Llama's before the
        # feed-forward block
        before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        self.mlp_layernorm = norm(before_mlp, dtype)
        self.attention_post_norm = self.mlp_post_norm = None
        if config.post_norms:
            self.attention_post_norm = norm("post_attention_layernorm", torch.float32)
            self.mlp_post_norm = norm("post_feedforward_layernorm", torch.float32)

        def sync_point(path: str, post_norm: RMSNorm | None) -> SyncPoint:
            name = f"layers.{layer}.{path}"
            return SyncPoint(name, all_reduce(name), post_norm)

        point = sync_point("self_attn.o_proj", self.attention_post_norm)
        self.self_attn = Attention(context, config, tensors, f"{prefix}.self_attn", dtype, point, window)
        feed_forward = MoE if config.is_moe(layer) else GatedMLP
        point = sync_point("mlp.down_proj", self.mlp_post_norm)
        self.mlp = feed_forward(context, config, tensors, f"{prefix}.mlp", dtype, point)

    def forward(
        self,
        residual_TH: torch.Tensor,
        rotary: Tables,
        batch: TokenBatch,
        layer_cache: tuple[torch.Tensor, torch.Tensor] | None,
        state: object,
    ) -> torch.Tensor:
        """The FP32 residual with both blocks' outputs added."""
        residual_TH = self.self_attn(self.input_layernorm(residual_TH), residual_TH, rotary, batch, layer_cache, state)
        return self.mlp(self.mlp_layernorm(residual_TH), residual_TH, state)


class Decoder(nn.Module):
    """The model of one process. Weights and activations have `dtype`, the residual stream is FP32.

    all_reduce: gives the collective of each sync point when the model is built; nothing chooses one later.
    new_state: called once a forward pass, for what all its sync points are given; None: they are given None.
    """

    def __init__(
        self, context: ParallelContext, config: ModelConfig, dtype: torch.dtype, all_reduce: AllReduceFactory,
        new_state: StateFactory | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        tensors = tensor_sources(config)
        self.config = config
        self.context = context
        self.dtype = dtype
        self.embed_tokens = VocabParallelEmbedding(
            context, tensors["model.embed_tokens.weight"], dtype, config.embedding_scale
        )
        self.layers = nn.ModuleList(
            DecoderLayer(context, config, tensors, layer, dtype, all_reduce) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(context, tensors["model.norm.weight"], config.rms_norm_eps, dtype, config.norm_offset)
        self.lm_head: ShardedModule | None = None
        self._head_source = tensors["model.embed_tokens.weight"]
        if not config.tie_embeddings:
            self._head_source = tensors["lm_head.weight"]
            self.lm_head = ShardedModule(context)
            self.lm_head.add_parameter("weight", dtype, self._head_source)
        self._rotary = Rotary(config, context.device)
        #: of layers with a sliding window, where those have their own
        self._local_rotary = None
        if any(config.sliding_layers) and config.rope_local_theta is not None:
            self._local_rotary = Rotary(config, context.device, local=True)
        self._new_state = new_state

    @property
    def head(self) -> VocabParallelHead:
        """The output projection, with the embedding's weight where the two are tied."""
        holder = self.embed_tokens if self.lm_head is None else self.lm_head
        assert isinstance(holder.weight, torch.Tensor)
        return VocabParallelHead(self.context, holder.weight, self._head_source, self.config.logits_softcap)

    def new_cache(self, sequences: int, capacity: int) -> KVCache:
        attention = self.layers[0].self_attn
        assert isinstance(attention, Attention)
        return KVCache(
            len(self.layers), sequences, attention.num_kv_heads, capacity, self.config.head_dim, self.dtype,
            self.context.device,
        )  # fmt: skip

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, cache: KVCache | None = None) -> torch.Tensor:
        """Normed hidden states `[T, H]` in the model's dtype; with a cache, its keys and values grow by the batch."""
        residual_TH = self.embed_tokens(batch.tokens_T).float()
        capacity = None if cache is None else cache.capacity
        rotary = self._rotary.tables(batch, capacity)
        local_rotary = rotary if self._local_rotary is None else self._local_rotary.tables(batch, capacity)
        state = None if self._new_state is None else self._new_state(batch)
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else (cache.keys[index], cache.values[index])
            tables = local_rotary if layer.has_local_rotary else rotary
            residual_TH = layer(residual_TH, tables, batch, layer_cache, state)
        if cache is not None:
            cache.advance(batch)
        return self.norm(residual_TH)
