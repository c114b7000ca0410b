"""Random packets of every format, from a seed: what a backend of the codec is compared with `reference.py` on.

`Case` draws a layout with everything that its functions need; `check_case` runs them all on a backend.

Shapes: T tokens, H features, R ranks, B bytes of a row.
"""

from __future__ import annotations

import math
import random

import torch

from lowbit_kernels import PacketLayout, codebooks, reference

SPECIAL = [
    *(0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 3e38, -3.4028235e38, 3.3895314e38, 1.7e38),
    *(1e-45, -1e-45, 1e-40, 1.1754944e-38, 7.9e-31, -6.3e-30, 0.5, 1.5, -2.5, 1.00390625, 1.01171875),
    *(448.0, 464.0, -480.0, 0.0009765625, 5.0, -6.0, 2.0**-9, 0.25, -0.75, 3.5),
]
FEATURES = [1, 2, 3, 5, 16, 31, 64, 67, 130, 257, 515]
GROUPS = [1, 3, 5, 8, 9, 16, 20, 32, 36, 40, 64, 100, 128]
WHOLE_ROW = -1  # stands for a group of all body values, which `Case` counts


def _group(rng):
    return {"group_size": rng.choice(GROUPS)}


def _small_scale(rng):
    return {**_group(rng), "scale_format": rng.choice(["e4m3", "e8m0"])}


def _maybe_static(rng):
    return {} if rng.random() < 0.4 else _group(rng)


def _levels(rng):
    values, bits = rng.choice([("lm", 2), ("lm", 3), ("lm", 4), ("nf4", 4), ("tc", rng.choice([2, 3, 4]))])
    return {"bits": bits, "values": values, **_group(rng), "scale_format": rng.choice(["bf16", "e4m3"])}


def _any_scale(rng):
    return {**_group(rng), "scale_format": rng.choice(["bf16", "e4m3", "e8m0"])}


#: Families of formats: the options of a layout but for its features and outliers, drawn by a `random.Random`.
FAMILIES = {
    "int4": lambda rng: {"bits": 4, **_maybe_static(rng)},
    "int8": lambda rng: {"bits": 8, **_maybe_static(rng)},
    "bf16": lambda rng: {"bits": 16},
    "fp32": lambda rng: {"bits": 32},
    "odd bits": lambda rng: {"bits": rng.choice([2, 3, 5, 6, 7]), **_maybe_static(rng)},
    "asymmetric": lambda rng: {"bits": rng.randint(2, 8), "asymmetric": True, **_maybe_static(rng)},
    "small scales": lambda rng: {"bits": rng.randint(2, 8), **_small_scale(rng)},
    "e4m3": lambda rng: {"bits": 8, "values": "e4m3", **({} if rng.random() < 0.3 else _any_scale(rng))},
    "e2m1": lambda rng: {"bits": 4, "values": "e2m1", **({} if rng.random() < 0.3 else _any_scale(rng))},
    "prescaled": lambda rng: {
        **rng.choice([
            {"bits": rng.randint(2, 8), **_any_scale(rng)},
            {"bits": rng.randint(2, 8), "asymmetric": True, **_group(rng)},
            {"bits": 8, "values": "e4m3", **_any_scale(rng)},
            {"bits": 4, "values": "e2m1", **_any_scale(rng)},
        ]),
        "prescaled": True,
    },
    "levels": lambda rng: {**_levels(rng), "prescaled": rng.random() < 0.4},
    "whole rows": lambda rng: {
        **rng.choice([{"bits": rng.randint(2, 8)}, {"bits": 8, "values": "e4m3"}, _levels(rng)]),
        "group_size": WHOLE_ROW,
    },
}  # fmt: skip


