"""The HMM's states and transitions, and the features that it hears."""

from pathlib import Path

import numpy as np
import pytest
import torch
from spectral_speech import Spoken

from asr_kd.errors import AsrKdError
from asr_kd.hmm.aligner import learn_transitions
from asr_kd.hmm.features import joined
from asr_kd.hmm.frontend import Frontend, add_deltas, dct_matrix, splice
from asr_kd.hmm.model import EDGE, SIL, HmmModel, context_codes, untied_model
from asr_kd.stage import write_json


def test_transitions_are_counted_by_hand() -> None:
    """Silence, A, silence; and A, A: three words, so one gap between words, without a silence in it."""
    hmm = untied_model(("SIL", "A"))
    sil, first, second = (context_codes(*triple, 2) for triple in ((EDGE, SIL, EDGE), (SIL, 2, SIL), (2, 2, EDGE)))
    a = np.repeat(np.concatenate([sil, first, sil]), [2, 1, 1, 1, 3, 1, 1, 1, 2])
    b = np.repeat(np.concatenate([first, second]), [1, 1, 1, 2, 1, 1])
    learned = learn_transitions(hmm, [a, b], 3)
    visits, frames = np.array([2, 2, 2, 3, 3, 3]), np.array([3, 2, 3, 4, 5, 3])
    leave = (visits + 1) / (frames + 2)
    assert np.allclose(np.exp(learned.log_advance), [0.1, 0.1, 0.1, *leave[3:]], atol=1e-6)  # silence lasts 30 frames or more on average
    assert np.allclose(np.exp(learned.log_advance) + np.exp(learned.log_self_loop), 1)
    assert learned.log_optional_silence == pytest.approx(np.log(1 / 3))  # (0 silences + 1) / (1 gap + 2)
    assert np.allclose(np.exp(learned.log_priors), frames / frames.sum(), atol=1e-6)


def test_hmm_model_checks_and_round_trip(tmp_path: Path) -> None:
    hmm = untied_model(("SIL", "A", "B"))
    hmm.save(tmp_path)
    loaded = HmmModel.load(tmp_path)
    assert loaded.phones == hmm.phones
    assert loaded.num_states == 9
    assert np.array_equal(loaded.state_ids([0, 1], [2, 3], [3, 0]), [[3, 4, 5], [6, 7, 8]])
    with pytest.raises(AsrKdError, match=r"centre phone ids 0\.\.0, expected 1\.\.3"):
        hmm.state_ids(1, 0, 1)
    write_json(tmp_path / "hmm.json", {"log_optional_silence": -1.0})
    with pytest.raises(AsrKdError, match=r"not an HMM of this version \(KeyError\('phones'\)\)"):
        HmmModel.load(tmp_path)
    with pytest.raises(AsrKdError, match=r"lexicon: 501 phones with silence, expected at most 500"):
        untied_model(("SIL", *map(str, range(500))))


def test_frontend_equals_slow_formulas(spoken: Spoken) -> None:
    store, words, speakers, _ = spoken
    dct = dct_matrix(40).double().numpy()
    assert np.allclose(dct.T @ dct, np.eye(13), atol=1e-6)
    utt_id = next(iter(words))
    own = [u for u in words if speakers[u] == speakers[utt_id]]
    frontend = Frontend.of(joined(store), speakers, list(words))
    raw = store[utt_id].astype(np.float64) @ dct
    mean = np.concatenate([store[u].astype(np.float64) for u in own]).mean(0) @ dct
    cepstra = frontend.cepstra(utt_id)
    assert np.allclose(cepstra.numpy(), raw - mean, atol=2e-3)
    deltas = add_deltas(cepstra)
    at = [min(max(t, 0), len(cepstra) - 1) for t in range(-2, 3)]
    assert torch.allclose(deltas[0, 13:26], sum(k * cepstra[at[k + 2]] for k in range(-2, 3)) / 10, atol=1e-4)
    assert torch.equal(splice(cepstra)[5, :13], cepstra[1])
    assert torch.equal(splice(cepstra)[0, :13], cepstra[0])
    transform = torch.cat([2 * torch.eye(39), torch.ones(39, 1)], 1)
    adapted = frontend.adapted({speakers[utt_id]: transform})
    assert torch.allclose(adapted.frames(utt_id), 2 * deltas + 1, atol=1e-4)
