"""Mixtures, EM and transforms against direct formulas."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from asr_kd.hmm import gmm
from asr_kd.hmm.gmm import GaussianMixtures, accumulate, estimate, grow, log_likelihoods, target_sizes
from asr_kd.hmm.transforms import TransformStatistics, fmllr, lda, mllt


def random_mixtures(seed: int, num_states: int, dim: int) -> GaussianMixtures:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (num_states,), generator=generator).numpy()
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    weights = torch.cat([torch.rand(size, generator=generator).add(0.1) for size in sizes.tolist()])
    for start, end in itertools.pairwise(offsets):
        weights[start:end] /= weights[start:end].sum()
    means = 2 * torch.randn(len(weights), dim, generator=generator)
    return GaussianMixtures(weights, means, torch.rand(len(weights), dim, generator=generator) + 0.3, offsets)


def direct(mixtures: GaussianMixtures, state: int) -> MixtureSameFamily:
    span = slice(int(mixtures.offsets[state]), int(mixtures.offsets[state + 1]))
    components = Independent(Normal(mixtures.means[span].double(), mixtures.variances[span].double().sqrt()), 1)
    return MixtureSameFamily(Categorical(mixtures.weights[span].double()), components)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 40))
def test_log_likelihoods_equal_torch_distributions(seed: int, num_states: int, num_frames: int) -> None:
    mixtures = random_mixtures(seed, 8, 5)
    frames = torch.randn(num_frames, 5, generator=torch.Generator().manual_seed(seed))
    states = np.random.default_rng(seed).permutation(8)[:num_states]
    found = log_likelihoods(mixtures, mixtures.projection(), frames, states)
    expected = torch.stack([direct(mixtures, int(s)).log_prob(frames.double()) for s in states], 1)
    assert torch.allclose(found.double(), expected, atol=1e-3, rtol=1e-4)


def test_log_likelihoods_of_blocks_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mixtures = random_mixtures(3, 8, 5)
    frames = torch.randn(100, 5, generator=torch.Generator().manual_seed(3))
    whole = log_likelihoods(mixtures, mixtures.projection(), frames, np.arange(8))
    monkeypatch.setattr(gmm, "CACHED_CELLS", 1)
    assert torch.allclose(log_likelihoods(mixtures, mixtures.projection(), frames, np.arange(8)), whole, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 100), st.sampled_from([1, 1000, gmm.CACHED_CELLS]), st.sampled_from([3, gmm.BLOCK_FRAMES]))
def test_statistics_equal_sums_over_frames(seed: int, num_frames: int, cells: int, block_frames: int) -> None:
    mixtures = random_mixtures(seed, 6, 2)
    generator = torch.Generator().manual_seed(seed)
    frames, raw = torch.randn(num_frames, 2, generator=generator), torch.randn(num_frames, 2, generator=generator)
    states = torch.randint(0, 5, (num_frames,), generator=generator).numpy()  # state 5 never occurs, others need not
    with mock.patch.object(gmm, "CACHED_CELLS", cells), mock.patch.object(gmm, "BLOCK_FRAMES", block_frames):
        statistics, transform = accumulate(mixtures, frames, states), TransformStatistics(2)
        transform.add(mixtures, raw, frames, states)
    share, sums, squares, total = torch.zeros(mixtures.num_gaussians), torch.zeros_like(mixtures.means), torch.zeros_like(mixtures.means), 0.0
    outer, cross = torch.zeros(2, 3, 3), torch.zeros(2, 3)
    for x, y, s in zip(frames, raw, states.tolist(), strict=True):
        span = range(int(mixtures.offsets[s]), int(mixtures.offsets[s + 1]))
        extended = torch.cat([y, torch.ones(1)])
        densities = {g: float(mixtures.weights[g]) * math.exp(float(Normal(mixtures.means[g], mixtures.variances[g].sqrt()).log_prob(x).sum())) for g in span}
        for g, density in densities.items():
            posterior = density / sum(densities.values())
            share[g] += posterior
            sums[g] += posterior * x
            squares[g] += posterior * x**2
            outer += posterior / mixtures.variances[g][:, None, None] * torch.outer(extended, extended)
            cross += torch.outer(posterior * mixtures.means[g] / mixtures.variances[g], extended)
        total += math.log(sum(densities.values()))
    assert torch.allclose(statistics.frames.float(), share, atol=1e-3)
    assert torch.allclose(statistics.sums.float(), sums, atol=1e-3)
    assert torch.allclose(statistics.squares.float(), squares, atol=1e-3)
    assert statistics.log_likelihood == pytest.approx(total, abs=1e-2)
    assert statistics.num_frames == transform.num_frames == num_frames
    np.testing.assert_allclose(transform.outer, outer.numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(transform.cross, cross.numpy(), rtol=1e-4, atol=1e-3)


def test_statistics_take_few_operations_however_many_the_states() -> None:
    """A GPU would wait for each of them."""

    def operations(num_states: int) -> int:
        mixtures = random_mixtures(0, num_states, 2)
        states = np.repeat(np.arange(num_states), 10)
        with torch.profiler.profile() as profile:
            accumulate(mixtures, torch.randn(len(states), 2, generator=torch.Generator().manual_seed(0)), states)
        return len(profile.events())

    assert operations(1000) < 2 * operations(20)


def drawn(mixtures: GaussianMixtures, states: np.ndarray, generator: torch.Generator) -> Tensor:
    """A frame from each state's mixture."""
    frames = torch.empty(len(states), mixtures.dim)
    for state in range(mixtures.num_states):
        rows = np.flatnonzero(states == state)
        start, end = int(mixtures.offsets[state]), int(mixtures.offsets[state + 1])
        chosen = start + torch.multinomial(mixtures.weights[start:end], len(rows), replacement=True, generator=generator)
        frames[rows] = mixtures.means[chosen] + mixtures.variances[chosen].sqrt() * torch.randn(len(rows), mixtures.dim, generator=generator)
    return frames


