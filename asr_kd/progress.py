"""Progress bars for long stages: rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from asr_kd.distributed import rank


def progress(items: Iterable[Any] | None = None, desc: str = "", total: float | None = None, unit: str = "it") -> Any:
    """A tqdm bar over `items` (or one to `.update(n)` by hand, as a context manager) that is quiet when stderr is not a terminal, and in
    all processes of a run but the first."""
    return tqdm(items, desc=desc, total=total, unit=unit, disable=True if rank() else None, dynamic_ncols=True, leave=False)
