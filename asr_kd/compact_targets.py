"""One frame's distribution in a few dozen bytes, closely: the largest probabilities as they are, the shape of the rest by its main directions.

The logarithms of a network's posteriors over all states, seen over many frames, vary in far fewer directions than there are states:
states of the same phone rise and fall together. So a frame's tail is described by its coordinates in the leading principal
directions of log p, one byte each; the largest probabilities are kept beside it, and the tail is scaled to the mass that they leave.

Unlike a sample of the tail (`asr_kd.sparse_targets`) this is not unbiased, but it is far less noisy where the tail counts. Mean squared
error per frame at 128 bytes, 1200 states, four networks on real features: T = 1 5.0e-4 (sample 2.5e-4), T = 2 3.0e-4 (3.1e-3), T = 5 1.3e-5
(1.0e-2); the noise of the soft term's gradient is T^2 times that, beside about 0.2 of the hard targets' own. `python -m
tests.benchmarks.soft_targets` measures it, and the students' frame accuracy, on any corpus.

A record is `bytes_per_frame // 2` words of 16 bits: half of them hold two coordinates each, the other half ids and probabilities
(in 1/65535) of the largest entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from asr_kd.errors import AsrKdError
from asr_kd.model import load_tensors, save_tensors
from asr_kd.sparse_targets import MAX_STATES, UNITS, round_to_units, signed_words, unsigned_words

SMALLEST_RECORD_BYTES = 16
FLOOR = 1e-3  # probabilities below this share of uniform ones are not told apart: together they hold at most this mass
COORDINATE_RANGE = 127
OVERSAMPLED = 16
POWER_ITERATIONS = 3


@dataclass(frozen=True)
class TailDirections:
    """Principal directions of log posteriors of S states.

    Attributes:
        mean: (S,) of log p.
        directions: (S, R), orthonormal columns.
        steps: (R,) unit of each coordinate as stored.
        num_exact: J, entries that are kept as they are.
    """

    mean: Tensor
    directions: Tensor
    steps: Tensor
    num_exact: int

    @property
    def bytes_per_frame(self) -> int:
        return len(self.steps) + 4 * self.num_exact

    def encode(self, posteriors: Tensor) -> Tensor:
        """Records (N, bytes_per_frame // 2) of int16 words of distributions (N, S)."""
        with torch.autocast(posteriors.device.type, enabled=False):
            coordinates = (floored_log(posteriors) - self.mean) @ self.directions / self.steps  # (N, R)
        coordinates = coordinates.round().clamp(-COORDINATE_RANGE, COORDINATE_RANGE).to(torch.int8)
        top, ids = posteriors.topk(self.num_exact)
        rest = (posteriors.sum(1, keepdim=True) - top.sum(1, keepdim=True)).clamp(min=0)
        units = round_to_units(torch.cat([top, rest], 1).double(), 0.5)[:, :-1]
        return torch.cat([coordinates.view(torch.int16), signed_words(ids), signed_words(units)], 1)

    def decode(self, records: Tensor) -> Tensor:
        """Distributions (N, S), float32, of records."""
        coordinates, ids, units = records.tensor_split([len(self.steps) // 2, len(self.steps) // 2 + self.num_exact], 1)
        with torch.autocast(records.device.type, enabled=False):
            log_tail = torch.addmm(self.mean, coordinates.contiguous().view(torch.int8).float() * self.steps, self.directions.t())  # (N, S)
        ids, units = unsigned_words(ids), unsigned_words(units)
        tail = log_tail.scatter_(1, ids, -torch.inf).softmax(1)
        return tail.mul_((UNITS - units.sum(1, keepdim=True)) / UNITS).scatter_(1, ids, units / UNITS)

    def to(self, device: torch.device) -> TailDirections:
        return TailDirections(self.mean.to(device), self.directions.to(device), self.steps.to(device), self.num_exact)

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        save_tensors(path, {"mean": self.mean, "directions": self.directions, "steps": self.steps}, {"num_exact": str(self.num_exact)})

    @classmethod
    def load(cls, path: Path) -> TailDirections:
        """Read what `save` wrote; `AsrKdError` when it is damaged."""
        tensors, metadata = load_tensors(path)
        try:
            return cls(tensors["mean"], tensors["directions"], tensors["steps"], int(metadata["num_exact"]))
        except (KeyError, ValueError) as error:
            raise AsrKdError(f"{path}: {error} missing or not a number; run the soft_targets stage again") from error


def check_compact_size(bytes_per_frame: int, num_states: int) -> None:
    """Raise `AsrKdError` unless frames over `num_states` states can be written in records of `bytes_per_frame`."""
    if bytes_per_frame < SMALLEST_RECORD_BYTES or bytes_per_frame % 8:
        raise AsrKdError(f"compact soft targets of {bytes_per_frame} bytes per frame; expected a multiple of 8, at least {SMALLEST_RECORD_BYTES}")
    if num_states > MAX_STATES:
        raise AsrKdError(f"compact soft targets over {num_states} states; state ids are stored in 16 bits, at most {MAX_STATES}: use the dense form")


def find_tail_directions(posteriors: Tensor, bytes_per_frame: int, generator: torch.Generator) -> TailDirections:
    """Principal directions of a sample of frames (N, S), by a randomised range finder (Halko, Martinsson & Tropp 2011, algorithm 4.4)."""
    num_states = posteriors.shape[1]
    num_exact = min(bytes_per_frame // 8, num_states - 1)
    num_directions = bytes_per_frame - 4 * num_exact
    logs = floored_log(posteriors)
    mean = logs.mean(0)
    with torch.autocast(posteriors.device.type, enabled=False):
        directions = _principal_directions(logs - mean, num_directions, generator)
        largest = ((logs - mean) @ directions).abs().amax(0)
    return TailDirections(mean, directions, (1.2 * largest / COORDINATE_RANGE).clamp(min=1e-6), num_exact)


def _principal_directions(centred: Tensor, num_directions: int, generator: torch.Generator) -> Tensor:
    """Leading right singular vectors (S, R) of (N, S); zeros where there are fewer."""
    sketch = centred @ torch.randn(centred.shape[1], num_directions + OVERSAMPLED, generator=generator).to(centred.device)
    for _ in range(POWER_ITERATIONS):
        sketch = centred @ (centred.t() @ torch.linalg.qr(sketch).Q)
    projected = torch.linalg.qr(sketch).Q.t() @ centred  # (R + 16, S)
    vectors: Tensor = torch.linalg.svd(projected, full_matrices=False).Vh[:num_directions]
    return functional.pad(vectors, (0, 0, 0, num_directions - len(vectors))).t().contiguous()


def floored_log(posteriors: Tensor) -> Tensor:
    """Log of probabilities (N, S) that are at least 0.001 / S."""
    return posteriors.clamp(min=FLOOR / posteriors.shape[1]).log()
