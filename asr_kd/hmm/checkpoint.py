"""What training has reached, written whole after every pass, so that a run that was cut off continues with the same result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.align import GmmHmm
from asr_kd.hmm.corpus import Aligned
from asr_kd.hmm.model import read_tensors, write_tensors
from asr_kd.stage import read_json, write_json

LATEST = "latest.json"


@dataclass(frozen=True, eq=False)
class TrainState:
    """Training after `done` passes.

    Attributes:
        model: what is being trained.
        independent: the speaker-independent model, once speaker-adaptive passes have begun.
        transforms: speaker id -> (D, D + 1).
        aligned: utterance id -> latest alignment.
        history: per pass its name, log-likelihood per frame and number of Gaussians.
    """

    done: int
    model: GmmHmm
    independent: GmmHmm | None = None
    transforms: dict[str, Tensor] = field(default_factory=dict)
    aligned: dict[str, Aligned] = field(default_factory=dict)
    history: tuple[dict[str, object], ...] = ()

    @property
    def codes(self) -> dict[str, NDArray[np.int32]]:
        """Utterance id -> (T,) context codes of the latest alignment."""
        return {utt_id: aligned.codes for utt_id, aligned in self.aligned.items()}


def save_state(folder: Path, state: TrainState, identity: str) -> None:
    """Write into one of two folders in turn, then point to it; the other stays whole until then."""
    place = folder / f"pass{state.done % 2}"
    (place / "speakers.json").unlink(missing_ok=True)
    state.model.save(place / "model")
    if state.independent is not None:
        state.independent.save(place / "independent")
    write_tensors(place / "transforms.safetensors", {f"t{i}": transform.numpy() for i, transform in enumerate(state.transforms.values())})
    with FrameWriter(place / "aligned", (2,), np.int32) as writer:
        for utt_id, aligned in state.aligned.items():
            writer.append(utt_id, np.stack([aligned.codes, aligned.nodes], 1))
    write_json(place / "speakers.json", list(state.transforms))
    write_json(folder / LATEST, {"identity": identity, "place": place.name, "done": state.done, "adapting": state.independent is not None,
                                 "history": list(state.history)})


def load_state(folder: Path, identity: str) -> TrainState | None:
    """The latest state of the training that `identity` names; None where there is none, or it is of another training or damaged."""
    try:
        notes = read_json(folder / LATEST)
        if notes["identity"] != identity:
            return None
        place = folder / notes["place"]
        tensors = read_tensors(place / "transforms.safetensors")
        speakers = read_json(place / "speakers.json")
        store = FrameStore(place / "aligned")
        return TrainState(
            done=notes["done"], model=GmmHmm.load(place / "model"), independent=GmmHmm.load(place / "independent") if notes["adapting"] else None,
            transforms={speaker: torch.from_numpy(tensors[f"t{i}"]) for i, speaker in enumerate(speakers)},
            aligned={utt_id: _unpacked(store[utt_id]) for utt_id in store}, history=tuple(notes["history"]))
    except (AsrKdError, KeyError):
        return None


def _unpacked(rows: NDArray[Any]) -> Aligned:
    codes, nodes = np.ascontiguousarray(rows.T)
    return Aligned(codes, nodes, 0.0)
