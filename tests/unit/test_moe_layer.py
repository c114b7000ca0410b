"""MoE: the layer against its formula, token by token, at any rank count, batch and choice of experts."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lowbit.config import ModelConfig, MoEConfig
from megatron_lowbit.layers.moe import MoE
from megatron_lowbit.layers.sharded import assign_parameters, sharded_parameters
from megatron_lowbit.models.experts import expert_sources
from megatron_lowbit.parallel import ParallelContext

HIDDEN, WIDTH, EXPERTS, CHOSEN = 18, 7, 5, 2
PREFIX = "model.layers.0.mlp"
# FP32: products of 18 and 7 terms summed in another order give outputs of up to 100: 2^-24 * sqrt(25) * 100 = 3e-5
TOLERANCE = dict(rtol=1e-5, atol=1e-4)


class SummingSyncPoint:
    """Adds everything at once, and keeps what it was given."""

    def add(self, partial_LTH, residual_TH, bias, block_input_TH, state):
        self.partial_LTH, self.bias, self.block_input_TH, self.state = partial_LTH, bias, block_input_TH, state
        residual_TH = residual_TH + partial_LTH.float().sum(0)
        return residual_TH if bias is None else residual_TH + bias


def config_of(**moe) -> ModelConfig:
    activation = "swiglu_clamped" if moe.get("expert_bias") else "silu"
    return ModelConfig(
        family="qwen3_moe", hidden_size=HIDDEN, intermediate_size=9, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=4, vocab_size=11, max_position=16, rms_norm_eps=1e-6, rope_theta=1e4, tie_embeddings=False,
        activation=activation, moe=MoEConfig(EXPERTS, CHOSEN, WIDTH, **moe),
    )  # fmt: skip


CONFIGS = {
    "plain": config_of(),
    "as they are": config_of(renormalize=False),
    "biased": config_of(router_bias=True, expert_bias=True),
}


def tensors_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        source.name: torch.randn(source.shape, generator=generator) * (3 if "bias" in source.name else 1)
        for source in expert_sources(config, PREFIX + ".")
    }


def layer_of(config: ModelConfig, tensors: dict[str, torch.Tensor], context: ParallelContext) -> MoE:
    sources = {source.name: source for source in expert_sources(config, PREFIX + ".")}
    layer = MoE(context, config, sources, PREFIX, torch.float32, SummingSyncPoint())

    def shard(source):
        if source.rule.dim is None:
            return tensors[source.name]
        start, stop = source.rule.span(*context.shard)
        return tensors[source.name].narrow(source.rule.dim, start, stop - start)

    assign_parameters(
        layer, {name: torch.cat([shard(part) for part in parts]) for name, _, parts in sharded_parameters(layer)}
    )
    return layer


def expected_of(config: ModelConfig, tensors: dict[str, torch.Tensor], x_TH: torch.Tensor) -> torch.Tensor:
    """The formula in float64, one token and one expert after the other."""
    assert config.moe is not None
    whole = {name.removeprefix(PREFIX + "."): tensor.double() for name, tensor in tensors.items()}
    out = []
    for x_H in x_TH.double():
        logits = whole["gate.weight"] @ x_H + whole.get("gate.bias", torch.zeros(EXPERTS))
        probabilities = [math.exp(logit) for logit in logits.tolist()]
        best = sorted(range(EXPERTS), key=lambda expert: -probabilities[expert])[:CHOSEN]
        total = sum(probabilities[expert] for expert in (best if config.moe.renormalize else range(EXPERTS)))
        sum_H = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert in best:
            start = f"experts.{expert}."
            gate, up = (whole[f"{start}{kind}_proj.weight"] @ x_H for kind in ("gate", "up"))
            if config.moe.expert_bias:
                gate = (gate + whole[start + "gate_proj.bias"]).clamp(max=7)
                up = (up + whole[start + "up_proj.bias"]).clamp(-7, 7)
                down_H = whole[start + "down_proj.weight"] @ ((up + 1) * gate * torch.sigmoid(1.702 * gate))
                down_H += whole[start + "down_proj.bias"]
            else:
                down_H = whole[start + "down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
            sum_H += probabilities[expert] / total * down_H
        out.append(sum_H)
    return torch.stack(out).float() if out else torch.zeros(0, HIDDEN)


def inputs(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("tp", [1, 2, 3, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_formula(name, tp):
    """At 8 ranks one has no feature of any expert."""
    config = CONFIGS[name]
    tensors = tensors_of(config)
    layer = layer_of(config, tensors, ParallelContext.virtual_ranks(tp))
    for tokens in (0, 1, 2, 37):
        x_TH, residual_TH, state = inputs(tokens), torch.ones(tokens, HIDDEN), object()
        got = layer(x_TH, residual_TH, state)
        torch.testing.assert_close(got, 1 + expected_of(config, tensors, x_TH), **TOLERANCE)
        sync = layer.sync_point
        assert sync.partial_LTH.shape == (tp, tokens, HIDDEN)
        assert sync.block_input_TH is x_TH and sync.state is state


@pytest.mark.parametrize("name", CONFIGS)
def test_virtual_partials_are_those_of_real_ranks(name):
    config, x_TH = CONFIGS[name], inputs(9)
    tensors = tensors_of(config)
    virtual = layer_of(config, tensors, ParallelContext.virtual_ranks(3))
    route = virtual.route(x_TH)
    partial_LTH = virtual.partial(x_TH, *route)
    for rank in range(3):
        context = ParallelContext(rank=rank, size=3, group=object(), transport=object())
        real = layer_of(config, tensors, context)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(real.route(x_TH), route, strict=True))
        torch.testing.assert_close(real.partial(x_TH, *route)[0], partial_LTH[rank], **TOLERANCE)
        real(x_TH, torch.zeros(9, HIDDEN), None)
        virtual(x_TH, torch.zeros(9, HIDDEN), None)
        if config.moe.expert_bias:
            assert torch.equal(real.sync_point.bias, virtual.sync_point.bias), "replicas would drift apart"
        else:
            assert real.sync_point.bias is None


def test_only_chosen_experts_are_touched():
    """One token of a decode step must not read the others' weights: here they would poison it."""
    config = CONFIGS["biased"]
    tensors = tensors_of(config)
    x_TH = inputs(1)
    context = ParallelContext.virtual_ranks(2)
    experts_TK, _ = layer_of(config, tensors, context).route(x_TH)
    expected = expected_of(config, tensors, x_TH)
    for name, tensor in tensors.items():
        if ".experts." in name and int(name.split(".")[5]) not in experts_TK.flatten().tolist():
            # the output bias is one small product over all experts, with weight 0 for these
            tensor.fill_(1e6 if name.endswith("down_proj.bias") else torch.nan)
    got = layer_of(config, tensors, context)(x_TH, torch.zeros(1, HIDDEN), None)
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_all_tokens_to_the_same_experts():
    """Everything on two experts, and an input that makes all weights but one vanish."""
    config = CONFIGS["plain"]
    tensors = tensors_of(config)
    x_TH = inputs(1).expand(23, HIDDEN) * 50
    layer = layer_of(config, tensors, ParallelContext.virtual_ranks(3))
    got = layer(x_TH, torch.zeros(23, HIDDEN), None)
    expected = expected_of(config, tensors, x_TH[:1]).expand(23, HIDDEN)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_bf16_routes_in_fp32():
    """Inputs whose logits differ by less than bf16 shows: the larger one is chosen first, not the first of a tie."""
    config = CONFIGS["plain"]
    tensors = tensors_of(config)
    x_TH = torch.ones(1, HIDDEN)
    router = tensors[PREFIX + ".gate.weight"]
    router.copy_(torch.full_like(router, -1.0))
    router[1], router[3] = 1.0, 1.0
    router[3, 0] = 1.0 + 2**-10  # logits 18 and 18.001: both 18 in bf16
    experts_TK, weights_TK = layer_of(config, tensors, ParallelContext.single()).route(x_TH.bfloat16())
    assert experts_TK.tolist() == [[3, 1]] and weights_TK.dtype == torch.float32
    assert weights_TK[0, 0] > weights_TK[0, 1]
