"""The tensors of a layer of experts: canonical names, shapes, and the way they are cut over ranks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.sharding import ShardRule, TensorSource


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
