"""OpenFst's ConstFst files (tropical weights, version 2, unaligned) as numpy arrays: mapped, written in chunks, copied with new weights.

The layout is that of OpenFst's const-fst.h: a header, then 20 bytes per state, then 16 bytes per arc, arcs grouped by state.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from asr_kd.errors import AsrKdError

STATE = np.dtype([("final", "<f4"), ("first_arc", "<u4"), ("num_arcs", "<u4"), ("num_input_epsilons", "<u4"), ("num_output_epsilons", "<u4")])
ARC = np.dtype([("ilabel", "<i4"), ("olabel", "<i4"), ("weight", "<f4"), ("next_state", "<i4")])

_MAGIC = 2125659606
_EXPANDED = 1  # the one property that every ConstFst has; the others are left unknown
_TYPES = b"".join(struct.pack("<i", len(text)) + text for text in (b"const", b"standard"))
_COUNTS = struct.Struct("<iiQqqq")  # version, flags, properties, start, states, arcs
_HEADER_BYTES = 4 + len(_TYPES) + _COUNTS.size
MAX_ARCS = 2**32 - 1
_CHUNK = 1 << 20
_LONGEST_WITHOUT_INPUT = 1000


@dataclass(frozen=True)
class ConstFst:
    """A transducer as two arrays.

    Attributes:
        start: start state.
        states: (S,) of `STATE`; `final` is the final cost, infinity where the state is not final.
        arcs: (A,) of `ARC`; state s owns `arcs[first_arc:first_arc + num_arcs]`.
    """

    start: int
    states: NDArray[np.void]
    arcs: NDArray[np.void]


def map_const_fst(path: Path | str) -> ConstFst:
    """Memory-map a ConstFst file, read-only.

    Raises:
        AsrKdError: missing, cut off, or of another type.
    """
    start, num_states, num_arcs = _read_header(Path(path))
    states = np.memmap(path, STATE, "r", _HEADER_BYTES, (num_states,))
    arcs = np.memmap(path, ARC, "r", _HEADER_BYTES + num_states * STATE.itemsize, (num_arcs,)) if num_arcs else np.zeros(0, ARC)
    return ConstFst(start, states, arcs)


def check_const_fst(path: Path | str, num_inputs: int, num_outputs: int) -> None:
    """Look at every state and arc of a file of others: a search follows them without looking.

    Args:
        num_inputs, num_outputs: labels, 0 included, must lie below these.

    Raises:
        AsrKdError: a label, state, place of arcs or weight that is out of range, or a path without input labels that has no end; and as `map_const_fst`.
    """
    graph = map_const_fst(path)
    num_states, num_arcs = len(graph.states), len(graph.arcs)
    fine = 0 <= graph.start < num_states
    num_done = 0
    without_input: list[NDArray[np.int64]] = []  # (2, n): states that arcs of label 0 lead from and to
    for begin in range(0, num_states, _CHUNK):
        states = graph.states[begin:begin + _CHUNK]
        ends = num_done + np.cumsum(states["num_arcs"], dtype=np.int64)
        fine &= bool((states["first_arc"] == ends - states["num_arcs"]).all() and ends[-1] <= num_arcs and (states["final"] > -np.inf).all())
        if not fine:
            break
        arcs = graph.arcs[num_done:ends[-1]]
        num_done = int(ends[-1])
        for name, limit in (("ilabel", num_inputs), ("olabel", num_outputs), ("next_state", num_states)):
            fine &= bool(((arcs[name] >= 0) & (arcs[name] < limit)).all())
        fine &= bool(np.isfinite(arcs["weight"]).all())
        sources = np.repeat(np.arange(begin, begin + len(states)), states["num_arcs"])
        without_input.append(np.stack([sources, arcs["next_state"]])[:, arcs["ilabel"] == 0])
    if not fine or num_done != num_arcs:
        raise AsrKdError(f"{path}: labels, states or weights out of range; remove it and run the graph stage again")
    if not _ends(np.concatenate(without_input, 1), num_states):
        raise AsrKdError(f"{path}: a path without input labels has more than {_LONGEST_WITHOUT_INPUT} arcs, which a search may follow for ever; "
                         "remove it and run the graph stage again")


def _ends(arcs: NDArray[np.int64], num_states: int) -> bool:
    """Whether no path along arcs (2, A), from and to states, is longer than `_LONGEST_WITHOUT_INPUT`: those that no arc leads to are taken away in turn."""
    for _ in range(_LONGEST_WITHOUT_INPUT):
        if not arcs.size:
            return True
        is_entered = np.zeros(num_states, bool)
        is_entered[arcs[1]] = True
        arcs = arcs[:, is_entered[arcs[0]]]
    return not arcs.size


def _read_header(path: Path) -> tuple[int, int, int]:
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise AsrKdError(f"{path}: could not be read ({error.strerror}); run the graph stage again") from error
    if len(header) < _HEADER_BYTES or header[: 4 + len(_TYPES)] != struct.pack("<i", _MAGIC) + _TYPES:
        raise AsrKdError(f"{path}: not a ConstFst file with tropical weights; remove it and run the graph stage again")
    version, flags, _, start, num_states, num_arcs = _COUNTS.unpack_from(header, 4 + len(_TYPES))
    if (version, flags) != (2, 0):
        raise AsrKdError(f"{path}: ConstFst version {version} with flags {flags}, expected version 2 without flags; run the graph stage again")
    expected = _HEADER_BYTES + num_states * STATE.itemsize + num_arcs * ARC.itemsize
    if size != expected or num_states < 1:
        raise AsrKdError(f"{path}: {size} bytes, expected {expected}: it is cut off; remove it and run the graph stage again")
    return start, num_states, num_arcs


class ConstFstWriter:
    """Write a ConstFst file chunk by chunk, states in order; memory use is that of one chunk.

    Args:
        path: file to write.
        start: start state.
        num_states, num_arcs: totals, known beforehand; fewer or more at the end of the block is a ValueError.
    """

    def __init__(self, path: Path | str, start: int, num_states: int, num_arcs: int) -> None:
        if num_arcs > MAX_ARCS:
            raise AsrKdError(f"{path}: {num_arcs} arcs, at most {MAX_ARCS} fit a ConstFst; prune the language model")
        self._totals = (num_states, num_arcs)
        self._header = struct.pack("<i", _MAGIC) + _TYPES + _COUNTS.pack(2, 0, _EXPANDED, start, num_states, num_arcs)
        self._path = path
        self._states_done = 0
        self._arcs_done = 0

    def __enter__(self) -> ConstFstWriter:
        self._file: BinaryIO = open(self._path, "wb")
        self._file.write(self._header)
        return self

    def append(self, final: NDArray[np.float32], num_arcs: NDArray[np.int64], arcs: NDArray[np.void]) -> None:
        """Add n states: final costs (n,), numbers of arcs (n,), and their arcs (sum of `num_arcs`,) of `ARC`, grouped by state."""
        first = np.concatenate([[0], np.cumsum(num_arcs)])  # (n + 1,)
        states = np.zeros(len(final), STATE)
        states["final"], states["num_arcs"], states["first_arc"] = final, num_arcs, first[:-1] + self._arcs_done
        for name, label in (("num_input_epsilons", "ilabel"), ("num_output_epsilons", "olabel")):
            states[name] = np.diff(np.concatenate([[0], np.cumsum(arcs[label] == 0)])[first])
        self._file.seek(_HEADER_BYTES + self._states_done * STATE.itemsize)
        self._file.write(states.tobytes())
        self._file.seek(_HEADER_BYTES + self._totals[0] * STATE.itemsize + self._arcs_done * ARC.itemsize)
        self._file.write(arcs.tobytes())
        self._states_done += len(states)
        self._arcs_done += len(arcs)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()
        if kind is None and (self._states_done, self._arcs_done) != self._totals:
            raise ValueError(f"{self._path}: {self._states_done} states and {self._arcs_done} arcs written, expected {self._totals}")


def copy_with_word_cost(source: Path | str, target: Path | str, cost: float) -> None:
    """Copy a ConstFst file; `cost` is added to the weight of every arc that carries an output label, so once per word."""
    graph = map_const_fst(source)
    arcs_begin = os.path.getsize(source) - graph.arcs.nbytes
    with open(source, "rb") as original, open(target, "wb") as copy:
        left = arcs_begin
        while left:
            block = original.read(min(left, _CHUNK))
            copy.write(block)
            left -= len(block)
        for begin in range(0, len(graph.arcs), _CHUNK):
            arcs = np.array(graph.arcs[begin : begin + _CHUNK])
            arcs["weight"] += np.where(arcs["olabel"] != 0, np.float32(cost), np.float32(0))
            copy.write(arcs.tobytes())
