"""Which formats a search may choose from, and the choice: most damage taken away for each bit, until bits are spent."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_lowbit.comm.format_names import parse_format
from megatron_lowbit.comm.presets import SCALED
from megatron_lowbit.comm.wire_format import WireFormat

VALUES = ("tc2", "tc3", "tc4", "int5", "int6", "int7", "int8")
#: The same, but for those that take an encoder long.
FAST_VALUES = ("lm2", "lm3", "lm4", *VALUES[3:])
GROUPS = (32, 40, 64, 128)
#: Of how many features one may travel as BF16: the budget of outliers is spent where it helps.
OUTLIER_DIVISORS = (32, 64, 128)
#: Rotated, a row has no small groups worth their scales.
ROTATED_GROUPS = (64, 128)
#: A sync point's stage: its name, and 0 for reduce or 1 for gather.
Site = tuple[str, int]


@dataclass(frozen=True)
class Candidate:
    """A format by name, and its bits a value on the wire."""

    name: str
    wire: WireFormat
    bits: float


def candidates(hidden: int, fast: bool = False) -> list[Candidate]:
    """2 to 8 bits, groups of 32 to 128 with one-byte scales, with BF16 features or without, rotated or not.

    fast: code books in place of trellis-coded values.
    """
    shares = ["", *(f"-outlier{divisor}" for divisor in OUTLIER_DIVISORS if hidden >= divisor)]
    found = []
    for values in FAST_VALUES if fast else VALUES:
        plain = [f"{values}-g{group}-{SCALED}{share}" for group in GROUPS for share in shares]
        rotated = [f"{values}-g{group}-{SCALED}-rotated{share}" for group in ROTATED_GROUPS for share in shares]
        for name in plain + rotated:
            wire, _ = parse_format(name)
            found.append(Candidate(name, wire, wire.wire_bits_per_value(hidden)))
    return found


@dataclass(frozen=True)
class Choice:
    """The index of a format for every site; bits in the mean over sites, damage in their sum."""

    formats: dict[Site, int]
    mean_bits: float
    damage: float


@dataclass(frozen=True)
class _Upgrade:
    """From one format of a site to the next that is worth its bits."""

    gain_per_bit: float
    site: Site
    to: int
    bits: float
    gain: float


def choose(
    damages: Mapping[Site, Sequence[float]], bits: Sequence[float], budget_bits: float = 0.0, damage: float = 0.0
) -> Choice:
    """Least damage within `budget_bits`; or, where a positive `damage` is given, fewest bits that keep below it.

    damages: of each format at each site; they add up. Optimal but for the last upgrade: formats of a site are reduced
    to the convex hull of (bits, damage), and upgrades are taken in the order of what they gain for a bit.
    Raises ValueError where the cheapest formats are beyond the budget, or the finest above the damage.
    """
    at, upgrades = {}, []
    for site, of_formats in damages.items():
        hull = _hull(bits, of_formats)
        at[site] = hull[0]
        for first, second in itertools.pairwise(hull):
            more, gain = bits[second] - bits[first], of_formats[first] - of_formats[second]
            upgrades.append(_Upgrade(gain / more, site, second, more, gain))
    upgrades.sort(key=lambda upgrade: -upgrade.gain_per_bit)  # stable: those of a site stay in their order
    total_bits = sum(bits[index] for index in at.values())
    total_damage = sum(damages[site][index] for site, index in at.items())
    left = budget_bits * len(at) + 1e-9 - total_bits
    if left < 0 and damage <= 0:
        raise ValueError(
            f"a budget of {budget_bits:g} bits is below the {total_bits / len(at):.2f} of the cheapest formats"
        )
    full: set[Site] = set()
    for upgrade in upgrades:
        if damage > 0:
            if total_damage <= damage:
                break
        elif upgrade.site in full or upgrade.bits > left:
            full.add(upgrade.site)  # what follows at this site builds on it
            continue
        at[upgrade.site] = upgrade.to
        left -= upgrade.bits
        total_bits += upgrade.bits
        total_damage -= upgrade.gain
    if damage > 0 and total_damage > damage:
        raise ValueError(f"the finest formats are expected to leave {total_damage:.2g}, more than {damage:.2g}")
    return Choice(at, total_bits / len(at), sum(damages[site][index] for site, index in at.items()))


def best_uniform(
    damages: Mapping[Site, Sequence[float]], bits: Sequence[float], budget_bits: float = 0.0, damage: float = 0.0
) -> Choice:
    """The same for one format at all sites. Raises ValueError as `choose` does."""
    totals = [sum(of_formats[index] for of_formats in damages.values()) for index in range(len(bits))]
    if damage > 0:
        allowed = [index for index, total in enumerate(totals) if total <= damage]
        ranked = sorted(allowed, key=lambda index: (bits[index], totals[index]))
    else:
        allowed = [index for index, cost in enumerate(bits) if cost <= budget_bits + 1e-9]
        ranked = sorted(allowed, key=lambda index: (totals[index], bits[index]))
    if not ranked:
        wanted = f"a KL of {damage:.2g}" if damage > 0 else f"{budget_bits:g} bits"
        raise ValueError(
            f"no format of {min(bits):.2f} to {max(bits):.2f} bits, the same everywhere, keeps to {wanted}"
        )
    return Choice(dict.fromkeys(damages, ranked[0]), bits[ranked[0]], totals[ranked[0]])


def _hull(bits: Sequence[float], damage: Sequence[float]) -> list[int]:
    """Formats on the lower convex hull of (bits, damage), from the cheapest to the least damage."""
    hull: list[int] = []
    for index in sorted(range(len(bits)), key=lambda index: (bits[index], damage[index])):
        if hull and (damage[index] >= damage[hull[-1]] or bits[index] <= bits[hull[-1]]):
            continue
        while len(hull) > 1 and _slope(bits, damage, hull[-1], index) >= _slope(bits, damage, hull[-2], hull[-1]):
            # what lies between is worth less for a bit than going there and on
            hull.pop()
        hull.append(index)
    return hull


def _slope(bits: Sequence[float], damage: Sequence[float], first: int, second: int) -> float:
    return (damage[first] - damage[second]) / (bits[second] - bits[first])
