"""Diagonal-covariance Gaussian mixtures, one per state, stored as flat arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from asr_kd.distributed import add_over_processes, total_over_processes

MIN_GAUSSIAN_FRAMES = 10.0
"""A Gaussian with a smaller share of frames is removed when the mixture is re-estimated."""
SPLIT_DISTANCE = 0.2
"""Standard deviations by which the two halves of a split Gaussian move apart."""
CACHED_CELLS = 500_000
"""Gaussians times frames that are evaluated at once, such that a core's cache holds them."""
GPU_CELLS = 50_000_000
"""The same on a GPU, where fewer, larger products are better."""
BLOCK_FRAMES = 32
"""Frames of one state whose posteriors are found together."""
PADDED_SIZES = np.asarray([1, 2, 4, *(step << shift for shift in range(20) for step in (6, 8))])
"""States are filled up to one of these numbers of Gaussians."""


@dataclass(frozen=True, eq=False)
class GaussianMixtures:
    """Gaussians of all states, those of state s at `offsets[s]:offsets[s + 1]`.

    Attributes:
        weights: (G,) share within the state; a state's weights sum to 1.
        means, variances: (G, D) float32.
        offsets: (S + 1,) int64.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    offsets: NDArray[np.int64]

    @property
    def num_states(self) -> int:
        """Number of states S."""
        return len(self.offsets) - 1

    @property
    def num_gaussians(self) -> int:
        """Number of Gaussians G."""
        return len(self.weights)

    @property
    def dim(self) -> int:
        """Dimension D."""
        return self.means.shape[1]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(S,) Gaussians per state."""
        return np.diff(self.offsets)

    def to(self, device: torch.device) -> GaussianMixtures:
        """The same with its tensors on a device."""
        return replace(self, weights=self.weights.to(device), means=self.means.to(device), variances=self.variances.to(device))

    def projection(self) -> tuple[Tensor, Tensor]:
        """(G + 1, 2 D) and (G + 1, 1) such that projection @ [x, x²] + constant is log(weight · density) of x in each Gaussian.

        The last row is a Gaussian that never scores.
        """
        precisions = 1.0 / self.variances
        linear = self.means * precisions
        constant = self.weights.clamp_min(1e-30).log() - 0.5 * (self.variances.log() + self.means * linear + math.log(2 * math.pi)).sum(1)
        none, never = linear.new_zeros(1, 2 * self.dim), constant.new_full((1,), -1e30)
        return torch.cat([torch.cat([linear, -0.5 * precisions], 1), none]), torch.cat([constant, never])[:, None]


def with_squares(frames: Tensor) -> Tensor:
    """(T, D) -> (2 D, T): frames and their squares, as `GaussianMixtures.projection` wants them."""
    return torch.cat([frames, frames.square()], 1).T


