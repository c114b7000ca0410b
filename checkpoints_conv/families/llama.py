"""The Llama family in GGUF files: what its tensors and metadata are called there."""

from __future__ import annotations

from checkpoints_conv.families.table import GGUFFamily

LLAMA = GGUFFamily(
    architecture="llama",
    model_type="llama",
    modules={
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    },
    layer_modules={
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    interleaved_heads={"self_attn.q_proj": "num_heads", "self_attn.k_proj": "num_kv_heads"},
    bias_flags={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
)
