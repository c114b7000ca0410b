"""Layers of experts: what `config.json` says of them, and their tensors with the way these are cut over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_lowbit.config import ModelConfig, MoEConfig
from megatron_lowbit.models.hf_config import integer
from megatron_lowbit.sharding import ShardRule, TensorSource


def experts_from_hf(hf: Mapping[str, Any], where: str, width: str, **own: Any) -> MoEConfig:
    """MoEConfig of the keys that families share. width: the key of an expert's features. Raises ValueError."""
    # transformers uses the two names for the same
    count = "num_experts" if hf.get("num_local_experts") is None else "num_local_experts"
    return MoEConfig(
        num_experts=integer(hf, count, where),
        experts_per_token=integer(hf, "num_experts_per_tok", where),
        intermediate_size=integer(hf, width, where),
        **own,
    )


def expert_sources(config: ModelConfig, prefix: str) -> list[TensorSource]:
    """Router and experts below `prefix` ("model.layers.3.mlp."). Every expert's features are cut over all ranks."""
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    width = moe.intermediate_size
    columns, rows = ShardRule(dim=0, units=width), ShardRule(dim=1, units=width)
    table = [TensorSource(prefix + "gate.weight", (moe.num_experts, hidden))]
    if moe.router_bias:
        table.append(TensorSource(prefix + "gate.bias", (moe.num_experts,)))
    for expert in range(moe.num_experts):
        start = f"{prefix}experts.{expert}."
        table += [
            TensorSource(start + "gate_proj.weight", (width, hidden), columns),
            TensorSource(start + "up_proj.weight", (width, hidden), columns),
            TensorSource(start + "down_proj.weight", (hidden, width), rows),
        ]
        if moe.expert_bias:
            table += [
                TensorSource(start + "gate_proj.bias", (width,), columns),
                TensorSource(start + "up_proj.bias", (width,), columns),
                # whole on every rank: weighted and added once, after the reduction
                TensorSource(start + "down_proj.bias", (hidden,)),
            ]
    return table


def moe_layers(config: ModelConfig) -> Iterator[tuple[int, str]]:
    """(layer, prefix of its feed-forward tensors) of every layer with experts."""
    for layer in range(config.num_layers):
        if config.is_moe(layer):
            yield layer, f"model.layers.{layer}.mlp."
