"""Made-up speech whose true times are known: every phone is a spectrum of its own."""

from pathlib import Path

import numpy as np

from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.train import GmmHmmSettings
from asr_kd.lexicon import Lexicon

LEXICON = Lexicon({"BAD": (("B", "A", "D"),), "CAB": (("K", "A", "B"),), "DOE": (("D", "O"),), "OAK": (("O", "K"),), "A": (("A",), ("O",))})
SETTINGS = GmmHmmSettings(num_states=22, num_gaussians=60, mono_gaussians=40, mono_passes=8, tri_passes=3, realign_every=2, min_leaf_frames=40)

Truth = dict[str, list[tuple[str, int, int]]]
Words = dict[str, tuple[str, ...]]
Spoken = tuple[FrameStore, Words, dict[str, str], Truth]


def speak(folder: Path, number: int, seed: int, prefix: str = "utt") -> Spoken:
    """Utterances of random words; every phone is a spectrum of its own plus noise, speakers differ by an offset."""
    rng = np.random.default_rng(seed)
    spectra = {phone: np.random.default_rng(i).normal(0, 2.5, 40) - 4 * (phone == "SIL") for i, phone in enumerate(["SIL", *LEXICON.phones])}
    words: Words = {}
    truth: Truth = {}
    with FrameWriter(folder, (40,), np.float16) as writer:
        for u in range(number):
            utt_id = f"{prefix}{u:03d}"
            words[utt_id] = tuple(rng.choice(list(LEXICON), 4).tolist())
            times, phones = [], ["SIL"] * int(rng.integers(8, 16))
            for word in words[utt_id]:
                start = len(phones)
                for phone in LEXICON[word][0]:
                    phones += [phone] * int(rng.integers(5, 10))
                times.append((word, start, len(phones)))
                if rng.random() < 0.3:
                    phones += ["SIL"] * int(rng.integers(6, 12))
            phones += ["SIL"] * int(rng.integers(8, 16))
            truth[utt_id] = times
            offset = np.random.default_rng(u % 3).normal(0, 1, 40)
            writer.append(utt_id, np.stack([spectra[phone] for phone in phones]) + offset + rng.normal(0, 1, (len(phones), 40)))
    return FrameStore(folder), words, {utt_id: f"speaker{int(utt_id[-3:]) % 3}" for utt_id in words}, truth
