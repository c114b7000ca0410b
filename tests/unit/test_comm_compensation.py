"""Predictors in whole numbers, and the loop over depth: against the arithmetic written out, and what they are for."""

import math

import pytest
import torch
from helpers.compensation_cases import SCHEMES, draw_chain
from helpers.messages import same_bits

from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.calibration.predictor_fit import MOST_ADDED, ranks_coefficients
from megatron_lowbit.comm.predictor import LARGEST_CODE, Predictor
from megatron_lowbit.comm.reference import decode_sum, encode, quantise
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.parallel import ParallelContext

RANKS = 3


def run(chain, rows=slice(None)):
    return chain.run(ParallelContext.virtual_ranks(chain.ranks), rows)


def foretold(predictor, h):
    """Of each rank and of the sum, in Python's whole numbers and FP32 scales."""
    codes = (h.float() * predictor.input_scale_H).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int64)
    sums = codes @ predictor.first_HK.to(torch.int64) + predictor.offset_K.to(torch.int64)
    middle = (sums.float() * predictor.factor_K).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int64)
    of_ranks = [middle @ second.to(torch.int64) for second in predictor.second_RKH]
    return [part.float() * predictor.scale_H for part in of_ranks], sum(of_ranks).float() * predictor.scale_H


@pytest.mark.parametrize("seed", range(len(SCHEMES)))
def test_a_chain_of_sums_written_out(seed):
    """Pre-norm: what is missed by each sender and by the owner goes into the next message."""
    chain = draw_chain(seed, RANKS, tokens=9, hidden=96, normed=False)
    residual = chain.residual_TH.clone()
    missed = [torch.zeros_like(residual) for _ in range(RANKS)]
    owed = torch.zeros_like(residual)
    for number, found in enumerate(run(chain)):
        scheme = chain.scheme_at(number)
        constants = constants_from_statistics(scheme, f"p{number}", chain.statistics[number])
        shares, share = [0.0] * RANKS, 0.0
        if scheme.predictor_rank or scheme.centred:
            shares, share = foretold(constants.predictor, chain.inputs[number])
        wire, factors, packets = scheme.reduce_stage, constants.reduce_scale_RD, []
        arrived = torch.zeros_like(residual)
        for rank in range(RANKS):
            x = chain.partials[number][rank].float() - shares[rank]
            x = x + missed[rank] if scheme.loop else x
            scale = None if factors is None else factors[0 if wire.rotation else rank]
            packets.append(encode(x, wire, constants, scale))
            got = quantise(x, wire, constants, scale)
            missed[rank] = x - got
            arrived = got if rank == 0 else arrived + got
        if wire.rotation:  # rotated back once, behind the sum
            arrived = decode_sum(packets, 96, wire, constants, factors)
        total = arrived + owed if scheme.loop else arrived
        scale = None if constants.gather_scale_1D is None else constants.gather_scale_1D[0]
        got = quantise(total, scheme.gather_stage, constants, scale)
        owed = total - got
        residual = residual + got
        residual = residual + share
        residual = residual if chain.biases[number] is None else residual + chain.biases[number]
        assert same_bits(found, residual), f"{chain.scheme}, point {number}"


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("seed", range(len(SCHEMES)))
def test_a_token_does_not_depend_on_its_batch_mates(seed, normed):
    chain = draw_chain(seed, RANKS, tokens=11, hidden=130, normed=normed)
    whole = run(chain)
    for rows in (slice(0, 4), slice(4, 11), slice(7, 8), slice(3, 3)):
        for found, expected in zip(run(chain, rows), whole, strict=True):
            assert same_bits(found, expected[rows]), rows


def relative_error(chain, scheme):
    chain.scheme = scheme
    exact = chain.exact()
    return float((run(chain)[-1] - exact).square().mean() / (exact - chain.residual_TH).square().mean())


@pytest.mark.parametrize("normed", [False, True])
def test_the_loop_keeps_errors_from_piling_up(normed):
    """Over 12 points: the open loop's squared errors add up, the closed loop keeps those of about one point."""
    chain = draw_chain(1, RANKS, tokens=40, hidden=192, normed=normed, points=12)
    opened = relative_error(chain, "int4-g32-prescaled")
    closed = relative_error(chain, "int4-g32-prescaled:loop")
    # 12 points' errors against one's would be a factor of 12 without a norm; carrying back through one is an estimate
    assert closed < opened / (6 if not normed else 2), (opened, closed)


