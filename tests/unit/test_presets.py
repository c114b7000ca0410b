"""Presets: names that stand for schemes, and the bits they promise at every width."""

from __future__ import annotations

import pytest

from megatron_lowbit.comm.presets import PRESETS
from megatron_lowbit.comm.schemes import parse_scheme

LAYERS = 18
LIMITS = {"balanced": 4.25, "fine": 4.25, "balanced-portable": 4.25, "small": 3.25, "small-portable": 3.25}


def test_every_preset_has_a_promise():
    assert set(PRESETS) == set(LIMITS)


@pytest.mark.parametrize("name", PRESETS)
def test_wire_bits_stay_below_the_limit(name):
    """Rows are padded and groups rarely fill them; the fewer layers, the more the ends weigh."""
    scheme, points = parse_scheme(name), [str(point) for point in range(2 * LAYERS)]
    for hidden in (*range(512, 1400, 7), *range(1400, 9000, 241), *range(640, 16385, 128), 2880):
        for post_norms in (False, True):
            reduce, gather = scheme.wire_bits_per_value(hidden, points, post_norms)
            limit = LIMITS[name] + (0.0 if hidden % 128 == 0 and hidden >= 640 else 0.1)
            assert gather is not None and (reduce + gather) / 2 <= limit, hidden
    assert LIMITS[name] - 0.35 < sum(scheme.wire_bits_per_value(4096, points, False)) / 2  # nor does it waste them


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_scheme_it_stands_for(name):
    scheme = parse_scheme(name)
    spelt_out = parse_scheme(PRESETS[name])
    assert scheme.name == name
    assert vars(scheme) | {"name": ""} == vars(spelt_out) | {"name": ""}
    assert scheme.portable == name.endswith("-portable") and scheme.needs_calibration


def test_presets_take_no_options_and_are_named_in_errors():
    with pytest.raises(ValueError, match="balanced-portable, small-portable"):
        parse_scheme("balanced:loop")
