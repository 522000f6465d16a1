"""Several feature stores read as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore


class Features:
    """Frames by utterance id from one or more stores with frames of one shape.

    Raises:
        AsrKdError: no store, frames of different shapes, or an utterance id in two stores.
    """

    def __init__(self, stores: Sequence[FrameStore]) -> None:
        shapes = {store.frames.shape[1:] for store in stores}
        if len(shapes) != 1:
            raise AsrKdError(f"features: {len(stores)} stores with frames of shapes {sorted(shapes)}, expected one shape; run the features stage again")
        self.frame_shape: tuple[int, ...] = shapes.pop()
        self._store_of: dict[str, FrameStore] = {}
        for store in stores:
            for utt_id in store:
                if utt_id in self._store_of:
                    raise AsrKdError(f"{utt_id}: in {self._store_of[utt_id].folder} and in {store.folder}; utterance ids must be unique across splits")
                self._store_of[utt_id] = store

    def __contains__(self, utt_id: object) -> bool:
        return utt_id in self._store_of

    def __getitem__(self, utt_id: str) -> NDArray[np.generic]:
        """(T, F) frames."""
        return self._of(utt_id)[utt_id]

    def length(self, utt_id: str) -> int:
        """Number of frames of an utterance."""
        return self._of(utt_id).length(utt_id)

    def _of(self, utt_id: str) -> FrameStore:
        try:
            return self._store_of[utt_id]
        except KeyError:
            raise AsrKdError(f"{utt_id}: no features; run the features stage again") from None


def joined(stores: FrameStore | Sequence[FrameStore]) -> Features:
    """One store or several as `Features`."""
    return Features([stores] if isinstance(stores, FrameStore) else stores)