def test_foretelling_leaves_less_to_send():
    """Most of these partials is a map of rank 4 of the input; half a unit of noise is what is left of about 4."""
    chain = draw_chain(2, RANKS, tokens=40, hidden=192, normed=False)
    plain = relative_error(chain, "int4-g32-prescaled")
    assert relative_error(chain, "int4-g32-prescaled:predict=4") < plain / 3
    # of other inputs than the block's it foretells nonsense
    chain.inputs = [h.flip(0) for h in chain.inputs]
    assert relative_error(chain, "int4-g32-prescaled:predict=4") > plain


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_surfaces_in_its_own_token_only(normed, value):
    chain = draw_chain(2, RANKS, tokens=6, hidden=64, normed=normed)
    clean = run(chain)[-1]
    chain.partials[1][2, 3, 10] = value
    dirty = run(chain)[-1]
    assert dirty[3].isnan().any()
    keep = [0, 1, 2, 4, 5]
    assert same_bits(dirty[keep], clean[keep])


def predictor_of(hidden=64, ranks=2, width=3, code=100):
    return Predictor(
        torch.ones(hidden), torch.full((hidden, width), code, dtype=torch.int8), torch.zeros(width), torch.ones(width),
        torch.full((ranks, width, hidden), code, dtype=torch.int8), torch.ones(hidden),
    )  # fmt: skip


def test_sums_that_fp32_would_round_are_refused():
    predictor_of(hidden=1300)
    with pytest.raises(ValueError, match=r"rank 3 for 2 ranks and 1400 features has sums beyond 2\^24"):
        predictor_of(hidden=1400)
    predictor_of(ranks=34, width=30)
    with pytest.raises(ValueError, match="use a lower rank"):
        predictor_of(ranks=35, width=30)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, MOST_ADDED, MOST_ADDED + 1])
@pytest.mark.parametrize("alike", [False, True])
def test_fitted_coefficients_of_ranks_add_up_to_one_byte(ranks, alike):
    worth_RKH = torch.randn(ranks, 16, 200, generator=torch.Generator().manual_seed(ranks)).double()
    worth_RKH[:, :, 0] = 0.0
    if alike:
        worth_RKH = worth_RKH[:1].expand_as(worth_RKH)
    second_RKH, scale_H = ranks_coefficients(worth_RKH)
    error = (second_RKH.double() * scale_H.double() - worth_RKH).abs()
    total_KH = second_RKH.sum(dim=0, dtype=torch.int32)
    assert (error <= scale_H.double() / 2 * 1.01).all() and torch.equal(scale_H.bfloat16().float(), scale_H)
    # of so many ranks that bytes would say little, each keeps its precision
    assert bool((total_KH.abs() <= LARGEST_CODE).all()) == (ranks <= MOST_ADDED)
    small = Predictor(
        torch.ones(4), torch.ones(4, 16, dtype=torch.int8), torch.zeros(16), torch.ones(16), second_RKH, scale_H
    )
    total = small.to(torch.device("cpu")).total.values_IO
    assert total.dtype == (torch.int8 if ranks <= MOST_ADDED else torch.int16) and torch.equal(total.int(), total_KH)


def test_inputs_that_are_not_finite_foretell_nothing_wild():
    ready = predictor_of().to(torch.device("cpu"))
    h = torch.ones(2, 64)
    h[0, 0], h[1, 1] = math.nan, math.inf
    assert ready.codes(h).isfinite().all() and ready.of_sum(ready.codes(h)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4-g64:one-stage:loop", "go with two stages"),
        ("int4-g64:predict=0", "unknown option 'predict=0'"),
        ("int4-g64:loop:loop", "unknown option 'loop'"),
        ("int4-g64:predict=4:predict", "unknown option 'predict'"),
        ("int4-g64:predictor", "unknown option 'predictor'"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        parse_scheme(name)


def test_what_needs_more_than_partials_says_so():
    assert parse_scheme("int4-g64-prescaled").portable
    for name in ("int4-g64:loop", "int4-g64:predict", "int4-g64:predict=8:loop"):
        scheme = parse_scheme(name)
        assert not scheme.portable and scheme.needs_calibration
    assert parse_scheme("int4-g64:predict").predictor_rank == 64
