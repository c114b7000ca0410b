"""What comes back from a packet is near what went in: within the steps of its format, worked out in FP64.

A third view of the formats, which knows neither bytes nor codes: a mistake that the reference and its second
implementation shared would show as a wrong size of error.
"""

import pytest
import torch

from lowbit_kernels import PacketLayout, reference
from lowbit_kernels.codebooks import levels

TOKENS, HIDDEN = 40, 500
BF16 = 2.0**-8  # half an ulp of a bf16 number, relative
E4M3 = 2.0**-4  # of an e4m3 number
FP32 = 2.0**-20  # reciprocals and products, generously


def float_error(values, scale, kind):
    """Nearest e4m3 or e2m1 value: relative while normal, else half the smallest step."""
    relative, smallest = {"e4m3": (2.0**-4, 2.0**-10), "e2m1": (0.2, 0.25)}[kind]
    return torch.maximum(relative * values.abs(), smallest * scale)


def level_bound(group, layout, scale_error):
    """Half the gap between levels where a value lies, or how far it is beyond the last; and what a scale moves it."""
    table = torch.tensor(levels(layout.values, layout.bits), dtype=torch.float64)
    amax = group.abs().amax(dim=1, keepdim=True)
    is_positive = group.amax(dim=1, keepdim=True) == amax
    step = torch.where(is_positive, -amax, amax) if layout.values == "lm" else amax
    y = group / step
    above = torch.searchsorted(table, y.contiguous()).clamp(1, len(table) - 1)
    half = (table[above] - table[above - 1]) / 2
    return amax * (torch.maximum(half, y - table[-1]) * (1 + scale_error) + scale_error * y.abs())


def group_bound(group, layout):
    """FP64 bound of the error of each value of a group `[T, N]`."""
    amax = group.abs().amax(dim=1, keepdim=True)
    scale_error = {"bf16": BF16, "e4m3": E4M3, "e8m0": 0.0}[layout.scale_format]
    if layout.has_levels:
        return level_bound(group, layout, scale_error)
    if layout.values != "int":
        largest = {"e4m3": 448, "e2m1": 6}[layout.values]
        if layout.scale_format == "e8m0":  # below 2 times the power of two of the largest value: that much is cut off
            cut = {"e4m3": 1 - 448 / 512, "e2m1": 1 - 6 / 8}[layout.values] * group.abs()
            return torch.maximum(float_error(group, 2 * amax / largest, layout.values), cut)
        step = amax / largest * (1 + scale_error)
        return float_error(group, step, layout.values) + scale_error * group.abs()
    if layout.asymmetric:
        width = group.amax(dim=1, keepdim=True) - group.amin(dim=1, keepdim=True)
        # the minimum is off by its rounding, and so may be the largest value, beyond what the rounded scale covers
        return (width / (2**layout.bits - 1) / 2 + width * BF16 + amax * BF16).expand_as(group)
    limit = 2 ** (layout.bits - 1) - 1
    if layout.scale_format == "e8m0":  # the next power of two: below twice the step
        return (amax / limit).expand_as(group)
    # The largest value has the lowest code (the highest of 8 bits): one of the other sign may lack a step at the top.
    # And a scale that was rounded down does not reach as far as the values do
    step = amax / (127 if layout.bits == 8 else limit + 1)
    beyond = group.abs() > limit * step * (1 - scale_error)
    cut = amax * scale_error + (step if layout.bits < 8 else 0.0)
    return torch.where(beyond, cut, 0.0) + step * (1 + scale_error) / 2


def bound(x, layout, scale, minimum):
    if layout.group_size:
        y = x / scale if layout.prescaled else x
        parts = torch.cat([group_bound(group, layout) for group in y.split(layout.group_size, dim=1)], dim=1)
        return parts * scale if layout.prescaled else parts
    if layout.values != "int":
        return float_error(x, scale, layout.values)
    return (scale / 2).expand_as(x)


FORMATS = [
    *({"bits": bits} for bits in range(2, 9)),
    *({"bits": bits, "asymmetric": True} for bits in range(2, 9)),
    {"bits": 8, "values": "e4m3"},
    {"bits": 4, "values": "e2m1"},
    *({"bits": bits, "group_size": 32} for bits in range(2, 9)),
    *({"bits": bits, "group_size": 32, "scale_format": form} for bits in range(2, 9) for form in ("e4m3", "e8m0")),
    *({"bits": bits, "group_size": 100, "asymmetric": True} for bits in range(2, 9)),
    *({"bits": 8, "values": "e4m3", "group_size": 32, "scale_format": form} for form in ("bf16", "e4m3", "e8m0")),
    *({"bits": 4, "values": "e2m1", "group_size": 16, "scale_format": form} for form in ("bf16", "e4m3", "e8m0")),
    *({"bits": bits, "values": "lm", "group_size": 40} for bits in (2, 3, 4)),
    *({"bits": bits, "values": "lm", "group_size": 40, "scale_format": "e4m3"} for bits in (2, 3, 4)),
    *({"bits": 4, "values": "nf4", "group_size": size, "scale_format": "bf16"} for size in (16, 64, HIDDEN)),
    {"bits": 3, "values": "lm", "group_size": 64, "prescaled": True},
    {"bits": 4, "group_size": 64, "prescaled": True},
    {"bits": 5, "group_size": 64, "prescaled": True, "asymmetric": True},
    {"bits": 4, "values": "e2m1", "group_size": 32, "scale_format": "e8m0", "prescaled": True},
]  # fmt: skip


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_errors_stay_within_the_steps(options, offset):
    layout = PacketLayout(HIDDEN, **options)
    generator = torch.Generator().manual_seed(layout.bits)
    width = torch.randn(HIDDEN, generator=generator).exp()
    x = (torch.randn(TOKENS, HIDDEN, generator=generator) + offset) * width
    scale = minimum = None
    if layout.prescaled:
        scale = width.bfloat16().float()
    elif layout.needs_minimum:
        minimum = (x.amin(dim=0) - 2.0**-7 * x.abs().amax()).bfloat16().float()
        scale = ((x.amax(dim=0) - minimum) / (2**layout.bits - 2) * 1.01).bfloat16().float()
    elif layout.needs_static:
        largest = 2 ** (layout.bits - 1) - 1 if layout.values == "int" else {8: 448, 4: 6}[layout.bits]
        scale = (x.abs().amax(dim=0) / largest * 1.01).bfloat16().float()
    packet_TB, out_TH = torch.empty(TOKENS, layout.row_nbytes, dtype=torch.uint8), torch.empty(TOKENS, HIDDEN)
    inverse = None if scale is None else 1 / scale
    reference.encode(x, layout, packet_TB, inverse, minimum=minimum)
    reference.decode(packet_TB, layout, out_TH, scale, minimum=minimum)
    error = (out_TH.double() - x.double()).abs()
    allowed = bound(x.double(), layout, None if scale is None else scale.double(), minimum) + FP32 * x.double().abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.3f} times the bound"
    # a scale that is doubled, or a code of one bit less, would leave the bound; far smaller errors are another format
    assert error.mean() > 0.1 * allowed.mean()
