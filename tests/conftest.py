"""SpeechBrain registers modules that fail when looked at (k2, which is not installed); Hypothesis looks at every loaded module."""

import sys
from pathlib import Path

import pytest
import speechbrain  # noqa: F401
from spectral_speech import LEXICON, SETTINGS, Spoken, speak
from speechbrain.utils.importutils import LazyModule

from asr_kd.hmm.aligner import Aligner
from asr_kd.hmm.train import train_gmm_hmm

for name in [name for name, module in sys.modules.items() if isinstance(module, LazyModule)]:
    del sys.modules[name]


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return speak(tmp_path_factory.mktemp("spoken") / "features", 60, 0)


@pytest.fixture(scope="session")
def trained_aligner(spoken: Spoken, tmp_path_factory: pytest.TempPathFactory) -> tuple[Aligner, Path]:
    """With the folder of its training's passes."""
    folder = tmp_path_factory.mktemp("trained")
    return train_gmm_hmm(*spoken[:3], LEXICON, SETTINGS, folder=folder), folder
