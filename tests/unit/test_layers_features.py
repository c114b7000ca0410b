"""What single families add to the plain decoder, piece by piece: soft caps, sinks, offsets, scales, norms of sums."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.layers.activation import gate_of
from megatron_lowbit.layers.attend import attend
from megatron_lowbit.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.layers.norm import RMSNorm
from megatron_lowbit.layers.sharded import assign_parameters
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import ShardRule, TensorSource
from megatron_lowbit.weights import load_weights

F32, CPU = torch.float32, torch.device("cpu")
SINGLE = ParallelContext.single()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---- attention, written out -----------------------------------------------------------------------------------------


def attend_by_hand(query, key, value, mask, scale, softcap, sink):
    """Query by query, key by key, in Python's double precision."""
    rows = []
    for at, (one, seen) in enumerate(zip(query.tolist(), mask.tolist(), strict=True)):
        scores = [scale * sum(a * b for a, b in zip(one, other, strict=True)) for other in key.tolist()]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        weights = [math.exp(score) if visible else 0.0 for score, visible in zip(scores, seen, strict=True)]
        total = sum(weights) + (0.0 if sink is None else math.exp(sink[at].item()))
        columns = zip(*value.tolist(), strict=True)
        rows.append([sum(w * v for w, v in zip(weights, column, strict=True)) / total for column in columns])
    return torch.tensor(rows)


@pytest.mark.parametrize("sink", [None, [[0.5], [-1.0], [3.0]]])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_written_out_equals_the_formula(softcap, sink):
    query, key, value = randn(3, 4) * 2, randn(5, 4), randn(5, 6)
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()
    sink = None if sink is None else torch.tensor(sink)
    got = attend(query, key, value, mask, 0.7, softcap, sink)
    torch.testing.assert_close(got, attend_by_hand(query, key, value, mask, 0.7, softcap, sink), rtol=0, atol=1e-6)
    if softcap is None and sink is None:
        torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7))
    # what is hidden does not matter, however large
    key[3:], value[3:] = 1e4, -1e4
    torch.testing.assert_close(attend(query, key, value, mask, 0.7, softcap, sink)[:2], got[:2])


def test_attention_written_out_rounds_once():
    """In bf16 only the result is rounded: scores near a cap of 50 would otherwise stand on steps of 0.25."""
    query, key, value = (randn(*shape).bfloat16() for shape in ((3, 64), (50, 64), (50, 8)))
    query *= 4
    mask = torch.ones((), dtype=torch.bool)
    got = attend(query, key, value, mask, 1.0, 50.0, None)
    expected = attend(query.double(), key.double(), value.double(), mask, 1.0, 50.0, None)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() <= 2**-8 * expected.abs().max()


# ---- norms, embedding, head, activations ----------------------------------------------------------------------------


def test_offset_is_added_to_stored_weights_in_fp32():
    """Weights of Gemma lie near 0; with 1 added in bf16 they would lose the bits that distinguish them."""
    norm = RMSNorm(SINGLE, TensorSource("norm.weight", (33,)), 1e-5, F32, offset=1.0)
    weight, x = (randn(33) / 100).bfloat16().float(), randn(5, 33)
    assign_parameters(norm, {"weight": weight})
    exact = x.double() / (x.double().pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * (1 + weight.double())
    assert (norm(x) - exact).abs().max() < 1e-6
    assert torch.equal(norm.scale(), weight + 1.0) and torch.equal(norm.weight, weight)


def test_norm_of_bf16_heads_is_computed_in_fp32():
    norm = RMSNorm(SINGLE, TensorSource("q_norm.weight", (8,)), 1e-6, torch.bfloat16)
    weight, x_TND = randn(8), randn(3, 2, 8).bfloat16()
    assign_parameters(norm, {"weight": weight})
    exact = x_TND.double() / (x_TND.double().pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
    assert torch.equal(norm(x_TND), exact.bfloat16())
    assert norm(x_TND[:, :0]).shape == (3, 0, 8), "a rank may have no heads"


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 55.5), (F32, 3072**0.5)])
def test_embedding_scale_is_rounded_like_the_model(dtype, factor):
    source = TensorSource("table", (10, 4), ShardRule(dim=0, units=10))
    layer = VocabParallelEmbedding(SINGLE, source, dtype, 3072**0.5)
    weight = randn(10, 4).to(dtype)
    assign_parameters(layer, {"weight": weight})
    tokens = torch.tensor([9, 0, 3])
    got = layer(tokens)
    assert got.dtype == dtype and torch.equal(got, weight[tokens] * torch.tensor(factor, dtype=dtype))


