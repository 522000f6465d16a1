"""Compact soft targets against the distributions that they stand for, and against a plain singular value decomposition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.compact_targets import TailDirections, check_compact_size, find_tail_directions, floored_log
from asr_kd.errors import AsrKdError
from asr_kd.sparse_targets import decode, encode


def network_posteriors(num_frames: int, num_states: int, temperature: float, seed: int = 0) -> Tensor:
    """Mean of three networks' tempered posteriors: logits of rank 24 whose directions have falling variances."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, 24, num_states, generator=torch.Generator().manual_seed(99)) * torch.logspace(0.5, -1, 24)[:, None]
    inputs = torch.randn(num_frames, 24, generator=generator)
    return ((inputs @ weights) / temperature).softmax(2).mean(0)


def directions_of(posteriors: Tensor, bytes_per_frame: int = 128) -> TailDirections:
    return find_tail_directions(posteriors, bytes_per_frame, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("temperature", "times_closer"), [(2.0, 3), (5.0, 100)])
def test_closer_to_unseen_frames_than_a_sample_of_the_tail(temperature: float, times_closer: float) -> None:
    directions = directions_of(network_posteriors(2000, 400, temperature))
    unseen = network_posteriors(300, 400, temperature, seed=1)
    records = directions.encode(unseen)
    assert records.shape == (300, 64)
    assert records.dtype == torch.int16
    compact = (directions.decode(records) - unseen).square().sum(1).mean()
    sampled = (decode(encode(unseen, torch.rand(300, 2, generator=torch.Generator().manual_seed(0)), 128)).dense(400) - unseen).square().sum(1).mean()
    assert compact * times_closer < sampled


def test_bias_is_far_below_that_of_truncation() -> None:
    directions = directions_of(network_posteriors(2000, 400, 5.0))
    unseen = network_posteriors(2000, 400, 5.0, seed=1)
    top, ids = unseen.topk(32)
    truncated = torch.zeros_like(unseen).scatter(1, ids, top / top.sum(1, keepdim=True))
    bias = (directions.decode(directions.encode(unseen)) - unseen).mean(0).square().sum()
    assert bias * 1000 < (truncated - unseen).mean(0).square().sum()


def test_largest_entries_are_kept_and_rows_sum_to_one() -> None:
    posteriors = network_posteriors(500, 400, 1.0)
    found = directions_of(posteriors).decode(directions_of(posteriors).encode(posteriors))
    top, ids = posteriors.topk(16)
    torch.testing.assert_close(found.gather(1, ids), top, atol=1.01 / 65535, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(500), atol=1e-5, rtol=0)
    assert float(found.min()) >= 0


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 150), st.integers(2, 20), st.floats(0.05, 20.0), st.integers(0, 1000))
def test_any_number_of_states_and_any_temperature(num_states: int, eighths: int, temperature: float, seed: int) -> None:
    posteriors = network_posteriors(40, num_states, temperature, seed)
    directions = directions_of(posteriors, 8 * eighths)
    records = directions.encode(posteriors)
    assert records.shape == (40, 4 * eighths)
    assert directions.bytes_per_frame == 8 * eighths
    found = directions.decode(records)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.sum(1), torch.ones(40), atol=1e-4, rtol=0)
    if eighths > num_states:  # all states but one are kept as they are
        torch.testing.assert_close(found, posteriors, atol=2 / 65535, rtol=0)


def test_state_ids_use_all_sixteen_bits() -> None:
    posteriors = torch.full((3, 65536), 1e-9)
    posteriors[:, 65535], posteriors[:, 40000] = 0.75, 0.25
    posteriors /= posteriors.sum(1, keepdim=True)
    directions = TailDirections(torch.zeros(65536), torch.zeros(65536, 8), torch.ones(8), 2)
    assert directions.decode(directions.encode(posteriors))[0, [65535, 40000]].tolist() == pytest.approx([0.75, 0.25], abs=1e-3)


def test_directions_span_what_a_full_decomposition_finds() -> None:
    """Variance along the randomised directions is that along the exact leading ones, within 1 %."""
    posteriors = network_posteriors(1000, 200, 2.0)
    centred = floored_log(posteriors) - floored_log(posteriors).mean(0)
    directions = directions_of(posteriors, 32).directions  # (S, 16)
    exact = torch.linalg.svdvals(centred)[:16].square().sum()
    assert float((centred @ directions).square().sum()) > 0.99 * float(exact)
    torch.testing.assert_close(directions.t() @ directions, torch.eye(16), atol=1e-4, rtol=0)


def test_bfloat16_training_does_not_coarsen_the_targets() -> None:
    posteriors = network_posteriors(100, 200, 2.0)
    directions = directions_of(posteriors)
    records = directions.encode(posteriors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(directions.encode(posteriors), records)
        assert torch.equal(directions.decode(records), directions.decode(records.clone()))
        inside = directions.decode(records)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, directions.decode(records))


def test_saved_directions_decode_alike_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    posteriors = network_posteriors(100, 200, 2.0)
    directions = directions_of(posteriors)
    directions.save(tmp_path / "d.safetensors")
    loaded = TailDirections.load(tmp_path / "d.safetensors")
    records = directions.encode(posteriors)
    assert torch.equal(loaded.decode(records), directions.decode(records))
    whole = (tmp_path / "d.safetensors").read_bytes()
    (tmp_path / "d.safetensors").write_bytes(whole[:-100])
    with pytest.raises(AsrKdError, match="run the stage that writes it again"):
        TailDirections.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize(("bytes_per_frame", "num_states", "message"), [(12, 100, "multiple of 8"), (8, 100, "at least 16"), (128, 70_000, "dense form")])
def test_impossible_records_are_refused(bytes_per_frame: int, num_states: int, message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        check_compact_size(bytes_per_frame, num_states)
