"""Mixture of experts: every token goes through a few of many feed-forward blocks, each cut over the ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.activation import gate_of
from megatron_lowbit.layers.linear import Tensors
from megatron_lowbit.layers.sharded import ShardedModule
from megatron_lowbit.parallel import ParallelContext

# Shapes: T tokens, K experts of a token, P = T * K pairs of both, E experts, H hidden features, F features of an expert
# (F' this process's part), L ranks in this process.


class MoE(ShardedModule):
    """Router and experts; the weighted sum over each token's experts is added to the residual.

    Each rank holds a slice of every expert's features, so ranks have equal work whichever experts are popular, and the
    sum over experts travels instead of their outputs: one all-reduce a layer, as wide as that of a dense block.
    The router is whole on every rank: from bit-identical inputs all choose the same experts with the same weights.
    """

    router: torch.Tensor
    router_bias: torch.Tensor | None
    gate_up_proj: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_proj: torch.Tensor
    down_bias: torch.Tensor | None

    def __init__(
        self, context: ParallelContext, config: ModelConfig, tensors: Tensors, prefix: str, dtype: torch.dtype,
        sync_point: SyncPoint,
    ) -> None:  # fmt: skip
        super().__init__(context)
        assert config.moe is not None
        self.moe = config.moe
        self.hidden = config.hidden_size
        self.sync_point = sync_point
        self.gate = gate_of(config.activation)
        # FP32: logits rounded to bf16 tie, and a tie leaves the choice between two experts to torch.topk
        self.add_parameter("router", torch.float32, tensors[f"{prefix}.gate.weight"])
        if self.moe.router_bias:
            self.add_parameter("router_bias", torch.float32, tensors[f"{prefix}.gate.bias"])
        else:
            self.router_bias = None
        experts = [f"{prefix}.experts.{expert}" for expert in range(self.moe.num_experts)]
        columns = [f"{expert}.{kind}_proj" for expert in experts for kind in ("gate", "up")]
        # experts one below the other in one parameter each: an expert's rows are contiguous
        self.add_parameter("gate_up_proj", dtype, *(tensors[name + ".weight"] for name in columns))
        self.add_parameter("down_proj", dtype, *(tensors[f"{expert}.down_proj.weight"] for expert in experts))
        if self.moe.expert_bias:
            self.add_parameter("gate_up_bias", dtype, *(tensors[name + ".bias"] for name in columns))
            self.add_parameter("down_bias", torch.float32, *(tensors[f"{expert}.down_proj.bias"] for expert in experts))
        else:
            self.gate_up_bias = self.down_bias = None
        self._width = self.down_proj.shape[1]
        rule = tensors[f"{experts[0]}.down_proj.weight"].rule
        self._spans = [(0, self._width)]
        if context.virtual:
            self._spans = [rule.span(rank, context.size) for rank in context.local_ranks]

    def forward(self, x_TH: torch.Tensor, residual_TH: torch.Tensor, state: object) -> torch.Tensor:
        """FP32 residual `[T, H]` with the block's output added."""
        experts_TK, weights_TK = self.route(x_TH)
        partial_LTH = self.partial(x_TH, experts_TK, weights_TK)
        return self.sync_point.add(partial_LTH, residual_TH, self._bias(experts_TK, weights_TK), x_TH, state)

    def route(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts `[T, K]`, their weights `[T, K]` in FP32), by falling weight."""
        logits_TE = F.linear(x_TH.float(), self.router, self.router_bias)
        # the softmax keeps the order, and over the chosen logits alone it is the renormalised one over all
        chosen_TK, experts_TK = logits_TE.topk(self.moe.experts_per_token, dim=-1)
        if self.moe.renormalize:
            return experts_TK, chosen_TK.softmax(dim=-1)
        return experts_TK, (chosen_TK - logits_TE.logsumexp(dim=-1, keepdim=True)).exp()

    def partial(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """`partial_LTH {U_tp}` in the model's dtype: each local rank's part of the weighted sum over experts.

        Only experts that some token chose are touched. Products are rounded to the model's dtype, summed in FP32 in
        the order of the token's weights, whatever its batch-mates chose, and rounded once.
        """
        tokens, per_token = experts_TK.shape
        expert_P = experts_TK.flatten()
        order_P = expert_P.argsort(stable=True)  # pairs by expert
        slot_TK = torch.empty_like(order_P)
        slot_TK[order_P] = torch.arange(tokens * per_token, device=order_P.device)
        slot_TK = slot_TK.view(tokens, per_token)
        hit = self._spans_of_experts(expert_P)
        active_PF = self._activations(x_TH.index_select(0, order_P // per_token), hit)
        partial_LTH = x_TH.new_empty(len(self._spans), tokens, self.hidden)
        down_EHF = self.down_proj.view(self.moe.num_experts, self.hidden, self._width)
        out_PH = x_TH.new_empty(tokens * per_token, self.hidden)
        for row, (left, right) in enumerate(self._spans):
            for expert, start, stop in hit:
                torch.mm(active_PF[start:stop, left:right], down_EHF[expert, :, left:right].t(), out=out_PH[start:stop])
            sum_TH = torch.zeros(tokens, self.hidden, dtype=torch.float32, device=x_TH.device)
            for choice in range(per_token):
                chosen_TH = out_PH.index_select(0, slot_TK[:, choice])
                sum_TH.addcmul_(chosen_TH.float(), weights_TK[:, choice : choice + 1])
            partial_LTH[row] = sum_TH
        return partial_LTH

    def _spans_of_experts(self, expert_P: torch.Tensor) -> list[tuple[int, int, int]]:
        """(expert, first, end) of the sorted pairs of each expert that is hit."""
        spans, start = [], 0
        for expert, count in enumerate(expert_P.bincount(minlength=self.moe.num_experts).tolist()):
            if count:
                spans.append((expert, start, start + count))
                start += count
        return spans

    def _activations(self, x_PH: torch.Tensor, hit: list[tuple[int, int, int]]) -> torch.Tensor:
        """`[P, F']`, pairs sorted by expert."""
        experts, width = self.moe.num_experts, self._width
        weight_EFH = self.gate_up_proj.view(experts, 2 * width, self.hidden)
        bias_EF = None if self.gate_up_bias is None else self.gate_up_bias.view(experts, 2 * width)
        both_PF = x_PH.new_empty(x_PH.shape[0], 2 * width)
        for expert, start, stop in hit:
            rows_PF = both_PF[start:stop]
            if bias_EF is None:
                torch.mm(x_PH[start:stop], weight_EFH[expert].t(), out=rows_PF)
            else:
                torch.addmm(bias_EF[expert], x_PH[start:stop], weight_EFH[expert].t(), out=rows_PF)
        return self.gate(both_PF[:, :width], both_PF[:, width:])

    def _bias(self, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor | None:
        """FP32 `[T, H]`: the weighted sum of the experts' output biases, the same on every rank."""
        if self.down_bias is None:
            return None
        experts = self.moe.num_experts
        weight_TE = weights_TK.new_zeros(weights_TK.shape[0], experts).scatter_(1, experts_TK, weights_TK)
        return weight_TE @ self.down_bias.view(experts, self.hidden)
