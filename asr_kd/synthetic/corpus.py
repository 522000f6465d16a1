"""Make the synthetic corpus: plan who says what, have it spoken by as many processes as wanted, write lexicon and text beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import asr_kd
from asr_kd.errors import AsrKdError
from asr_kd.espeak import espeak
from asr_kd.progress import progress
from asr_kd.stage import run_stage, write_text
from asr_kd.synthetic.grammar import distinct_sentences, vocabulary
from asr_kd.synthetic.phones import observed_lexicon
from asr_kd.synthetic.speaking import BABBLE_VOICES, CHAPTER, SpeakerTask
from asr_kd.synthetic.voices import ACCENTS, Speaker, draw_speakers

MINUTES = {"train": 40.0, "dev": 5.0, "test": 8.0}
SNR_DB = (15.0, 30.0)
SPEAKER_S = 40.0  # speech per speaker, so that 40 minutes have 60 speakers
SHORTEST_SENTENCE_S = 1.2  # plan more sentences than any speaker needs
PART_S = 240.0  # speech per process: the unit of resuming
LM_SENTENCES = 20_000
LEXICON_SENTENCES = 500


@dataclass(frozen=True)
class SyntheticCorpus:
    """Where everything is: `data_folder`/SPLIT in the LibriSpeech layout; times as CTM files per split."""

    data_folder: Path
    splits: tuple[str, ...]

    @property
    def lexicon(self) -> Path:
        """Pronunciations of every word, `WORD P1 P2 ...`."""
        return self.data_folder / "lexicon.txt"

    @property
    def lm_text(self) -> Path:
        """Sentences to estimate a language model from, one per line; none of them is in dev or test."""
        return self.data_folder / "lm_text.txt"

    def word_times(self, split: str) -> Path:
        """True times of the words of a split, for `read_ctm`."""
        return self.data_folder / "times" / f"{split}.words.ctm"

    def phone_times(self, split: str) -> Path:
        """True times of the phones of a split, for `read_ctm`."""
        return self.data_folder / "times" / f"{split}.phones.ctm"


def make_corpus(
    folder: Path | str, *, minutes: Mapping[str, float] | None = None, seed: int = 0, num_jobs: int = 1, snr_db: tuple[float, float] = SNR_DB
) -> SyntheticCorpus:
    """Make the corpus in `folder`, or find it there; one that was cut off is continued. The same seed gives the same bytes.

    Voices (espeak's variants) and sentences of a split occur in no other. 50 minutes of audio took 23 s of one core:
    `time python data_prep/synthetic.py FOLDER --minutes train=40 dev=4 test=6`.

    Args:
        folder: new, empty, or of an earlier call; one of other settings is made anew.
        minutes: split -> minutes of audio, `MINUTES` unless given; the splits' names are free.
        seed: decides voices, sentences, pauses and noise.
        num_jobs: processes to speak at once; no influence on the result.
        snr_db: lowest and highest ratio of speech to noise; each speaker draws one, and white, pink or babble noise.

    Raises:
        AsrKdError: espeak-ng is not installed, the folder holds something else, or the disk is full.
    """
    folder = Path(folder)
    minutes = dict(minutes or MINUTES)
    if not minutes or min(minutes.values()) <= 0:
        raise AsrKdError(f"synthetic corpus: minutes {minutes}, expected a positive number for each split; give at least 0.1")
    settings = {"minutes": minutes, "seed": seed, "snr_db": list(snr_db)}
    run_stage("synthetic", folder, settings, {"espeak": espeak().version}, lambda into: _make(into, minutes, seed, num_jobs, snr_db))
    return SyntheticCorpus(folder, tuple(minutes))


def _make(folder: Path, minutes: dict[str, float], seed: int, num_jobs: int, snr_db: tuple[float, float]) -> None:
    for leftover in folder.glob("*/.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    rng = np.random.default_rng([seed, 0])
    speakers = draw_speakers({split: _num_speakers(target) for split, target in minutes.items()}, rng)
    tasks, taken = [], set[tuple[str, ...]]()
    for split, target in minutes.items():
        tasks += _tasks(split, speakers[split], target * 60, seed, snr_db, rng, taken)
    _speak(folder, tasks, num_jobs)
    lm_sentences = distinct_sentences(rng, LM_SENTENCES, taken)
    write_text(folder / "lm_text.txt", "".join(" ".join(words) + "\n" for words in lm_sentences))
    _write_lexicon(folder, lm_sentences)
    for split in minutes:
        for kind in ("words", "phones"):
            files = sorted((folder / split).glob(f"*/{CHAPTER}/*.{kind}.ctm"))
            write_text(folder / "times" / f"{split}.{kind}.ctm", "".join(path.read_text(encoding="utf-8") for path in files))
    _write_speakers(folder, tasks)


def _num_speakers(minutes: float) -> int:
    return max(2, round(minutes * 60 / SPEAKER_S))


def _tasks(
    split: str, speakers: list[Speaker], target_s: float, seed: int, snr_db: tuple[float, float], rng: np.random.Generator, taken: set[tuple[str, ...]]
) -> list[SpeakerTask]:
    share_s = target_s / len(speakers)
    tasks = []
    for index, speaker in enumerate(speakers):
        sentences = tuple(distinct_sentences(rng, int(share_s / SHORTEST_SENTENCE_S) + 2, taken))
        babblers = tuple(speakers[(index + step) % len(speakers)] for step in range(1, BABBLE_VOICES + 1))
        tasks.append(SpeakerTask(split, speaker, babblers, sentences, share_s, snr_db, (seed, int(speaker.spk_id))))
    return tasks


def _speak(folder: Path, tasks: list[SpeakerTask], num_jobs: int) -> None:
    parts = [part for part in _parts(tasks) if not all((folder / task.split / task.speaker.spk_id).is_dir() for task in part)]
    total_s = sum(task.target_s for part in parts for task in part)
    with progress(desc="speaking", total=round(total_s), unit="s") as bar, ThreadPoolExecutor(max(1, num_jobs)) as pool:
        try:
            for _ in pool.map(lambda part: _speak_part(folder, part, bar), parts):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _parts(tasks: list[SpeakerTask]) -> list[list[SpeakerTask]]:
    """Tasks grouped for one process each, the same whatever the number of jobs."""
    parts: list[list[SpeakerTask]] = []
    for task in tasks:
        if not parts or sum(other.target_s for other in parts[-1]) + task.target_s > PART_S:
            parts.append([])
        parts[-1].append(task)
    return parts


def _speak_part(folder: Path, part: list[SpeakerTask], bar: Any) -> None:
    request = json.dumps({"folder": str(folder), "tasks": [task.to_json() for task in part]})
    package_root = str(Path(asr_kd.__file__).parents[1])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # one thread: many small transforms, and as many processes as wanted
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "asr_kd.synthetic.speaking"], input=request, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        raise AsrKdError(f"{folder}: speaking {part[0].split} {part[0].speaker.spk_id} to {part[-1].speaker.spk_id} failed ({reason}); "
                         "mend the cause and run again, whole speakers are kept")
    bar.update(round(sum(map(float, done.stdout.split()))))


def _write_lexicon(folder: Path, lm_sentences: list[tuple[str, ...]]) -> None:
    """Pronunciations from the first sentences of the text in every accent, and from more where words are still missing."""
    sample, unseen = lm_sentences[:LEXICON_SENTENCES], set(vocabulary())
    unseen -= {word for words in sample for word in words}
    for words in lm_sentences[LEXICON_SENTENCES:]:
        if not unseen.isdisjoint(words):
            sample.append(words)
            unseen -= set(words)
    observed_lexicon(sample, ACCENTS).write(folder / "lexicon.txt")


def _write_speakers(folder: Path, tasks: list[SpeakerTask]) -> None:
    lines = [";ID | SEX | SUBSET | MINUTES | NAME\n"]
    lines += [f"{task.speaker.spk_id} | {task.speaker.sex} | {task.split} | {task.target_s / 60:.2f} | {task.speaker.voice}\n" for task in tasks]
    write_text(folder / "SPEAKERS.TXT", "".join(lines))
