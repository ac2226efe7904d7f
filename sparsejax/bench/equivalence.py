"""Are two sets of numbers the same, to within a margin? Two one-sided tests.

A test of difference that finds nothing says little; this one has to find that the
means differ by less than the margin, from above and from below.
"""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

__all__ = ["tost"]


def tost(a: Sequence[float], b: Sequence[float], *, margin: float) -> float:
    """Give the p-value of the means of ``a`` and ``b`` differing by ``margin`` or more.

    Small says equivalent. Variances may be unequal (Welch).

    Raises:
        ValueError: if a side has fewer than two numbers or the margin is not positive.

    Source: Ternovtsii & Bilak 2026, arXiv:2604.14419, abstract. Departure: Welch's
    degrees of freedom.
    """
    if min(len(a), len(b)) < 2 or margin <= 0:
        raise ValueError(
            f"{len(a)} and {len(b)} numbers, margin={margin}: needs at least two of"
            " each and a positive margin; run more seeds"
        )
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    error = math.sqrt(sum(parts))
    difference = abs(statistics.mean(a) - statistics.mean(b))
    if error == 0:
        return float(difference >= margin)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)
    )
    # Of the two tests the one on the side of the difference is the weaker.
    return float(stats.t.sf((margin - difference) / error, freedom))
