"""The state inventory: which tied state each phone in context uses, its transitions and its prior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from asr_kd.errors import AsrKdError
from asr_kd.stage import atomic_path, read_json, write_json

EDGE = 0
"""Context id beyond the first and last phone of an utterance."""
SIL = 1
"""Phone id of silence."""
STATES_PER_PHONE = 3
MAX_PHONES = 500
"""The table of states by three phones takes 1.5 GB then."""

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class HmmModel:
    """Three emitting states per phone, left to right, tied over left and right context.

    Attributes:
        phones: `phones[i]` has phone id i + 1; `phones[0]` is "SIL". Id 0 is the context beyond the utterance's edges.
        state_table: (n, n, n, 3) int32, n = len(phones) + 1: [left, centre, right] -> the three state ids; row centre = 0 is -1.
        log_self_loop: (S,) natural log probability of staying in a state for another frame.
        log_advance: (S,) natural log probability of leaving it.
        log_optional_silence: natural log probability of silence between two words.
        log_priors: (S,) natural log share of frames, all finite.
    """

    phones: tuple[str, ...]
    state_table: NDArray[np.int32]
    log_self_loop: NDArray[np.float32]
    log_advance: NDArray[np.float32]
    log_optional_silence: float
    log_priors: NDArray[np.float32]

    @property
    def num_states(self) -> int:
        """Number of tied states S."""
        return len(self.log_priors)

    def state_ids(self, left: ArrayLike, centre: ArrayLike, right: ArrayLike) -> NDArray[np.int32]:
        """State ids of phones in context, (..., 3), for arrays of phone ids (0 as context = edge of the utterance).

        Raises:
            AsrKdError: an id out of range, or 0 as centre.
        """
        triple = [np.asarray(ids, dtype=np.int64) for ids in (left, centre, right)]
        for name, ids in zip(("left", "centre", "right"), triple, strict=True):
            low = 1 if name == "centre" else 0
            if ids.size and (ids.min() < low or ids.max() > len(self.phones)):
                raise AsrKdError(f"{name} phone ids {ids.min()}..{ids.max()}, expected {low}..{len(self.phones)}; use the phone ids of this HMM")
        return self.state_table[triple[0], triple[1], triple[2]]

    @property
    def flat_table(self) -> NDArray[np.int32]:
        """(n * n * n * 3,) state id of each context code (see `context_codes`)."""
        return self.state_table.reshape(-1)

    def save(self, folder: Path | str) -> None:
        """Write hmm.json and hmm.safetensors into `folder`."""
        folder = Path(folder)
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in ("state_table", "log_self_loop", "log_advance", "log_priors")}
        write_tensors(folder / "hmm.safetensors", tensors)
        write_json(folder / "hmm.json", {"phones": self.phones, "log_optional_silence": self.log_optional_silence, "num_states": self.num_states})

    @staticmethod
    def load(folder: Path | str) -> HmmModel:
        """Read what `save` wrote.

        Raises:
            AsrKdError: a file is missing or damaged.
        """
        folder = Path(folder)
        notes = read_json(folder / "hmm.json")
        tensors = read_tensors(folder / "hmm.safetensors")
        try:
            return HmmModel(phones=tuple(notes["phones"]), log_optional_silence=float(notes["log_optional_silence"]), **tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise AsrKdError(f"{folder}: not an HMM of this version ({error!r}); run the stage that writes it again") from error

    def with_counts(self, counts: FloatArray) -> HmmModel:
        """The same model with priors from (S,) frame counts; a state never seen counts as half a frame, so that its log prior is finite."""
        smoothed = np.maximum(counts.astype(np.float64), 0.5)
        return replace(self, log_priors=np.log(smoothed / smoothed.sum()).astype(np.float32))


def context_codes(left: ArrayLike, centre: ArrayLike, right: ArrayLike, num_phones: int) -> NDArray[np.int32]:
    """One number per (left, centre, right, state): index into `HmmModel.flat_table`; (..., 3) for phone ids (...). Independent of the tying."""
    n = num_phones + 1
    triple = (np.asarray(left, np.int64) * n + np.asarray(centre, np.int64)) * n + np.asarray(right, np.int64)
    return (triple[..., None] * STATES_PER_PHONE + np.arange(STATES_PER_PHONE)).astype(np.int32)


def split_codes(codes: IntArray, num_phones: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Left, centre, right phone ids and position 0..2 of context codes."""
    n = num_phones + 1
    triple, position = np.divmod(codes, STATES_PER_PHONE)
    pair, right = np.divmod(triple, n)
    left, centre = np.divmod(pair, n)
    return left, centre, right, position


def untied_model(phones: tuple[str, ...]) -> HmmModel:
    """Context-independent states, three per phone, with even transitions and priors: where training starts.

    Raises:
        AsrKdError: more than `MAX_PHONES` phones.
    """
    n = len(phones) + 1
    if len(phones) > MAX_PHONES:
        raise AsrKdError(f"lexicon: {len(phones)} phones with silence, expected at most {MAX_PHONES}, as states depend on phones in threes; "
                         "give one with fewer (without stress or tones, strip_stress)")
    by_centre = np.arange(n * STATES_PER_PHONE, dtype=np.int32).reshape(n, STATES_PER_PHONE) - STATES_PER_PHONE
    by_centre[EDGE] = -1
    table = np.ascontiguousarray(np.broadcast_to(by_centre[None, :, None], (n, n, n, STATES_PER_PHONE)))
    num_states = len(phones) * STATES_PER_PHONE
    half = np.full(num_states, np.log(0.5), dtype=np.float32)
    priors = np.full(num_states, -np.log(num_states), dtype=np.float32)
    return HmmModel(phones, table, half, half.copy(), float(np.log(0.5)), priors)


def write_tensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path, (SafetensorError,)) as part:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, part)


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read a safetensors file; a missing or damaged one is an `AsrKdError`."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise AsrKdError(f"{path}: not readable ({error}); run the stage that writes it again") from error
