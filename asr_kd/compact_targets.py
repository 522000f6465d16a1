"""One frame's distribution in a few dozen bytes, closely: its shape over all states by main directions, and some probabilities as they are.

The logarithms of a network's posteriors over all states, seen over many frames, vary in far fewer directions than there are states:
states of the same phone rise and fall together. So a frame is described by its coordinates in the leading principal directions of
log p, the first of them in a byte each, the many others in half a byte. The entries that this description gets most wrong are kept
beside it as they are, and the others are scaled to the mass that these leave.

Unlike a sample of the tail (`asr_kd.sparse_targets`) this is not unbiased, but its error is small at every temperature. That error is
the same in every epoch, so a student learns it: what counts is how much of log p is lost, not the squared error of p. (With 64
directions of a byte each, students at T = 5 lost 0.34 % frame accuracy, at a squared error per frame of 2e-5.) How many directions
and how many entries there are, and how finely the coordinates are told apart, is found from a sample of frames.
`python -m tests.benchmarks soft_targets` measures errors, and students' frame accuracy, on any corpus.

A record is `bytes_per_frame // 2` words of 16 bits: fine coordinates, one byte each | coarse ones, two to a byte | ids of the entries that
are kept | their probabilities in 1/65535.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from asr_kd.errors import AsrKdError
from asr_kd.model import load_tensors, save_tensors
from asr_kd.sparse_targets import MAX_STATES, UNITS, round_to_units, signed_words, unsigned_words

LAYOUT = 2
"""Records of another number are not read."""
SMALLEST_RECORD_BYTES = 16
FLOOR = 1e-3  # probabilities below this share of uniform ones are not told apart: together they hold at most this mass
FINE_RANGE = 127
COARSE_LEVELS = 16
COARSE_STEPS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)  # of a standard deviation; the best for a Gaussian is 0.335
EXACT_SHARES = (0.125, 0.25, 0.375, 0.5)  # of a record for entries as they are: which is best depends on the temperature
TESTED_FRAMES = 1024  # of the sample, at most an eighth: these are not learnt from but choose that share
OVERSAMPLED = 16
POWER_ITERATIONS = 3


@dataclass(frozen=True)
class CompactCode:
    """How distributions over S states are written.

    Attributes:
        mean: (S,) of log p.
        directions: (S, R), orthonormal columns.
        steps: (R,) unit of each coordinate.
        num_fine: coordinates of a byte, the first ones; the others have half a byte.
        num_exact: J, entries that are kept as they are.
    """

    mean: Tensor
    directions: Tensor
    steps: Tensor
    num_fine: int
    num_exact: int

    @property
    def bytes_per_frame(self) -> int:
        return self.num_fine + (len(self.steps) - self.num_fine) // 2 + 4 * self.num_exact

    @cached_property
    def _scaled(self) -> Tensor:
        """(R, S): directions times steps."""
        return (self.directions * self.steps).t().contiguous()

    @cached_property
    def _scaled_bfloat16(self) -> Tensor:
        return self._scaled.bfloat16()

    def encode(self, posteriors: Tensor) -> Tensor:
        """Records (N, bytes_per_frame // 2) of int16 words of distributions (N, S)."""
        with torch.autocast(posteriors.device.type, enabled=False):
            coordinates = (floored_log(posteriors) - self.mean) @ self.directions / self.steps  # (N, R)
        fine = coordinates[:, :self.num_fine].round().clamp(-FINE_RANGE, FINE_RANGE)
        coarse = coordinates[:, self.num_fine:].floor().clamp(-COARSE_LEVELS // 2, COARSE_LEVELS // 2 - 1)
        described = self._logs(torch.cat([fine, coarse + 0.5], 1)).softmax(1)
        ids = (posteriors - described).abs_().topk(self.num_exact).indices
        exact = posteriors.gather(1, ids)
        rest = (posteriors.sum(1, keepdim=True) - exact.sum(1, keepdim=True)).clamp(min=0)
        units = round_to_units(torch.cat([exact, rest], 1).double(), 0.5)[:, :-1]
        low, high = (coarse.to(torch.int16) + COARSE_LEVELS // 2).chunk(2, 1)
        octets = torch.cat([fine.to(torch.int8).view(torch.uint8), (low + COARSE_LEVELS * high).to(torch.uint8)], 1)
        return torch.cat([octets.view(torch.int16), signed_words(ids), signed_words(units)], 1)

    def decode(self, records: Tensor) -> Tensor:
        """Distributions (N, S), float32, of records (N, W)."""
        width = records.shape[1] - 2 * self.num_exact
        words, ids, units = records.tensor_split([width, width + self.num_exact], 1)
        fine, packed = words.contiguous().view(torch.uint8).tensor_split([self.num_fine], 1)
        coarse = [half.float() - (COARSE_LEVELS - 1) / 2 for half in (packed & (COARSE_LEVELS - 1), packed >> 4)]
        ids, units = unsigned_words(ids), unsigned_words(units)
        logs = self._logs(torch.cat([fine.view(torch.int8).float(), *coarse], 1))
        tail = logs.scatter_(1, ids, -torch.inf).softmax(1)
        return tail.mul_((UNITS - units.sum(1, keepdim=True)) / UNITS).scatter_(1, ids, units / UNITS)

    def _logs(self, coordinates: Tensor) -> Tensor:
        """(N, S) log p, up to a constant per frame, that coordinates (N, R) in units of their steps describe.

        Inside bfloat16 autocast the product is made in bfloat16, which takes small whole and half numbers as they are and rounds log p by
        less than a hundredth of what the code loses of it.
        """
        kind = coordinates.device.type
        in_bfloat16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        with torch.autocast(kind, enabled=False):
            if in_bfloat16:
                return (coordinates.bfloat16() @ self._scaled_bfloat16).float().add_(self.mean)
            return torch.addmm(self.mean, coordinates, self._scaled)

    def to(self, device: torch.device) -> CompactCode:
        return replace(self, mean=self.mean.to(device), directions=self.directions.to(device), steps=self.steps.to(device))

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        numbers = {"layout": LAYOUT, "num_fine": self.num_fine, "num_exact": self.num_exact}
        save_tensors(path, {"mean": self.mean, "directions": self.directions, "steps": self.steps}, {name: str(number) for name, number in numbers.items()})

    @classmethod
    def load(cls, path: Path) -> CompactCode:
        """Read what `save` wrote; `AsrKdError` when it is damaged or of another layout."""
        tensors, metadata = load_tensors(path)
        if metadata.get("layout") != str(LAYOUT):
            raise AsrKdError(f"{path}: layout {metadata.get('layout')}, expected {LAYOUT}; run the soft_targets stage again")
        try:
            return cls(tensors["mean"], tensors["directions"], tensors["steps"], int(metadata["num_fine"]), int(metadata["num_exact"]))
        except (KeyError, ValueError) as error:
            raise AsrKdError(f"{path}: {error} missing or not a number; run the soft_targets stage again") from error


def check_compact_size(bytes_per_frame: int, num_states: int) -> None:
    """Raise `AsrKdError` unless frames over `num_states` states can be written in records of `bytes_per_frame`."""
    if bytes_per_frame < SMALLEST_RECORD_BYTES or bytes_per_frame % 8:
        raise AsrKdError(f"compact soft targets of {bytes_per_frame} bytes per frame; expected a multiple of 8, at least {SMALLEST_RECORD_BYTES}")
    if num_states > MAX_STATES:
        raise AsrKdError(f"compact soft targets over {num_states} states; state ids are stored in 16 bits, at most {MAX_STATES}: use the dense form")


def find_compact_code(posteriors: Tensor, bytes_per_frame: int, generator: torch.Generator) -> CompactCode:
    """The code of `bytes_per_frame` that tells most of distributions like those of a sample (N, S).

    Directions and steps come from most of the frames, the number of exact entries from the mean Kullback-Leibler divergence on the others.
    """
    num_states = posteriors.shape[1]
    exact = sorted({min(max(1, int(share * bytes_per_frame) // 4), num_states - 1) for share in EXACT_SHARES})
    num_tested = min(TESTED_FRAMES, len(posteriors) // 8)
    learnt, tested = posteriors[num_tested:], posteriors[:num_tested] if num_tested else posteriors
    logs = floored_log(learnt)
    mean = logs.mean(0)
    logs -= mean
    with torch.autocast(posteriors.device.type, enabled=False):
        directions = _principal_directions(logs, 2 * (bytes_per_frame - 4 * exact[0]), generator)
        coordinates = logs @ directions  # (N, R)
    codes = [_code(mean, directions, coordinates, bytes_per_frame, num_exact) for num_exact in exact]
    return min(codes, key=lambda code: _divergence(tested, code.decode(code.encode(tested))))


def _code(mean: Tensor, directions: Tensor, coordinates: Tensor, bytes_per_frame: int, num_exact: int) -> CompactCode:
    """The code of so many exact entries, with as many fine coordinates as leave the least squared error of log p."""
    left = bytes_per_frame - 4 * num_exact
    fine_steps = (1.2 * coordinates.abs().amax(0) / FINE_RANGE).clamp(min=1e-6)
    deviations = coordinates.square().mean(0).sqrt()
    trials = [(share * deviations).clamp(min=1e-6) for share in COARSE_STEPS]
    errors = torch.stack([_coarse_error(coordinates, steps) for steps in trials])  # (trials, R)
    coarse_steps = torch.stack(trials).gather(0, errors.argmin(0)[None])[0]
    fine_errors, coarse_errors, whole = fine_steps.square() / 12, errors.amin(0), deviations.square()

    def error(num_fine: int) -> float:
        end = num_fine + 2 * (left - num_fine)
        return float(fine_errors[:num_fine].sum() + coarse_errors[num_fine:end].sum() + whole[end:].sum())

    num_fine = min(range(0, left + 1, 2), key=error)
    size = num_fine + 2 * (left - num_fine)
    return CompactCode(mean, directions[:, :size].contiguous(), torch.cat([fine_steps[:num_fine], coarse_steps[num_fine:size]]), num_fine, num_exact)


def _coarse_error(coordinates: Tensor, steps: Tensor) -> Tensor:
    """(R,) mean squared error of coordinates (N, R) in half a byte each."""
    written = (coordinates / steps).floor_().clamp_(-COARSE_LEVELS // 2, COARSE_LEVELS // 2 - 1).add_(0.5).mul_(steps)
    return (written - coordinates).square_().mean(0)


def _divergence(posteriors: Tensor, found: Tensor) -> float:
    """Mean Kullback-Leibler divergence of distributions (N, S) from those found for them, nats."""
    return float((torch.xlogy(posteriors, posteriors) - torch.xlogy(posteriors, found.clamp(min=1e-12))).sum(1).mean())


def _principal_directions(centred: Tensor, num_directions: int, generator: torch.Generator) -> Tensor:
    """Leading right singular vectors (S, R) of (N, S), by a randomised range finder (Halko, Martinsson & Tropp 2011, algorithm 4.4).

    Zeros where there are fewer.
    """
    sketch = centred @ torch.randn(centred.shape[1], num_directions + OVERSAMPLED, generator=generator).to(centred.device)
    for _ in range(POWER_ITERATIONS):
        sketch = centred @ (centred.t() @ torch.linalg.qr(sketch).Q)
    projected = torch.linalg.qr(sketch).Q.t() @ centred  # (R + 16, S)
    vectors: Tensor = torch.linalg.svd(projected, full_matrices=False).Vh[:num_directions]
    return functional.pad(vectors, (0, 0, 0, num_directions - len(vectors))).t().contiguous()


def floored_log(posteriors: Tensor) -> Tensor:
    """Log of probabilities (N, S) that are at least 0.001 / S."""
    return posteriors.clamp(min=FLOOR / posteriors.shape[1]).log()
