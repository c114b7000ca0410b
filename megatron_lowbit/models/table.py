"""The tensors of a decoder by canonical name, from the features in its ModelConfig: one table for all families."""

from __future__ import annotations

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.experts import expert_sources
from megatron_lowbit.sharding import ShardRule, TensorSource
from megatron_lowbit.stored import StoredPart


def decoder_tensors(config: ModelConfig) -> dict[str, TensorSource]:
    """Every tensor by its canonical name (Llama's and Gemma's in Hugging Face), with full shape and how it is cut."""
    vocabulary, hidden = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    vocab_rows = ShardRule(dim=0, units=config.vocab_size)
    table = [TensorSource("model.embed_tokens.weight", vocabulary, vocab_rows)]
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        table += [TensorSource(f"{prefix}{norm}.weight", hidden) for norm in norms]
        table += _attention(config, prefix + "self_attn.")
        feed_forward = expert_sources if config.is_moe(layer) else _feed_forward
        table += feed_forward(config, prefix + "mlp.")
    table.append(TensorSource("model.norm.weight", hidden))
    if not config.tie_embeddings:
        table.append(TensorSource("lm_head.weight", vocabulary, vocab_rows))
    return {source.name: source for source in table}


def _attention(config: ModelConfig, prefix: str) -> list[TensorSource]:
    hidden, width, heads = config.hidden_size, config.head_dim, config.num_heads
    queries, key_values = heads * width, config.num_kv_heads * width
    query = ShardRule(dim=0, units=heads, block=width)
    key_value = ShardRule(dim=0, units=heads, units_per_block=config.heads_per_kv_head, block=width)
    table = [
        TensorSource(prefix + "q_proj.weight", (queries, hidden), query),
        TensorSource(prefix + "k_proj.weight", (key_values, hidden), key_value),
        TensorSource(prefix + "v_proj.weight", (key_values, hidden), key_value),
        TensorSource(prefix + "o_proj.weight", (hidden, queries), ShardRule(dim=1, units=heads, block=width)),
    ]
    if config.attention_bias:
        table += [
            TensorSource(prefix + "q_proj.bias", (queries,), query),
            TensorSource(prefix + "k_proj.bias", (key_values,), key_value),
            TensorSource(prefix + "v_proj.bias", (key_values,), key_value),
        ]
    if config.attention_output_bias:
        # row-parallel biases are whole on every rank: they are added once, after the reduction
        table.append(TensorSource(prefix + "o_proj.bias", (hidden,)))
    if config.qk_norm:
        table += [TensorSource(f"{prefix}{norm}.weight", (width,)) for norm in ("q_norm", "k_norm")]
    if config.attention_sinks:
        table.append(TensorSource(prefix + "sinks", (heads,), ShardRule(dim=0, units=heads)))
    return table


def _feed_forward(config: ModelConfig, prefix: str) -> list[TensorSource]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    columns, rows = ShardRule(dim=0, units=ffn), ShardRule(dim=1, units=ffn)
    table = [
        TensorSource(prefix + "gate_proj.weight", (ffn, hidden), columns),
        TensorSource(prefix + "up_proj.weight", (ffn, hidden), columns),
        TensorSource(prefix + "down_proj.weight", (hidden, ffn), rows),
    ]
    if config.mlp_bias:
        table += [
            TensorSource(prefix + "gate_proj.bias", (ffn,), columns),
            TensorSource(prefix + "up_proj.bias", (ffn,), columns),
            TensorSource(prefix + "down_proj.bias", (hidden,)),
        ]
    return table


def stored_under_own_names(config: ModelConfig) -> dict[str, StoredPart]:
    """Nothing: these checkpoints keep every tensor under its canonical name."""
    return {}