class Case:
    """A random layout with everything that its functions need; the same for the same arguments."""

    def __init__(self, seed, family, features=None, tokens=None):
        self.rng = random.Random(f"{seed} {family}")
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(40))
        features = features or self.rng.choice(FEATURES)
        options = FAMILIES[family](self.rng)
        outliers = 0
        if options["bits"] <= 8:
            outliers = self.rng.choice([0, 0, 1, features // 8, features // 64, self.rng.randint(0, features)])
        if options.get("group_size") == WHOLE_ROW:
            options["group_size"] = max(1, features - outliers)
        self.tokens = self.rng.choice([0, 1, 1, 2, 5]) if tokens is None else tokens
        self.ranks = self.rng.choice([1, 2, 3, 8])
        self.dtype = self.rng.choice([torch.float32, torch.bfloat16])
        self.use_layout(PacketLayout(features=features, outliers=min(outliers, features), **options))

    def use_layout(self, layout):
        """Take this layout instead, with new static numbers."""
        self.layout = layout
        order = torch.randperm(layout.features, generator=self.generator)
        self.outlier_index = order[: layout.outliers].sort().values if layout.outliers else None
        self.body_index = order[layout.outliers :].sort().values if layout.outliers else None
        self.scale_RH = self.inverse_RH = self.minimum_RH = None
        shape = (self.ranks, layout.body)
        spread = self.rng.choice([1.0, 3.0, 20.0])
        if layout.needs_static:
            scale_RH = (torch.randn(shape, generator=self.generator) * spread).exp().bfloat16().float()
            self.scale_RH = scale_RH.clamp(2.0**-120, 2.0**120)
            self.inverse_RH = 1 / self.scale_RH
        if layout.needs_minimum:
            steps = torch.randn(shape, generator=self.generator) * 2**layout.bits
            self.minimum_RH = (steps * self.scale_RH).bfloat16().float().clamp(-3e38, 3e38).bfloat16().float()

    def values(self):
        shape = (self.tokens, self.layout.features)
        size = self.rng.choice([1.0, 1.0, 1e-3, 1e4, 1e30, 1e-41])
        x = torch.randn(shape, generator=self.generator) * size
        if self.rng.random() < 0.2:  # far from 0 on one side
            x = x + self.rng.choice([-3.0, 10.0]) * size
        if self.rng.random() < 0.3:  # products that fall on ties
            x = (x * 4).round() / 2
        share = self.rng.choice([0.0, 0.0, 0.002, 0.02, 0.3])
        chosen = torch.rand(shape, generator=self.generator) < share
        special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=self.generator)]
        x = torch.where(chosen, special, x)
        if self.rng.random() < 0.1:  # any bit pattern, NaN payloads included
            x = torch.randint(-(2**31), 2**31, shape, generator=self.generator, dtype=torch.int64).int().view(x.dtype)
        return x.to(self.dtype)

    def random_packet(self):
        shape = (self.tokens, self.layout.row_nbytes)
        return torch.randint(256, shape, generator=self.generator, dtype=torch.uint8)

    def strided(self, shape, dtype, fill, device):
        """Rows that lie apart, as in a view of a wider buffer, at times."""
        apart = self.rng.choice([0, 0, 4, 8])
        return torch.full((shape[0], shape[1] + apart), fill, dtype=dtype, device=device)[:, : shape[1]]

    def apart(self, values_TH, device):
        """A copy of `values_TH` in rows that lie apart at times."""
        copy = self.strided(values_TH.shape, values_TH.dtype, 0, device)
        return copy.copy_(values_TH)

    def minimum(self, rank=0):
        return None if self.minimum_RH is None else self.minimum_RH[rank]

    def encoded(self, module, x_TH, rank, device):
        packet_TB = self.strided((self.tokens, self.layout.row_nbytes), torch.uint8, 0xAA, device)
        inverse = None if self.inverse_RH is None else self.inverse_RH[rank]
        arguments = [x_TH, self.layout, packet_TB, inverse, self.body_index, self.outlier_index]
        module.encode(*on(device, *arguments, *given(self.minimum(rank))))
        return packet_TB

    def decoded(self, module, packet_TB, device):
        out_TH = self.strided((self.tokens, self.layout.features), torch.float32, math.nan, device)
        module.decode(*self._decode_arguments(packet_TB, out_TH, device))
        return out_TH

    def added(self, module, packet_TB, base_TH, device):
        out_TH = self.apart(base_TH, device)
        module.decode(*self._decode_arguments(packet_TB, out_TH, device), add=True)
        return out_TH

    def _decode_arguments(self, packet_TB, out_TH, device):
        scale = None if self.scale_RH is None else self.scale_RH[0]
        arguments = [packet_TB, self.layout, out_TH, scale, self.body_index, self.outlier_index]
        return on(device, *arguments, *given(self.minimum()))

    def summed(self, module, packets, device):
        out_TH = self.strided((self.tokens, self.layout.features), torch.float32, math.nan, device)
        arguments = [self.layout, out_TH, self.scale_RH, self.body_index, self.outlier_index, *given(self.minimum_RH)]
        module.decode_sum(self._sent(packets, device), *on(device, *arguments))
        return out_TH

    def requantized(self, module, packets, gather, device):
        """`gather`: a case of the same features and tokens, for what is sent on."""
        packet_TB = self.strided((self.tokens, gather.layout.row_nbytes), torch.uint8, 0xAA, device)
        reduce_stage = [self.scale_RH, self.body_index, self.outlier_index, self.minimum_RH]
        inverse = None if gather.inverse_RH is None else gather.inverse_RH[0]
        names = ("inverse_scale", "body_index", "outlier_index", "minimum")
        gather_stage = on(device, inverse, gather.body_index, gather.outlier_index, gather.minimum())
        module.requantize(
            self._sent(packets, device), self.layout, packet_TB, gather.layout, *on(device, *reduce_stage),
            **{f"gather_{name}": argument for name, argument in zip(names, gather_stage, strict=True)},
        )  # fmt: skip
        return packet_TB

    def normed(self, module, packet_TB, residual_TH, weight_H, bias_H, dtype, device):
        """The residual stream after the packet joined it, and its norm."""
        residual_TH = self.apart(residual_TH, device)
        normed_TH = self.strided(residual_TH.shape, dtype, math.nan, device)
        scale = None if self.scale_RH is None else self.scale_RH[0]
        static = on(device, scale, self.body_index, self.outlier_index, self.minimum(), bias_H)
        module.decode_add_norm(
            packet_TB.to(device), self.layout, residual_TH, normed_TH, weight_H.to(device), 1e-5, *static
        )
        return residual_TH, normed_TH

    def _sent(self, packets, device):
        packets = [packet_TB.to(device) for packet_TB in packets]
        return torch.stack(packets) if self.rng.random() < 0.5 else packets