def mixed_frames(seed: int, number: int, dim: int) -> tuple[Tensor, np.ndarray]:
    """Frames of two states, each of three clusters."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(0, 2, (number,), generator=generator)
    cluster = torch.randint(0, 3, (number,), generator=generator)
    centres = 3 * torch.randn(2, 3, dim, generator=generator)
    return centres[states, cluster] + torch.randn(number, dim, generator=generator), states.numpy()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_em_never_lowers_the_likelihood(seed: int) -> None:
    frames, states = mixed_frames(seed, 600, 3)
    mixtures = grow(gmm.single_gaussians(frames.mean(0).expand(2, -1), frames.var(0).expand(2, -1)), np.asarray([300.0, 300.0]), 6)
    floor = torch.full((3,), 1e-4)
    history = []
    for _ in range(8):
        statistics = accumulate(mixtures, frames, states)
        history.append(statistics.log_likelihood)
        before = mixtures.num_gaussians
        mixtures = estimate(mixtures, statistics, floor)
        if mixtures.num_gaussians < before:
            history = []  # removing a Gaussian is no step of EM
    assert all(later >= earlier - 1e-2 for earlier, later in itertools.pairwise(history))


def test_estimate_keeps_unseen_states_and_the_best_gaussian() -> None:
    mixtures = GaussianMixtures(torch.tensor([0.5, 0.5, 1.0]), torch.tensor([[0.0], [1.0], [9.0]]), torch.ones(3, 1), np.asarray([0, 2, 3]))
    frames = torch.tensor([[0.0], [0.2], [0.1]])
    new = estimate(mixtures, accumulate(mixtures, frames, np.zeros(3, np.int64)), torch.full((1,), 0.01))
    assert new.offsets.tolist() == [0, 1, 2]
    assert new.weights.tolist() == [1.0, 1.0]
    assert new.means[1].item() == 9.0
    assert new.means[0].item() == pytest.approx(0.1, abs=0.1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=30), st.integers(1, 300))
def test_target_sizes_keep_the_total_and_the_frames_per_gaussian(frames: list[float], total: int) -> None:
    counts = np.asarray(frames)
    sizes = target_sizes(counts, total, 0.25, 20.0)
    assert (sizes >= 1).all()
    assert (sizes <= np.maximum(counts / 20.0, 1)).all()
    assert sizes.sum() <= max(total, len(frames))


def test_grow_splits_heavy_gaussians_and_keeps_the_mean() -> None:
    mixtures = random_mixtures(0, 4, 3)
    grown = grow(mixtures, np.asarray([1000.0, 1000.0, 1000.0, 1000.0]), 24)
    assert (grown.sizes >= mixtures.sizes).all()
    assert grown.sizes.sum() >= 20
    for state in range(4):
        old, new = (slice(int(m.offsets[state]), int(m.offsets[state + 1])) for m in (mixtures, grown))
        assert grown.weights[new].sum().item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(grown.weights[new] @ grown.means[new], mixtures.weights[old] @ mixtures.means[old], atol=1e-4)


def test_fmllr_recovers_an_affine_distortion() -> None:
    """Frames drawn from the mixtures, then distorted by y = (x - b) A^-1: adaptation must come back to nearly the undistorted likelihood."""
    mixtures = random_mixtures(5, 12, 3)
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0, 12, (6000,), generator=generator).numpy()
    clean = drawn(mixtures, states, generator)
    matrix, offset = torch.tensor([[1.2, 0.1, 0.0], [0.0, 0.9, -0.1], [0.1, 0.0, 1.1]]), torch.tensor([0.3, -0.2, 0.1])
    heard = (clean - offset) @ torch.linalg.inv(matrix).T
    transform = torch.eye(3, 4)
    for _ in range(8):
        sums = TransformStatistics(3)
        sums.add(mixtures, heard, heard @ transform[:, :3].T + transform[:, 3], states)
        estimated = fmllr(sums)
        assert estimated is not None
        transform = estimated

    def per_frame(a: Tensor, b: Tensor) -> float:
        statistics = accumulate(mixtures, heard @ a.T + b, states)
        return statistics.log_likelihood / len(states) + float(torch.linalg.slogdet(a)[1])

    assert torch.allclose(transform[:, :3], matrix, atol=0.08)
    assert torch.allclose(transform[:, 3], offset, atol=0.08)
    assert per_frame(transform[:, :3], transform[:, 3]) >= per_frame(matrix, offset) - 1e-3
    assert per_frame(torch.eye(3), torch.zeros(3)) < per_frame(matrix, offset) - 0.01


def test_fmllr_leaves_speakers_with_little_speech_alone() -> None:
    mixtures = random_mixtures(5, 2, 3)
    sums = TransformStatistics(3)
    frames = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    sums.add(mixtures, frames, frames, np.zeros(20, np.int64))
    assert fmllr(sums) is None


def test_fmllr_leaves_speakers_with_degenerate_features_alone() -> None:
    mixtures = random_mixtures(5, 4, 3)
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0, 4, (2000,), generator=generator).numpy()
    ordinary = drawn(mixtures, states, generator)
    constant, broken = ordinary.clone(), ordinary.clone()
    constant[:, 1] = 0.3
    broken[7, 0] = torch.nan

    def transform(raw: Tensor) -> Tensor | None:
        sums = TransformStatistics(3)
        sums.add(mixtures, raw, ordinary, states)
        return fmllr(sums)

    assert transform(ordinary) is not None
    assert transform(ordinary * torch.tensor([0.1, 1.0, 10.0]) + 3) is not None
    for degenerate in (torch.zeros(2000, 3), constant, ordinary[:2].repeat(1000, 1), broken):
        assert transform(degenerate) is None


def test_mllt_makes_correlated_dimensions_independent() -> None:
    """One state whose frames are a rotation of independent dimensions: log-determinant plus likelihood must reach the full-covariance optimum."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.8], [-0.2, 1.0]])
    frames = torch.randn(4000, 2, generator=generator) @ mixing.T
    states = np.zeros(4000, np.int64)
    mixtures = gmm.single_gaussians(frames.mean(0)[None], frames.var(0, correction=0)[None])
    gain = []
    total = torch.eye(2)
    for _ in range(2):
        turned = frames @ total.T
        statistics, sums = accumulate(mixtures, turned, states), TransformStatistics(2)
        sums.add(mixtures, turned, turned, states)
        matrix = mllt(mixtures, statistics, sums)
        total = matrix @ total
        turned = frames @ total.T
        mixtures = gmm.single_gaussians(turned.mean(0)[None], turned.var(0, correction=0)[None])
        gain.append(accumulate(mixtures, turned, states).log_likelihood / 4000 + float(torch.linalg.slogdet(total)[1]))
    full = torch.distributions.MultivariateNormal(frames.mean(0), torch.cov(frames.T, correction=0)).log_prob(frames).mean()
    assert gain[0] == pytest.approx(gain[1], abs=1e-4)
    assert gain[-1] == pytest.approx(float(full), abs=1e-3)


def test_lda_whitens_within_classes_and_orders_by_separation() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    within, between = root @ root.T + np.eye(4), np.diag([5.0, 0.0, 1.0, 0.1])
    projection = lda(within, between, 3).double().numpy()
    assert np.allclose(projection.T @ within @ projection, np.eye(3), atol=1e-3)
    separation = projection.T @ between @ projection
    assert np.allclose(separation, np.diag(np.diag(separation)), atol=1e-3)
    assert np.allclose(np.diag(separation), np.sort(np.linalg.eigvals(np.linalg.solve(within, between)).real)[::-1][:3], atol=1e-3)
