"""One frame's distribution in a few dozen bytes, without bias and with little noise: what main directions tell of it, and a sample of what they do not.

The logarithms of a network's posteriors over all states, seen over many frames, vary in far fewer directions than there are states:
states of the same phone rise and fall together. So a frame is described by its coordinates in the leading principal directions of
log p, the first of them in 8 bits each, many in 4, the last in 2. The few entries that this description gets most wrong are kept as they
are, and the others are scaled to the mass that these leave.

What is still wrong is drawn from: of the states that the description gives too little and of those that it gives too much, as many each
are drawn with probability proportional to the error (as `asr_kd.sparse_targets` draws from the whole tail), all of one weight. With
these added, the expectation is the distribution itself. An error without its correction would be the same in every epoch, and students learn
it: with 64 directions of 8 bits each and no draws, they lost 0.34 % frame accuracy at T = 5, at a squared error per frame of 2e-5; a sample of the whole tail,
without directions, lost 0.61 % by a noise of 1e-2. Here the noise is 1e-4 (recipes/LibriSpeech/experiments.md). Single entries may be negative; their sum is 1.

How many coordinates have how many bits is found from a sample of frames. `python -m tests.benchmarks soft_targets` measures errors, and students'
frame accuracy, on any corpus.

A record is `bytes_per_frame // 2` words of 16 bits: the coordinates of 8, 4 and 2 bits, the latter two or four to a byte, the first of them
lowest | probabilities of the J entries that are kept, in 1/65535 | mass that is drawn from on either side, in 1/65535 | ids of the J entries |
ids of the drawn states, those that get more first.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from asr_kd.errors import AsrKdError
from asr_kd.model import load_tensors, save_tensors
from asr_kd.sparse_targets import MAX_STATES, UNITS, draw, round_to_units, signed_words, unsigned_words

LAYOUT = 4
"""Records of another number are not read."""
SMALLEST_RECORD_BYTES = 16
FLOOR = 1e-3  # probabilities below this share of uniform ones are not told apart: together they hold at most this mass
BITS = (8, 4, 2)
# Of a record a quarter describes, an entry is kept as it is for every 32 bytes, and the rest is drawn: at most about twice the noise of the
# best shares, over 1,200 and 14,000 states of speech at T = 1, 2 and 5
DESCRIBING_SHARE = 0.25
BYTES_PER_EXACT = 32
GAUSSIAN_STEPS = {8: 0.0308, 4: 0.3352, 2: 0.9957}  # of a standard deviation: uniform quantisers of least squared error (Max 1960)
STEP_FACTORS = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0)  # coordinates are no Gaussians
OVERSAMPLED = 16
_MAX_LOG2 = 100.0  # far outside of what any frame has, and sums over all states stay finite
POWER_ITERATIONS = 3


@dataclass(frozen=True)
class CompactCode:
    """How distributions over S states are written.

    Attributes:
        mean: (S,) of log p.
        directions: (S, R), orthonormal columns.
        steps: (R,) unit of each coordinate.
        sizes: how many coordinates have 8, 4 and 2 bits, in this order.
        num_exact: J, entries that are kept as they are.
        num_drawn: states drawn, an even number: half of them get more, half of them less.
    """

    mean: Tensor
    directions: Tensor
    steps: Tensor
    sizes: tuple[int, ...]
    num_exact: int
    num_drawn: int

    @property
    def bytes_per_frame(self) -> int:
        return sum(self._widths) + 2 * sum(self._words)

    @property
    def _widths(self) -> list[int]:
        """Bytes of the coordinates of 8, 4 and 2 bits."""
        return [size * bits // 8 for size, bits in zip(self.sizes, BITS, strict=True)]

    @property
    def _words(self) -> list[int]:
        """Words of the exact probabilities, the drawn mass, and the ids of both."""
        return [self.num_exact, 1, self.num_exact + self.num_drawn]

    @cached_property
    def _float32(self) -> tuple[list[Tensor], Tensor]:
        """What each byte of coordinates of 8, 4 and 2 bits stands for, (256, 1), (256, 2) and (256, 4); directions times steps (R, S), for base 2.

        The latter are rounded to bfloat16, so that a description read in that type is the one whose errors were drawn from.
        """
        octets = torch.arange(256, dtype=torch.uint8, device=self.mean.device)[:, None]
        scaled = (self.directions * self.steps / math.log(2)).t().bfloat16().float().contiguous()
        return [_centre(_unpacked(octets, bits), bits) for bits in BITS], scaled

    @cached_property
    def _bfloat16(self) -> tuple[list[Tensor], Tensor]:
        tables, scaled = self._float32
        return [table.bfloat16() for table in tables], scaled.bfloat16()

    def encode(self, posteriors: Tensor, uniforms: Tensor) -> Tensor:
        """Records of distributions; the expectation of `decode(encode(p, u))` over the uniforms is p, but for the rounding to 16 bits.

        Args:
            posteriors: (N, S), non-negative, rows of sum 1.
            uniforms: (N, 2) in [0, 1), independent: for drawing states that get more, and less.

        Returns:
            (N, bytes_per_frame // 2) int16 words.
        """
        with torch.autocast(posteriors.device.type, enabled=False):
            coordinates = (floored_log(posteriors) - self.mean) @ self.directions / self.steps  # (N, R)
        levels = [_levels(own, bits) for own, bits in zip(coordinates.split_with_sizes(self.sizes, 1), BITS, strict=True)]
        octets = torch.cat([_packed(own, bits) for own, bits in zip(levels, BITS, strict=True)], 1)
        described = self._weights(octets)
        described /= described.sum(1, keepdim=True)
        exact_ids = (posteriors - described).abs_().topk(self.num_exact).indices
        exact = posteriors.gather(1, exact_ids)
        rest = (posteriors.sum(1, keepdim=True) - exact.sum(1, keepdim=True)).clamp(min=0)
        units = round_to_units(torch.cat([exact, rest], 1).double(), 0.5)[:, :-1]
        _scale_to_rest(described, exact_ids, units)
        missing = (posteriors - described).scatter_(1, exact_ids, 0.0)
        sides = [side.cumsum(1) for side in (missing.clamp(min=0), missing.neg_().clamp_(min=0))]
        mass = ((sides[0][:, -1:] + sides[1][:, -1:]) * (UNITS / 2)).round().long()
        drawn_ids = [draw(side, self.num_drawn // 2, uniforms[:, n, None]) for n, side in enumerate(sides)]
        return torch.cat([octets.view(torch.int16), *map(signed_words, (units, mass, exact_ids, *drawn_ids))], 1)

    def decode(self, records: Tensor) -> Tensor:
        """Estimates (N, S) of sum 1, float32, of the distributions in records (N, W)."""
        described, words = records.split_with_sizes([sum(self._widths) // 2, sum(self._words)], 1)
        units, mass, ids = unsigned_words(words).split_with_sizes(self._words, 1)
        weights = self._weights(described.contiguous().view(torch.uint8))
        _scale_to_rest(weights, ids[:, :self.num_exact], units)
        half = self.num_drawn // 2
        drawn = (mass / (UNITS * half)).expand(-1, half)
        return weights.scatter_add_(1, ids, torch.cat([units / UNITS, drawn, -drawn], 1))

    def _weights(self, octets: Tensor) -> Tensor:
        """(N, S) p, up to a factor per frame, that coordinates packed in bytes (N, B) describe.

        Inside bfloat16 autocast the product is made in bfloat16, which takes small half numbers as they are and rounds log p by
        less than a hundredth of what the directions lose of it.
        """
        kind = octets.device.type
        in_bfloat16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        tables, scaled = self._bfloat16 if in_bfloat16 else self._float32
        parts = zip(octets.int().split_with_sizes(self._widths, 1), tables, strict=True)
        coordinates = torch.cat([functional.embedding(own, table).flatten(1) for own, table in parts], 1)  # (N, R) in units of their steps
        with torch.autocast(kind, enabled=False):
            logs = (coordinates @ scaled).float().add_(self.mean, alpha=1 / math.log(2))
            return logs.clamp_(-_MAX_LOG2, _MAX_LOG2).exp2_()  # torch's softmax takes twice as long

    def to(self, device: torch.device) -> CompactCode:
        return replace(self, mean=self.mean.to(device), directions=self.directions.to(device), steps=self.steps.to(device))

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        notes = {"layout": str(LAYOUT), "sizes": json.dumps(self.sizes), "num_exact": str(self.num_exact), "num_drawn": str(self.num_drawn)}
        save_tensors(path, {"mean": self.mean, "directions": self.directions, "steps": self.steps}, notes)

    @classmethod
    def load(cls, path: Path) -> CompactCode:
        """Read what `save` wrote; `AsrKdError` when it is damaged or of another layout."""
        tensors, metadata = load_tensors(path)
        if metadata.get("layout") != str(LAYOUT):
            raise AsrKdError(f"{path}: layout {metadata.get('layout')}, expected {LAYOUT}; run the soft_targets stage again")
        try:
            return cls(tensors["mean"], tensors["directions"], tensors["steps"], tuple(json.loads(metadata["sizes"])), int(metadata["num_exact"]),
                       int(metadata["num_drawn"]))
        except (KeyError, ValueError) as error:
            raise AsrKdError(f"{path}: {error} missing or not a number; run the soft_targets stage again") from error


def check_compact_size(bytes_per_frame: int, num_states: int) -> None:
    """Raise `AsrKdError` unless frames over `num_states` states can be written in records of `bytes_per_frame`."""
    if bytes_per_frame < SMALLEST_RECORD_BYTES or bytes_per_frame % 8:
        raise AsrKdError(f"compact soft targets of {bytes_per_frame} bytes per frame; expected a multiple of 8, at least {SMALLEST_RECORD_BYTES}")
    if num_states > MAX_STATES:
        raise AsrKdError(f"compact soft targets over {num_states} states; state ids are stored in 16 bits, at most {MAX_STATES}: use the dense form")


def find_compact_code(posteriors: Tensor, bytes_per_frame: int, generator: torch.Generator) -> CompactCode:
    """The code of `bytes_per_frame` that tells most of distributions like those of a sample (N, S)."""
    num_exact = min(max(1, bytes_per_frame // BYTES_PER_EXACT), posteriors.shape[1] - 1)
    left = bytes_per_frame - 2 - 4 * num_exact  # for description and draws
    num_drawn = 2 * int((left - DESCRIBING_SHARE * bytes_per_frame) // 4)
    logs = floored_log(posteriors)
    mean = logs.mean(0)
    logs -= mean
    num_bytes = left - 2 * num_drawn
    with torch.autocast(posteriors.device.type, enabled=False):
        directions = _principal_directions(logs, 4 * num_bytes, generator)
        coordinates = logs @ directions  # (N, R)
    steps, errors = (torch.stack(part) for part in zip(*(_best_steps(coordinates, bits) for bits in BITS), strict=True))  # both (len(BITS), R)
    sizes = _best_sizes(torch.cat([errors, coordinates.square().mean(0)[None]]).cpu().double().numpy(), num_bytes)
    ends = np.cumsum([0, *sizes]).tolist()
    own = torch.cat([steps[k, ends[k]:ends[k + 1]] for k in range(len(BITS))])
    return CompactCode(mean, directions[:, :ends[-1]].contiguous(), own, sizes, num_exact, num_drawn)


def _best_sizes(lost: NDArray[np.float64], num_bytes: int) -> tuple[int, ...]:
    """How many coordinates to write with 8, 4 and 2 bits, in order.

    Args:
        lost: (4, R) mean squared error of each of R >= num_bytes coordinates with 8, 4, 2 bits and left out.
        num_bytes: for all of them.
    """
    sums = np.concatenate([np.zeros((len(lost), 1)), np.cumsum(lost, 1)], 1)

    def error(sizes: tuple[int, ...]) -> float:
        ends = np.cumsum([0, *sizes])
        return float(sum(own[end] - own[start] for own, start, end in zip(sums, ends, [*ends[1:], lost.shape[1]], strict=True)))

    choices = [(eight, 2 * four, 4 * (num_bytes - eight - four)) for eight in range(0, num_bytes + 1, 2) for four in range(0, num_bytes - eight + 1, 2)]
    return min((sizes for sizes in choices if sum(sizes) <= lost.shape[1]), key=error)


def _best_steps(coordinates: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Steps (R,) that write coordinates (N, R) with least squared error, and that error per coordinate (R,)."""
    deviations = coordinates.square().mean(0).sqrt()
    steps = torch.stack([(factor * GAUSSIAN_STEPS[bits] * deviations).clamp(min=1e-6) for factor in STEP_FACTORS])  # (trials, R)
    errors = torch.stack([(_centre(_levels(coordinates / own, bits), bits).mul_(own) - coordinates).square_().mean(0) for own in steps])
    best = errors.argmin(0, keepdim=True)
    return steps.gather(0, best)[0], errors.gather(0, best)[0]


def _levels(coordinates: Tensor, bits: int) -> Tensor:
    """Coordinates in units of their steps as whole numbers from 0 to 2^bits - 1, in bytes."""
    half = 2 ** (bits - 1)
    return coordinates.floor().clamp_(-half, half - 1).add_(half).to(torch.uint8)


def _centre(levels: Tensor, bits: int) -> Tensor:
    """What `_levels` was given, float32, to the nearest half number."""
    return levels.float().sub_((2**bits - 1) / 2)


def _packed(levels: Tensor, bits: int) -> Tensor:
    """Bytes (N, M bits / 8) of levels (N, M), neighbours together."""
    octets: Tensor = levels.reshape(len(levels), levels.shape[1] * bits // 8, 8 // bits) << _places(bits, levels.device)
    return octets.sum(2, dtype=torch.uint8)


def _unpacked(octets: Tensor, bits: int) -> Tensor:
    """Levels (N, M) that `_packed` was given, of bytes (N, M bits / 8)."""
    levels: Tensor = octets[:, :, None] >> _places(bits, octets.device) & 2**bits - 1
    return levels.flatten(1)


def _places(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _scale_to_rest(weights: Tensor, exact_ids: Tensor, units: Tensor) -> None:
    """Make weights (N, S) zero at the exact entries (N, J), and of the sum that these leave elsewhere, in place."""
    weights.scatter_(1, exact_ids, 0.0)
    rest = (UNITS - units.sum(1, keepdim=True)) / UNITS
    weights.mul_(rest / weights.sum(1, keepdim=True))


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
