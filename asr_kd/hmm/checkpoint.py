"""What training has reached, written whole after every pass, so that a run that was cut off continues with the same result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.distributed import from_all_processes, rank, wait_for_all, world_size
from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.aligner import GmmHmm
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
        aligned_in: folder of that alignment (`alignment_name`), beside those of the passes.
        history: per pass its name, log-likelihood per frame and number of Gaussians.

    Of several processes each holds the transforms and alignments of its own speakers; the rest is the same in all.
    """

    done: int
    model: GmmHmm
    independent: GmmHmm | None = None
    transforms: dict[str, Tensor] = field(default_factory=dict)
    aligned: dict[str, Aligned] = field(default_factory=dict)
    aligned_in: str = ""
    history: tuple[dict[str, object], ...] = ()

    @property
    def codes(self) -> dict[str, NDArray[np.int32]]:
        """Utterance id -> (T,) context codes of the latest alignment."""
        return {utt_id: aligned.codes for utt_id, aligned in self.aligned.items()}


def alignment_name(number: int) -> str:
    """Folder of the alignment that pass `number` makes, and by how many processes."""
    return f"aligned{number}" + (f"of{world_size()}" if world_size() > 1 else "")


def save_state(folder: Path, state: TrainState, identity: str) -> None:
    """Write into one of two folders in turn, then point to it; the other stays whole until then. Each process writes its own speakers.

    An alignment has a folder of its own and is written only after the pass that made it.
    """
    processes = world_size()
    place = folder / f"pass{state.done % 2}"
    _save_transforms(_parts(place, processes)[rank()], state)
    if state.aligned_in == alignment_name(state.done):
        _save_alignment(_alignment_parts(folder, state.aligned_in)[rank()], state)
    if rank() == 0:
        state.model.save(place / "model")
        if state.independent is not None:
            state.independent.save(place / "independent")
    wait_for_all()
    if rank() == 0:
        notes = {"identity": identity, "place": place.name, "done": state.done, "aligned": state.aligned_in, "adapting": state.independent is not None,
                 "history": list(state.history)}
        write_json(folder / LATEST, notes | ({"processes": processes} if processes > 1 else {}))
        for earlier in folder.glob("aligned*"):
            if earlier.name != state.aligned_in:
                rmtree(earlier, ignore_errors=True)


def _save_transforms(place: Path, state: TrainState) -> None:
    (place / "speakers.json").unlink(missing_ok=True)
    write_tensors(place / "transforms.safetensors", {f"t{i}": transform.numpy() for i, transform in enumerate(state.transforms.values())})
    write_json(place / "speakers.json", list(state.transforms))


def _save_alignment(place: Path, state: TrainState) -> None:
    with FrameWriter(place, (2,), np.int32) as writer:
        for utt_id, aligned in state.aligned.items():
            writer.append(utt_id, np.stack([aligned.codes, aligned.nodes], 1))


def _parts(place: Path, processes: int) -> list[Path]:
    """Where each of several processes keeps its speakers."""
    return [place] if processes == 1 else [place / f"part{number}of{processes}" for number in range(processes)]


def _alignment_parts(folder: Path, name: str) -> list[Path]:
    return _parts(folder / name, int(name.partition("of")[2] or 1))


def load_state(folder: Path, identity: str, utt_ids: Iterable[str]) -> TrainState | None:
    """The latest state of the training that `identity` names, by whatever number of processes, with the alignments of these utterances.

    None (in all processes) where there is none, or it is of another training or damaged.
    """
    state = _read(folder, identity, set(utt_ids))
    return state if None not in from_all_processes(state and state.done) else None


def _read(folder: Path, identity: str, utt_ids: set[str]) -> TrainState | None:
    try:
        notes = read_json(folder / LATEST)
        if notes["identity"] != identity:
            return None
        place = folder / notes["place"]
        transforms: dict[str, Tensor] = {}
        aligned: dict[str, Aligned] = {}
        for part in _parts(place, notes.get("processes", 1)):
            tensors = read_tensors(part / "transforms.safetensors")
            transforms |= {speaker: torch.from_numpy(tensors[f"t{i}"]) for i, speaker in enumerate(read_json(part / "speakers.json"))}
        for part in _alignment_parts(folder, notes["aligned"]):
            store = FrameStore(part)
            aligned |= {utt_id: _unpacked(store[utt_id]) for utt_id in store if utt_id in utt_ids}
        return TrainState(
            done=notes["done"], model=GmmHmm.load(place / "model"), independent=GmmHmm.load(place / "independent") if notes["adapting"] else None,
            transforms=transforms, aligned=aligned, aligned_in=notes["aligned"], history=tuple(notes["history"]))
    except (AsrKdError, KeyError):
        return None


def _unpacked(rows: NDArray[Any]) -> Aligned:
    codes, nodes = np.ascontiguousarray(rows.T)
    return Aligned(codes, nodes, 0.0)
