"""Are two sets of numbers the same, to within a margin? Two one-sided tests.

A test of difference that finds nothing says little; this one has to find that the
means differ by less than the margin, from above and from below.
"""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

__all__ = ["tost"]


def tost(differences: Sequence[float], *, margin: float) -> float:
    """Give the p-value of a mean difference being ``margin`` or more, either way.

    Small says equivalent. Each difference is of a pair that shares all but what is
    compared: the same seed, the same batches in the same order.

    Raises:
        ValueError: for fewer than two differences, or a margin that is not positive.

    Source: Ternovtsii & Bilak 2026, arXiv:2604.14419, abstract. Departure: pairs.
    """
    count = len(differences)
    if count < 2 or margin <= 0:
        raise ValueError(
            f"{count} differences, margin={margin}: needs at least two and a positive"
            " margin; run more seeds"
        )
    error = statistics.stdev(differences) / math.sqrt(count)
    difference = abs(statistics.mean(differences))
    if error == 0:
        return float(difference >= margin)
    # Of the two tests the one on the side of the difference is the weaker.
    return float(stats.t.sf((margin - difference) / error, count - 1))
