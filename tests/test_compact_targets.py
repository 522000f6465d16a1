"""Compact soft targets against the distributions that they stand for, and against a plain singular value decomposition."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd import compact_targets
from asr_kd.compact_targets import CompactCode, check_compact_size, find_compact_code, floored_log
from asr_kd.errors import AsrKdError
from asr_kd.sparse_targets import decode, encode


def network_posteriors(num_frames: int, num_states: int, temperature: float, seed: int = 0) -> Tensor:
    """Mean of three networks' tempered posteriors: logits of rank 24 whose directions have falling variances."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, 24, num_states, generator=torch.Generator().manual_seed(99)) * torch.logspace(0.5, -1, 24)[:, None]
    inputs = torch.randn(num_frames, 24, generator=generator)
    return ((inputs @ weights) / temperature).softmax(2).mean(0)


def code_of(posteriors: Tensor, bytes_per_frame: int = 128) -> CompactCode:
    return find_compact_code(posteriors, bytes_per_frame, torch.Generator().manual_seed(0))


def draws(num_frames: int, seed: int = 0) -> Tensor:
    return torch.rand(num_frames, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("temperature", "times_closer"), [(2.0, 3), (5.0, 40)])
def test_closer_to_unseen_frames_than_a_sample_of_the_tail(temperature: float, times_closer: float) -> None:
    code = code_of(network_posteriors(2000, 400, temperature))
    unseen = network_posteriors(300, 400, temperature, seed=1)
    records = code.encode(unseen, draws(300))
    assert records.shape == (300, 64)
    assert records.dtype == torch.int16
    compact = (code.decode(records) - unseen).square().sum(1).mean()
    sampled = (decode(encode(unseen, draws(300), 128)).dense(400) - unseen).square().sum(1).mean()
    assert compact * times_closer < sampled


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("bytes_per_frame", [16, 128])
def test_the_expectation_is_the_distribution(temperature: float, bytes_per_frame: int) -> None:
    """Over all uniform numbers, to 16 bits; so also where the description is of other speech."""
    code = code_of(network_posteriors(1000, 200, temperature), bytes_per_frame)
    num_draws = 2000
    uniforms = ((torch.arange(num_draws) + 0.5) / num_draws)[:, None].expand(-1, 2)
    others = torch.randn(6, 200, generator=torch.Generator().manual_seed(5)).mul(8).div(temperature).softmax(1)
    for posteriors in (*network_posteriors(6, 200, temperature, seed=1), *others):
        found = code.decode(code.encode(posteriors.expand(num_draws, -1), uniforms))
        largest_step = float((found - posteriors).abs().max())
        assert float((found.mean(0) - posteriors).abs().max()) < 3e-5 + 1.1 * largest_step / num_draws


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_decoding_equals_the_layout_worked_through_by_hand(temperature: float) -> None:
    posteriors = network_posteriors(300, 400, temperature)
    code = code_of(posteriors)
    records = code.encode(posteriors, draws(300))
    found = code.decode(records)
    assert (code.num_exact, code.num_drawn, code.bytes_per_frame) == (4, 38, 128)
    for record, distribution, own in zip(records[:5], found, posteriors, strict=False):
        octets, words = np.frombuffer(record.numpy().tobytes()[:34], np.uint8).astype(float), np.frombuffer(record.numpy().tobytes()[34:], np.uint16)
        of_eight, of_four, of_two = np.split(octets, np.cumsum([code.sizes[0], code.sizes[1] // 2]))
        levels = [of_eight - 127.5, *(level - 7.5 for octet in of_four for level in (octet % 16, octet // 16)),
                  *(octet // 4**place % 4 - 1.5 for octet in of_two for place in range(4))]
        coordinates = np.hstack(levels) * code.steps.numpy()
        units_of_log2 = (code.directions * code.steps / math.log(2)).bfloat16().double().numpy()  # (S, R)
        described = np.exp2(code.mean.double().numpy() / math.log(2) + units_of_log2 @ np.hstack(levels))
        units, mass, exact, more, less = np.split(words, [4, 5, 9, 28])
        assert len(less) == 19
        expected = described.copy()
        expected[exact] = 0
        expected *= (1 - units.sum() / 65535) / expected.sum()
        expected[exact] = units / 65535
        missing = own.numpy() - expected
        np.testing.assert_allclose(missing[exact], 0, atol=1.01 / 65535)
        np.testing.assert_allclose(mass[0] / 65535, np.abs(missing).sum() / 2, rtol=0.02, atol=1e-4)
        assert missing[more].min() > -1e-5
        assert missing[less].max() < 1e-5
        np.add.at(expected, more, mass[0] / 65535 / 19)
        np.subtract.at(expected, less, mass[0] / 65535 / 19)
        np.testing.assert_allclose(distribution.numpy(), expected, rtol=1e-3, atol=2e-5)
        errors = np.abs(described / described.sum() - own.numpy())  # the entries kept are those described worst
        assert errors[exact].min() >= np.delete(errors, exact).max() - 1e-4
        # every coordinate within half a step of the true one, but for those beyond the range
        true = (floored_log(own[None])[0] - code.mean).double().numpy() @ code.directions.double().numpy() / code.steps.numpy()
        inside = np.abs(true) < np.repeat([128, 8, 2], code.sizes)
        assert np.abs(coordinates / code.steps.numpy() - true)[inside].max() <= 0.501


def test_less_noise_than_of_a_description_by_directions_of_a_byte_each() -> None:
    posteriors, unseen = network_posteriors(4000, 400, 5.0), network_posteriors(500, 400, 5.0, seed=1)
    code = code_of(posteriors)
    centred = floored_log(posteriors) - code.mean
    leading = torch.linalg.svd(centred, full_matrices=False).Vh[:34].t()
    coarse = CompactCode(code.mean, leading, (centred @ leading).abs().amax(0) / 127, (34, 0, 0), code.num_exact, code.num_drawn)
    assert coarse.bytes_per_frame == code.bytes_per_frame
    of_code, of_coarse = ((own.decode(own.encode(unseen, draws(500))) - unseen).square().sum(1).mean() for own in (code, coarse))
    assert of_code < 0.5 * of_coarse


@pytest.mark.parametrize(("bits", "share"), [(8, 9e-5), (4, 0.01154), (2, 0.1188)])
def test_steps_leave_the_error_of_the_best_uniform_quantiser(bits: int, share: float) -> None:
    """For a Gaussian, from the tables of Max (1960): so much of the variance, whatever that is."""
    coordinates = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 30.0])
    steps, errors = compact_targets._best_steps(coordinates, bits)
    variances = coordinates.square().mean(0)
    assert ((errors / variances / share).log().abs() < 0.25).all()
    assert ((steps / variances.sqrt() / compact_targets.GAUSSIAN_STEPS[bits]).log().abs() < 0.2).all()


def test_sizes_are_those_of_least_error() -> None:
    """By trying: variances that fall by a tenth from one coordinate to the next, a bit being worth a quarter of what is lost."""
    variances = 100 * 0.9 ** np.arange(64)
    lost = np.stack([variances / 4**bits for bits in (8, 4, 2, 0)])
    found = compact_targets._best_sizes(lost, 16)
    errors = {}
    for eight, four in itertools.product(range(0, 17, 2), range(0, 33, 4)):
        if eight + four // 2 <= 16:
            own = (eight, four, 4 * (16 - eight - four // 2))
            which = np.repeat([0, 1, 2, 3], [*own, 64 - sum(own)])
            errors[own] = lost[which, np.arange(64)].sum()
    assert found == min(errors, key=errors.__getitem__)
    assert found[1] > found[0]


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 150), st.integers(2, 20), st.floats(0.05, 20.0), st.integers(0, 1000))
def test_any_number_of_states_and_any_temperature(num_states: int, eighths: int, temperature: float, seed: int) -> None:
    posteriors = network_posteriors(40, num_states, temperature, seed)
    code = code_of(posteriors, 8 * eighths)
    records = code.encode(posteriors, draws(40, seed))
    assert records.shape == (40, 4 * eighths)
    assert code.bytes_per_frame == 8 * eighths
    found = code.decode(records)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.sum(1), torch.ones(40), atol=1e-4, rtol=0)


def test_state_ids_use_all_sixteen_bits() -> None:
    posteriors = torch.full((3, 65536), 1e-9)
    posteriors[:, 65535], posteriors[:, 40000] = 0.75, 0.25
    posteriors /= posteriors.sum(1, keepdim=True)
    code = CompactCode(torch.zeros(65536), torch.zeros(65536, 9), torch.ones(9), (1, 4, 4), 2, 2)
    assert code.decode(code.encode(posteriors, draws(3)))[0, [65535, 40000]].tolist() == pytest.approx([0.75, 0.25], abs=1e-3)


def test_directions_span_what_a_full_decomposition_finds() -> None:
    """Variance along the randomised directions is that along the exact leading ones, within 2 %: they come from seven eighths of the frames."""
    posteriors = network_posteriors(1000, 200, 2.0)
    centred = floored_log(posteriors) - floored_log(posteriors).mean(0)
    directions = code_of(posteriors, 32).directions  # (S, R)
    number = directions.shape[1]
    exact = torch.linalg.svdvals(centred)[:number].square().sum()
    assert float((centred @ directions).square().sum()) > 0.98 * float(exact)
    torch.testing.assert_close(directions.t() @ directions, torch.eye(number), atol=1e-4, rtol=0)


def test_bfloat16_training_hardly_coarsens_the_targets() -> None:
    posteriors = network_posteriors(100, 200, 2.0)
    code = code_of(posteriors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        records = code.encode(posteriors, draws(100))
        inside = code.decode(records)
    assert inside.dtype == torch.float32
    outside = code.decode(records)
    assert (outside - inside).square().sum(1).mean() < 0.02 * (posteriors - outside).square().sum(1).mean()


def test_saved_codes_decode_alike_and_damaged_or_earlier_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posteriors = network_posteriors(100, 200, 2.0)
    code = code_of(posteriors)
    code.save(tmp_path / "code.safetensors")
    loaded = CompactCode.load(tmp_path / "code.safetensors")
    records = code.encode(posteriors, draws(100))
    assert torch.equal(loaded.decode(records), code.decode(records))
    whole = (tmp_path / "code.safetensors").read_bytes()
    (tmp_path / "code.safetensors").write_bytes(whole[:-100])
    with pytest.raises(AsrKdError, match="run the stage that writes it again"):
        CompactCode.load(tmp_path / "code.safetensors")
    monkeypatch.setattr(compact_targets, "LAYOUT", 2)
    code.save(tmp_path / "earlier.safetensors")
    monkeypatch.undo()
    with pytest.raises(AsrKdError, match="layout 2, expected 4; run the soft_targets stage again"):
        CompactCode.load(tmp_path / "earlier.safetensors")


@pytest.mark.parametrize(("bytes_per_frame", "num_states", "message"), [(12, 100, "multiple of 8"), (8, 100, "at least 16"), (128, 70_000, "dense form")])
def test_impossible_records_are_refused(bytes_per_frame: int, num_states: int, message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        check_compact_size(bytes_per_frame, num_states)
