"""A variant for tests of processes that take turns. Each process imports this module, so it imports little."""

from __future__ import annotations

import sys
import time
from typing import Any


def counting(settings: int, serve: Any) -> None:
    """Answer with the sum of all requests so far."""
    total = [settings]

    def work(asked: int) -> int:
        total[0] += asked
        print("asked", asked)
        if asked < 0:
            sys.exit("a negative request")
        time.sleep(0.01)
        return total[0]

    serve(work, lambda: work(100))
