"""Linear transforms of features: LDA, a maximum-likelihood rotation for diagonal Gaussians (MLLT), speaker adaptation (fMLLR)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from asr_kd.distributed import add_over_processes, total_over_processes
from asr_kd.hmm.gmm import GaussianMixtures, Statistics, aligned_blocks

FloatArray = NDArray[np.float64]
MIN_SPEAKER_FRAMES = 500
"""A speaker with fewer speech frames is not adapted."""
MAX_CONDITION = 1e7
"""A speaker whose statistics have a larger condition number is not adapted. Measured in 39 dimensions: some 200, and 3e6 where they are scaled from 0.1
to 10 and shifted by 3; above 2e7, by rounding alone, where a dimension is constant or a few frames repeat, so that no transform can be estimated."""


def lda(within: FloatArray, between: FloatArray, dim: int) -> Tensor:
    """(D_in, dim) projection that makes the within-class covariance the identity and orders directions by class separation.

    Directions are eigenvectors of within^-1 between (Fisher; Haeb-Umbach & Ney 1992).
    """
    size = len(within)
    lower = np.linalg.cholesky(within + 1e-6 * np.trace(within) / size * np.eye(size))
    whiten = np.linalg.inv(lower).T  # whiten.T @ within @ whiten = 1
    values, vectors = np.linalg.eigh(whiten.T @ between @ whiten)
    return torch.from_numpy((whiten @ vectors[:, np.argsort(-values)[:dim]]).astype(np.float32))


class TransformStatistics:
    """Sums for a row-wise maximum-likelihood transform of features under diagonal Gaussians (Gales 1998), addable.

    Attributes:
        outer: (D, D + 1, D + 1): for row i the sum over frames of (sum of posterior / variance_i) · [x, 1][x, 1]ᵀ.
        cross: (D, D + 1): for row i the sum over frames of (sum of posterior · mean_i / variance_i) · [x, 1].
        num_frames: frames seen.
    """

    def __init__(self, dim: int) -> None:
        self.outer = np.zeros((dim, dim + 1, dim + 1))
        self.cross = np.zeros((dim, dim + 1))
        self.num_frames = 0

    def add(self, mixtures: GaussianMixtures, raw: Tensor, frames: Tensor, states: NDArray[np.integer]) -> None:
        """Add frames (T, D), on the device of `mixtures`: posteriors from `frames` as adapted so far, sums over `raw`, the unadapted ones."""
        precisions = 1.0 / mixtures.variances
        both = functional.pad(torch.cat([precisions, precisions * mixtures.means], 1), (0, 0, 0, 1))  # (G + 1, 2 D)
        expected = frames.new_empty(len(frames) + 1, both.shape[1])
        for block in aligned_blocks(mixtures, frames, states):
            expected[block.rows] = torch.bmm(block.shares, both[block.gaussians])
        weight, target = expected[:-1].tensor_split(2, 1)
        extended = torch.cat([raw, raw.new_ones(len(raw), 1)], 1)
        self.cross += (target.T @ extended).double().cpu().numpy()
        self.outer += torch.stack([(extended * column).T @ extended for column in weight.T[:, :, None]]).double().cpu().numpy()
        self.num_frames += len(states)

    def __iadd__(self, other: TransformStatistics) -> TransformStatistics:
        self.outer += other.outer
        self.cross += other.cross
        self.num_frames += other.num_frames
        return self

    def over_processes(self) -> TransformStatistics:
        """The sums of all processes, in place."""
        add_over_processes([torch.from_numpy(self.outer), torch.from_numpy(self.cross)])
        self.num_frames = int(total_over_processes(self.num_frames)[0])
        return self


def fmllr(statistics: TransformStatistics, sweeps: int = 20) -> Tensor | None:
    """(D, D + 1) affine transform [A, b] that maximises the likelihood of a speaker's frames; None with too few frames, or too few different ones.

    Row by row with the others fixed (Gales 1998, eqs. 21-24).
    """
    if statistics.num_frames < MIN_SPEAKER_FRAMES or not _is_well_conditioned(statistics.outer):
        return None
    dim = len(statistics.cross)
    inverses = np.linalg.inv(statistics.outer)
    transform = np.eye(dim, dim + 1)
    for _ in range(sweeps):
        for i in range(dim):
            cofactor = np.append(np.linalg.inv(transform[:, :dim])[:, i], 0.0)
            transform[i] = _best_row(cofactor, inverses[i], statistics.cross[i], statistics.outer[i], statistics.num_frames)
    return torch.from_numpy(transform.astype(np.float32))


def _is_well_conditioned(matrices: FloatArray) -> bool:
    try:
        return bool(np.linalg.cond(matrices).max() < MAX_CONDITION)
    except np.linalg.LinAlgError:  # NaN or infinity
        return False


def _best_row(cofactor: FloatArray, inverse: FloatArray, cross: FloatArray, outer: FloatArray, count: float) -> FloatArray:
    """The row w that maximises count · log|cofactor · w| + cross · w - w · outer · w / 2."""
    direction = cofactor @ inverse
    a, b = float(direction @ cofactor), float(direction @ cross)
    root = np.sqrt(b * b + 4 * a * count)
    rows = [inverse @ (step * cofactor + cross) for step in ((-b + root) / (2 * a), (-b - root) / (2 * a))]

    def gain(row: FloatArray) -> float:
        return float(count * np.log(abs(cofactor @ row)) + cross @ row - 0.5 * row @ outer @ row)

    return max(rows, key=gain)


def mllt(mixtures: GaussianMixtures, statistics: Statistics, sums: TransformStatistics, sweeps: int = 10) -> Tensor:
    """(D, D) matrix A of x -> A x that makes diagonal covariances fit best (Gales 1999, semi-tied covariances).

    Args:
        mixtures: the Gaussians that both sums were made with.
        statistics: their EM statistics.
        sums: over the same frames.
    """
    dim = mixtures.dim
    means, precisions = mixtures.means.double().numpy(), 1.0 / mixtures.variances.double().numpy()
    occupancies, totals = statistics.frames.numpy(), statistics.sums.numpy()
    scatter = sums.outer[:, :dim, :dim].copy()
    for i in range(dim):
        cross = (totals * precisions[:, i : i + 1]).T @ means
        scatter[i] += (means * (occupancies * precisions[:, i])[:, None]).T @ means - cross - cross.T
    inverses = np.linalg.inv(scatter)
    matrix = np.eye(dim)
    for _ in range(sweeps):
        for i in range(dim):
            cofactor = np.linalg.inv(matrix)[:, i]
            row = cofactor @ inverses[i]
            matrix[i] = row * np.sqrt(statistics.num_frames / (row @ cofactor))
    return torch.from_numpy(matrix.astype(np.float32))
