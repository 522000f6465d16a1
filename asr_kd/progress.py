"""Progress bars for long stages: rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None = None, desc: str = "", total: float | None = None, unit: str = "it") -> Any:
    """A tqdm bar over `items` (or one to `.update(n)` by hand, as a context manager) that is quiet when stderr is not a terminal."""
    return tqdm(items, desc=desc, total=total, unit=unit, disable=None, dynamic_ncols=True, leave=False)