def on(device, *arguments):
    return [argument.to(device) if isinstance(argument, torch.Tensor) else argument for argument in arguments]


def given(argument):
    """Nothing where an argument is None: the last ones have a default."""
    return [] if argument is None else [argument]


def same_bits(got, expected):
    got = got.cpu().contiguous()
    expected = expected.contiguous()
    if got.dtype == torch.float32:
        got, expected = got.view(torch.int32), expected.view(torch.int32)
    return torch.equal(got, expected)


def first_difference(got, expected):
    """For the message of a failure: where two results of the same shape differ first, and their values there."""
    got, expected = got.cpu().contiguous(), expected.contiguous()
    bits = torch.int32 if got.dtype == torch.float32 else got.dtype
    at = (got.view(bits) != expected.view(bits)).nonzero()
    if not len(at):
        return "no difference"
    token, column = at[0].tolist()
    one, other = got[token, column].item(), expected[token, column].item()
    return f"{len(at)} of {got.numel()} differ, first [{token}, {column}]: {one!r} instead of {other!r}"


def check_case(case, module, device, gather=None):
    """Encode, decode and sum on `module` as the reference does, for packets of values and of noise.

    gather: a case of the same features and tokens; where given, `requantize` from one to the other too.
    """

    def same(got, expected, what):
        assert same_bits(got, expected), f"{what} {case.layout}, T={case.tokens}: {first_difference(got, expected)}"

    packets = []
    for rank in range(case.ranks):
        x_TH = case.values()
        expected = case.encoded(reference, x_TH, rank, "cpu")
        same(case.encoded(module, x_TH, rank, device), expected, f"encode {case.dtype}")
        packets.append(expected)
    noise = [case.random_packet() for _ in range(case.ranks)]
    for source in (packets, noise):
        expected = case.decoded(reference, source[0], "cpu")
        same(case.decoded(module, source[0], device), expected, "decode")
        base_TH = case.values().float()
        expected = case.added(reference, source[0], base_TH, "cpu")
        same(case.added(module, source[0], base_TH, device), expected, "decode with add")
        expected = case.summed(reference, source, "cpu")
        same(case.summed(module, source, device), expected, f"decode_sum R={case.ranks}")
        if gather is not None:
            expected = case.requantized(reference, source, gather, "cpu")
            what = f"requantize R={case.ranks} to {gather.layout} from"
            same(case.requantized(module, source, gather, device), expected, what)