def log_likelihoods(mixtures: GaussianMixtures, projection: tuple[Tensor, Tensor], frames: Tensor, states: NDArray[np.integer]) -> Tensor:
    """Log-likelihood of frames (T, D) in the given states (U,), as (T, U).

    Only the Gaussians of these states are evaluated, on a CPU a few frames at a time. States with alike numbers of Gaussians are
    summed together, the smaller ones filled up with a Gaussian that never scores.
    """
    sizes = mixtures.sizes[states]
    padded = PADDED_SIZES[np.searchsorted(PADDED_SIZES, sizes)]
    groups = [(states[padded == size], int(size)) for size in np.unique(padded)]
    rows = torch.from_numpy(np.concatenate([_padded_rows(mixtures, group, size) for group, size in groups])).to(frames.device)
    matrix, constant = projection[0].index_select(0, rows), projection[1].index_select(0, rows)
    squared = with_squares(frames)
    step = max(16, (CACHED_CELLS if frames.device.type == "cpu" else GPU_CELLS) // len(rows) // 16 * 16)
    parts = [_group_sums(torch.addmm(constant, matrix, block), groups) for block in torch.split(squared, step, dim=1)]
    as_asked = torch.from_numpy(np.argsort(np.argsort(padded, kind="stable"))).to(frames.device)
    return torch.cat(parts, 1).index_select(0, as_asked).T


def _group_sums(joint: Tensor, groups: list[tuple[NDArray[np.integer], int]]) -> Tensor:
    """Sums over each state's Gaussians, groups one after another, (U, n) from (selected Gaussians, n)."""
    tables = torch.split(joint, [len(group) * size for group, size in groups])
    return torch.cat([_log_sum(table.view(size, len(group), -1)) for table, (group, size) in zip(tables, groups, strict=True)])


def _padded_rows(mixtures: GaussianMixtures, states: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    """Rows of the projection of all Gaussians of some states, Gaussian by Gaussian, (size * states,)."""
    index = mixtures.offsets[states][None, :] + np.arange(size)[:, None]
    return np.where(index < mixtures.offsets[states + 1], index, mixtures.num_gaussians).reshape(-1)


def _log_sum(joint: Tensor) -> Tensor:
    """Log of the sum of exp over the first axis; several times as fast as `torch.logsumexp` on a CPU.

    Shares below exp(-80) are rounded up to that: smaller numbers would be denormal, which is slow.
    """
    if len(joint) == 1:
        return joint[0]
    top = joint.amax(0)
    return (joint - top).clamp_(min=-80).exp_().sum(0).log_().add_(top)


@dataclass
class Statistics:
    """What EM needs, addable, in float64 on the CPU: share of frames (G,), weighted sums (G, D) and sums of squares (G, D), log-likelihood, frames."""

    frames: Tensor
    sums: Tensor
    squares: Tensor
    log_likelihood: float = 0.0
    num_frames: int = 0

    @staticmethod
    def zero(num_gaussians: int, dim: int) -> Statistics:
        """Nothing seen yet."""
        return Statistics(torch.zeros(num_gaussians, dtype=torch.float64), torch.zeros(num_gaussians, dim, dtype=torch.float64),
                          torch.zeros(num_gaussians, dim, dtype=torch.float64))

    def __iadd__(self, other: Statistics) -> Statistics:
        self.frames += other.frames
        self.sums += other.sums
        self.squares += other.squares
        self.log_likelihood += other.log_likelihood
        self.num_frames += other.num_frames
        return self

    def over_processes(self) -> Statistics:
        """The sums of all processes, in place."""
        add_over_processes([self.frames, self.sums, self.squares])
        self.log_likelihood, frames = total_over_processes(self.log_likelihood, self.num_frames)
        self.num_frames = int(frames)
        return self


class Blocks(NamedTuple):
    """K blocks of B frames each, filled up at the end, and the M Gaussians of the state that a block's frames are aligned to.

    Attributes:
        rows: (K, B) index of the frames; T where there is none.
        frames: (K, B, 2 D) the frames and their squares.
        gaussians: (K, M) index of the Gaussians; G where there is none.
        shares: (K, B, M) posteriors of the Gaussians, 0 where there is no frame.
        log_likelihood: of all frames together, float64 scalar.
    """

    rows: Tensor
    frames: Tensor
    gaussians: Tensor
    shares: Tensor
    log_likelihood: Tensor


def aligned_blocks(mixtures: GaussianMixtures, frames: Tensor, states: NDArray[np.integer]) -> Iterator[Blocks]:
    """Frames (T, D) aligned to `states` (T,) with their posteriors, all on the device of both, those of one state together.

    So all states with alike numbers of Gaussians take a few batched products, where one product per state would keep a GPU waiting.
    """
    matrix, constant = mixtures.projection()
    squared = functional.pad(torch.cat([frames, frames.square()], 1), (0, 0, 0, 1))  # (T + 1, 2 D)
    rows, names = _blocks_of_one_state(states)
    padded = PADDED_SIZES[np.searchsorted(PADDED_SIZES, mixtures.sizes[names])]
    step = max(1, (CACHED_CELLS if frames.device.type == "cpu" else GPU_CELLS) // (BLOCK_FRAMES * squared.shape[1]))
    for size in np.unique(padded):
        for part in np.split(own := np.flatnonzero(padded == size), range(step, len(own), step)):
            index = torch.from_numpy(rows[part]).to(frames.device)
            gaussians = torch.from_numpy(_padded_rows(mixtures, names[part], int(size)).reshape(-1, len(part)).T.copy()).to(frames.device)
            block, present = squared[index], index < len(frames)
            joint = torch.baddbmm(constant[gaussians].mT, block, matrix[gaussians].mT)  # (K, B, M)
            total = joint.logsumexp(2)
            shares = joint.sub_(total[:, :, None]).exp_().mul_(present[:, :, None])
            yield Blocks(index, block, gaussians, shares, (total * present).sum(dtype=torch.float64))


def _blocks_of_one_state(states: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """(K, B) index of frames, T where there is none, such that a row's frames have one state in `states` (T,), and the states (K,)."""
    order = np.append(np.argsort(states, kind="stable"), len(states))
    names, starts, counts = np.unique(states[order[:-1]], return_index=True, return_counts=True)
    number = -(-counts // BLOCK_FRAMES)
    of = np.repeat(np.arange(len(names)), number)
    rank = np.arange(len(of)) - (np.cumsum(number) - number)[of]
    place = (starts[of] + rank * BLOCK_FRAMES)[:, None] + np.arange(BLOCK_FRAMES)
    return order[np.where(place < (starts + counts)[of][:, None], place, len(states))], names[of]


def accumulate(mixtures: GaussianMixtures, frames: Tensor, states: NDArray[np.integer]) -> Statistics:
    """The E step for frames (T, D) aligned to `states` (T,), on the device of both."""
    num_gaussians, dim = mixtures.means.shape
    occupancies = frames.new_zeros(num_gaussians + 1, dtype=torch.float64)
    sums = frames.new_zeros(num_gaussians + 1, 2 * dim, dtype=torch.float64)
    log_likelihood = frames.new_zeros((), dtype=torch.float64)
    for block in aligned_blocks(mixtures, frames, states):
        # index_put_ adds in a fixed order on a GPU too, index_add_ does not
        occupancies.index_put_((block.gaussians,), block.shares.sum(1).double(), accumulate=True)
        sums.index_put_((block.gaussians,), torch.bmm(block.shares.mT, block.frames).double(), accumulate=True)
        log_likelihood += block.log_likelihood
    first, second = sums[:-1].cpu().tensor_split(2, 1)
    return Statistics(occupancies[:-1].cpu(), first.contiguous(), second.contiguous(), float(log_likelihood), len(states))


def estimate(mixtures: GaussianMixtures, statistics: Statistics, variance_floor: Tensor) -> GaussianMixtures:
    """The M step: Gaussians with too few frames are removed (the best of a state stays); a state never seen keeps its Gaussians."""
    state_of = torch.from_numpy(np.repeat(np.arange(mixtures.num_states), mixtures.sizes))
    per_state = torch.zeros(mixtures.num_states, dtype=torch.float64).index_add_(0, state_of, statistics.frames)
    unseen = per_state[state_of] <= 0
    share = statistics.frames.clamp_min(1e-10)[:, None]
    means = statistics.sums / share
    variances = torch.maximum(statistics.squares / share - means.square(), variance_floor.double())
    means = torch.where(unseen[:, None], mixtures.means.double(), means)
    variances = torch.where(unseen[:, None], mixtures.variances.double(), variances)
    frames = torch.where(unseen, mixtures.weights.double(), statistics.frames)
    best = torch.zeros(mixtures.num_states, dtype=torch.float64).scatter_reduce_(0, state_of, frames, "amax")
    keep = (frames >= MIN_GAUSSIAN_FRAMES) | unseen
    keep[_first_of_each(state_of, frames == best[state_of])] = True
    kept_states, kept = state_of[keep], frames[keep]
    totals = torch.zeros(mixtures.num_states, dtype=torch.float64).index_add_(0, kept_states, kept)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(kept_states.numpy(), minlength=mixtures.num_states))]).astype(np.int64)
    return GaussianMixtures((kept / totals[kept_states]).float(), means[keep].float(), variances[keep].float(), offsets)


def _first_of_each(state_of: Tensor, chosen: Tensor) -> Tensor:
    """Index of the first chosen Gaussian of each state."""
    rows = torch.nonzero(chosen)[:, 0]
    return rows[torch.from_numpy(np.unique(state_of[rows].numpy(), return_index=True)[1])]


def target_sizes(frames: NDArray[np.floating], total: int, power: float, min_frames: float) -> NDArray[np.int64]:
    """Gaussians per state, about `total` in all, in proportion to frames ** power, with at least `min_frames` frames for each Gaussian."""
    ceiling = np.maximum(np.floor(frames / min_frames), 1.0)
    low, high = 0.0, float(total)
    for _ in range(60):
        middle = 0.5 * (low + high)
        if np.clip(np.round(middle * frames**power), 1, ceiling).sum() > total:
            high = middle
        else:
            low = middle
    return np.clip(np.round(low * frames**power), 1, ceiling).astype(np.int64)


def grow(mixtures: GaussianMixtures, frames: NDArray[np.floating], total: int, *, least: NDArray[np.int64] | None = None, power: float = 0.25,
         min_frames: float = 20.0) -> GaussianMixtures:
    """Split the heaviest Gaussians of each state until it has its share of `total` (see `target_sizes`); never fewer than it has, or than `least` (S,).

    The halves move apart by a fraction of a standard deviation, so the result needs no random numbers.
    """
    targets = np.maximum(target_sizes(frames, total, power, min_frames), mixtures.sizes)
    if least is not None:
        targets = np.maximum(targets, np.minimum(least, np.floor(frames / min_frames))).astype(np.int64)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for s, target in enumerate(targets.tolist()):
        span = slice(int(mixtures.offsets[s]), int(mixtures.offsets[s + 1]))
        weights, means, variances = mixtures.weights[span], mixtures.means[span], mixtures.variances[span]
        while len(weights) < target:
            heavy = torch.argsort(weights, descending=True, stable=True)[: target - len(weights)]
            step = SPLIT_DISTANCE * variances[heavy].sqrt()
            weights = weights.index_put((heavy,), 0.5 * weights[heavy])
            weights = torch.cat([weights, weights[heavy]])
            moved = means[heavy] + step
            means = torch.cat([means.index_put((heavy,), means[heavy] - step), moved])
            variances = torch.cat([variances, variances[heavy]])
        parts.append((weights, means, variances))
    offsets = np.concatenate([[0], np.cumsum(targets)]).astype(np.int64)
    weights, means, variances = (torch.cat([part[i] for part in parts]) for i in range(3))
    return GaussianMixtures(weights, means, variances, offsets)


def single_gaussians(means: Tensor, variances: Tensor) -> GaussianMixtures:
    """One Gaussian per state from (S, D) means and variances."""
    return GaussianMixtures(torch.ones(len(means)), means.float(), variances.float(), np.arange(len(means) + 1))
