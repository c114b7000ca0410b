"""The Llama family: Llama 1 to 3.x, SmolLM2, Mistral without a sliding window, and checkpoints of the same layout."""

from __future__ import annotations

from typing import Any

from megatron_lowbit.config import ModelConfig, RopeScaling
from megatron_lowbit.sharding import ShardRule, TensorSource
from megatron_lowbit.stored import StoredPart

MODEL_TYPES: tuple[str, ...] = ("llama", "mistral")


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError."""
    try:
        hidden, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
        layers, intermediate = int(hf["num_hidden_layers"]), int(hf["intermediate_size"])
        vocabulary = int(hf["vocab_size"])
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} is missing; it must hold the shapes of a Llama model") from error
    window = hf.get("sliding_window")
    maximum = int(hf.get("max_position_embeddings", 2048))
    if window is not None and window < maximum:
        raise ValueError(
            f"{where}: sliding_window {window} is shorter than the context of {maximum} tokens, and sliding-window "
            f"attention is not supported; set max_position_embeddings to at most {window}"
        )
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"{where}: hidden_act is {activation!r}; this family supports 'silu'")
    theta, scaling = _rope(hf, where)
    eos = hf.get("eos_token_id")
    return ModelConfig(
        family="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=int(hf.get("head_dim") or hidden // heads),
        vocab_size=vocabulary,
        max_position=maximum,
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        rope_scaling=scaling,
        attention_bias=bool(hf.get("attention_bias", False)),
        attention_output_bias=bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def _rope(hf: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). Newer configs keep both in `rope_parameters`, older ones in `rope_theta` and `rope_scaling`."""
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{where}: rope type {kind!r} is not supported; supported: 'default', 'llama3'")
    return theta, RopeScaling(
        kind="llama3",
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position=int(parameters["original_max_position_embeddings"]),
    )


def tensor_sources(config: ModelConfig) -> dict[str, TensorSource]:
    """Every checkpoint tensor by its Hugging Face name, with full shape and the way it is cut over ranks."""
    hidden, width, ffn, vocabulary = (
        config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size,
    )  # fmt: skip
    heads = config.num_heads

    def query(dim: int) -> ShardRule:
        return ShardRule(dim=dim, units=heads, block=width)

    key_value = ShardRule(dim=0, units=heads, units_per_block=config.heads_per_kv_head, block=width)
    columns, rows = ShardRule(dim=0, units=ffn), ShardRule(dim=1, units=ffn)
    vocab_rows = ShardRule(dim=0, units=vocabulary)
    kv_width = config.num_kv_heads * width

    table = [TensorSource("model.embed_tokens.weight", (vocabulary, hidden), vocab_rows)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        table += [
            TensorSource(prefix + "input_layernorm.weight", (hidden,)),
            TensorSource(prefix + "post_attention_layernorm.weight", (hidden,)),
            TensorSource(prefix + "self_attn.q_proj.weight", (heads * width, hidden), query(0)),
            TensorSource(prefix + "self_attn.k_proj.weight", (kv_width, hidden), key_value),
            TensorSource(prefix + "self_attn.v_proj.weight", (kv_width, hidden), key_value),
            TensorSource(prefix + "self_attn.o_proj.weight", (hidden, heads * width), query(1)),
            TensorSource(prefix + "mlp.gate_proj.weight", (ffn, hidden), columns),
            TensorSource(prefix + "mlp.up_proj.weight", (ffn, hidden), columns),
            TensorSource(prefix + "mlp.down_proj.weight", (hidden, ffn), rows),
        ]
        if config.attention_bias:
            table += [
                TensorSource(prefix + "self_attn.q_proj.bias", (heads * width,), query(0)),
                TensorSource(prefix + "self_attn.k_proj.bias", (kv_width,), key_value),
                TensorSource(prefix + "self_attn.v_proj.bias", (kv_width,), key_value),
            ]
        if config.attention_output_bias:
            # row-parallel biases are whole on every rank: they are added once, after the reduction
            table.append(TensorSource(prefix + "self_attn.o_proj.bias", (hidden,)))
        if config.mlp_bias:
            table += [
                TensorSource(prefix + "mlp.gate_proj.bias", (ffn,), columns),
                TensorSource(prefix + "mlp.up_proj.bias", (ffn,), columns),
                TensorSource(prefix + "mlp.down_proj.bias", (hidden,)),
            ]
    table.append(TensorSource("model.norm.weight", (hidden,)))
    if not config.tie_embeddings:
        table.append(TensorSource("lm_head.weight", (vocabulary, hidden), vocab_rows))
    return {source.name: source for source in table}


def stored_parts(config: ModelConfig) -> dict[str, StoredPart]:
    """Nothing: these checkpoints keep every tensor under its canonical name."""
    return {}
