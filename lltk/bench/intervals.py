"""Confidence intervals of measured shares."""

from __future__ import annotations

import math


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927).

    Args:
        hits: how many trials succeeded.
        count: how many trials there were; at least one.
        z: quantile of the normal distribution; 1.96 gives 95 % confidence.

    Returns:
        The lowest and the highest share that agree with ``hits`` of ``count``, in [0, 1].

    Raises:
        ValueError: hits is not in 0 … count, or count is not positive.
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"wilson: {hits} hits of {count}; give 0 ≤ hits ≤ count and a trial")
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    reach = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)
