"""Halton's sequence: points that fill a space evenly, whatever their number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, islice


def halton(number: int, dimensions: int, seed: int) -> list[float]:
    """Return one point of Halton's sequence, shifted by the seed.

    Args:
        number: of the point, from 0.
        dimensions: how many coordinates it has.
        seed: of the shift, which is common to all points (Cranley and Patterson 1976).

    Returns:
        The coordinates, each in [0, 1): the radical inverses of `number + 1` in the first prime
        bases (Halton 1960), plus the shift, modulo 1.
    """
    shift = random.Random(seed)
    bases = islice(_primes(), dimensions)
    return [(_radical_inverse(number + 1, base) + shift.random()) % 1.0 for base in bases]


def _radical_inverse(number: int, base: int) -> float:
    """Mirror a number's digits at the point: 6 in base 2 is 110, so 0.011 or 0.375."""
    value, share = 0.0, 1.0
    while number:
        share /= base
        number, digit = divmod(number, base)
        value += digit * share
    return value


def _primes() -> Iterator[int]:
    return (n for n in count(2) if all(n % divisor for divisor in range(2, int(n**0.5) + 1)))