def test_logits_are_capped_by_both_heads():
    weight, hidden = randn(10, 4) * 5, randn(3, 4)
    source = TensorSource("table", (10, 4), ShardRule(dim=0, units=10))
    head = VocabParallelHead(SINGLE, weight, source, softcap=2.0)
    expected = 2.0 * torch.tanh(hidden @ weight.T / 2.0)
    torch.testing.assert_close(head.logits(hidden), expected)
    torch.testing.assert_close(head.precise_logits(hidden), expected)
    assert expected.abs().max() > 1.9


def test_gates_by_hand():
    gate, up = torch.tensor([[-9.0, 0.5, 8.0]]), torch.tensor([[2.0, 2.0, -9.0]])
    phi = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
    tanh = 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (0.5 + 0.044715 * 0.125)))
    assert gate_of("silu")(gate, up)[0, 1].item() == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert gate_of("gelu")(gate, up)[0, 1].item() == pytest.approx(phi)
    assert gate_of("gelu_tanh")(gate, up)[0, 1].item() == pytest.approx(tanh)
    assert abs(phi - tanh) > 1e-6
    # gpt-oss: gate at most 7, up within 7 of 0 and one more
    seven = 7 / (1 + math.exp(-1.702 * 7))
    assert gate_of("swiglu_clamped")(gate, up)[0, 2].item() == pytest.approx((-7 + 1) * seven)


# ---- sync points ----------------------------------------------------------------------------------------------------


def test_a_norm_behind_the_sum_sees_sum_and_bias():
    """Not the residual, and not the partial sums one by one; the residual itself is updated in place."""
    norm = RMSNorm(SINGLE, TensorSource("norm.weight", (6,)), 1e-5, F32, offset=1.0)
    weight = randn(6)
    assign_parameters(norm, {"weight": weight})

    def all_reduce(partial_LTH, add_to_TH=None):
        full_TH = partial_LTH.sum(dim=0)
        return full_TH if add_to_TH is None else add_to_TH.add_(full_TH)

    point = SyncPoint("layers.0.mlp.down_proj", all_reduce, norm)
    partials, residual, bias = randn(3, 2, 6), randn(2, 6), randn(6)
    for added in (None, bias, randn(2, 6)):
        total = partials.sum(dim=0) if added is None else partials.sum(dim=0) + added
        expected = residual + F.rms_norm(total, (6,), weight + 1, 1e-5)
        given = residual.clone()
        got = point.add(partials, given, added, residual, None)
        torch.testing.assert_close(got, expected)
        assert got.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("variant", ["odd", "gemma2"])
def test_sync_points_are_given_the_blocks_input_and_the_state_of_the_pass(tiny_models, variant):
    weights = load_weights(tiny_models(variant), ParallelContext.virtual_ranks(2), F32)
    states: list[object] = []
    seen: list[tuple[str, torch.Tensor, object]] = []

    def new_state(batch: TokenBatch) -> object:
        states.append(batch.lengths)
        return states[-1]

    def all_reduce(name):
        return lambda partial_LTH, add_to_TH=None: (
            partial_LTH.sum(dim=0) if add_to_TH is None else add_to_TH.add_(partial_LTH.sum(dim=0))
        )

    model = Decoder(weights.context, weights.config, F32, all_reduce, new_state)
    assign_parameters(model, weights.tensors)
    inputs = []
    for layer in model.layers:
        for projection in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
            projection.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            real = module.sync_point

            class Recording:
                def __init__(self, real):
                    self.real = real

                def add(self, partial_LTH, residual_TH, bias, block_input_TH, state):
                    seen.append((self.real.name, block_input_TH, state))
                    return self.real.add(partial_LTH, residual_TH, bias, block_input_TH, state)

            module.sync_point = Recording(real)
    model(TokenBatch.prompts([[1, 2, 3], [2]], CPU))
    assert states == [(3, 1)]
    assert len(seen) == 2 * weights.config.num_layers == len(inputs)
    for (_, block_input, state), given in zip(seen, inputs, strict=True):
        assert block_input is given and state is states[0]