def check_ties(module, device):
    """Encode what lies half way between two levels, at scales that are exact, as the reference does."""
    for values, bits in (("lm", 2), ("lm", 3), ("lm", 4), ("nf4", 4)):
        middles = torch.tensor(codebooks.thresholds(values, bits))
        for size in (16, 20):  # Triton has a way for powers of two, and one for any
            layout = PacketLayout(4 * size, bits, size, values=values)
            x_TH = middles[torch.arange(8 * size).reshape(2, -1) % len(middles)]
            x_TH[:, ::size] = -1.0  # the largest of each group
            x_TH[1] *= -(2.0**-20) if values == "lm" else 2.0**-20
            got = torch.empty(2, layout.row_nbytes, dtype=torch.uint8, device=device)
            expected = torch.empty(2, layout.row_nbytes, dtype=torch.uint8)
            module.encode(x_TH.to(device), layout, got)
            reference.encode(x_TH, layout, expected)
            assert same_bits(got, expected), f"ties {layout}: {first_difference(got, expected)}"


def check_norm(case, module, device):
    """`decode_add_norm`: the residual stream bit for bit, its norm within 2e-6 before it is rounded to bf16.

    2e-6 is 17 ulps of fp32: the mean of some thousand squares, summed in another order, is off by a few of them, the
    root by half as many, and the products add one each.
    """
    width = case.layout.features
    x_TH = case.values()
    residual_TH = torch.randn(x_TH.shape, generator=case.generator) * case.rng.choice([1.0, 1e-3, 1e4])
    weight_H = torch.randn(width, generator=case.generator)
    bias_H = torch.randn(width, generator=case.generator) if case.rng.random() < 0.5 else None
    for packet_TB in (case.encoded(reference, x_TH, 0, "cpu"), case.random_packet()):
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)):
            arguments = (packet_TB, residual_TH, weight_H, bias_H, dtype)
            residual, normed = case.normed(reference, *arguments, "cpu")
            got_residual, got = case.normed(module, *arguments, device)
            assert same_bits(got_residual, residual), f"residual {case.layout}"
            # where squares overflow or vanish, or something is not finite, orders of summation may differ in kind
            peak_T = residual.abs().amax(dim=1)
            fair_T = (peak_T > 1e-15) & (peak_T < 1e15)
            error = (got.cpu().float() - normed.float()).abs()[fair_T]
            assert (error <= tolerance * normed.float().abs()[fair_T]).all(), f"norm {case.layout} {dtype}"
            assert got.cpu()[torch.isnan(residual)].isnan().all()
