"""How often a key may ask: a bucket of requests that fills as time goes by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

# A minute's requests may come at once; then they come as the bucket fills.
SECONDS = 60.0
MOST_BUCKETS = 10_000


@dataclass
class _Bucket:
    tokens: float
    at: float


class RateLimit:
    """Requests by key. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: str, per_minute: float) -> int:
        """Take one request of this key: 0, or the whole seconds to wait until there is one again."""
        now = self._clock()
        if key not in self._buckets and len(self._buckets) >= MOST_BUCKETS:
            self._buckets.clear()  # keys come from a list, which was written anew many times
        bucket = self._buckets.setdefault(key, _Bucket(per_minute, now))
        bucket.tokens = min(per_minute, bucket.tokens + (now - bucket.at) * per_minute / SECONDS)
        bucket.at = now
        if bucket.tokens < 1:
            return max(1, math.ceil((1 - bucket.tokens) * SECONDS / per_minute))
        bucket.tokens -= 1
        return 0
