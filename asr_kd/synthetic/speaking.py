"""Speak a part of the synthetic corpus: `python -m asr_kd.synthetic.speaking`, with the task as JSON on standard input.

A process of its own for each part, because espeak's state carries over from utterance to utterance: in a fresh process the
same task gives the same samples. Prints the seconds of audio of each speaker when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from asr_kd.errors import AsrKdError
from asr_kd.espeak import Speech, espeak
from asr_kd.synthetic.acoustics import SAMPLE_RATE, Pcm, Room, Waveform, record, resample
from asr_kd.synthetic.times import Timed, ctm_lines, true_times
from asr_kd.synthetic.voices import Speaker

CHAPTER = "1"
BABBLE_VOICES, BABBLE_SENTENCES, BABBLE_S = 4, 3, 8
SILENCE_S = (0.15, 0.45)
PAUSE_PROBABILITY = 0.03  # after a word


@dataclass(frozen=True)
class SpeakerTask:
    """What one speaker shall say: of `sentences` as many as give `target_s` seconds, in a room whose ratio of speech to noise is drawn from `snr_db`."""

    split: str
    speaker: Speaker
    babblers: tuple[Speaker, ...]
    sentences: tuple[tuple[str, ...], ...]
    target_s: float
    snr_db: tuple[float, float]
    seed: tuple[int, ...]

    def to_json(self) -> dict[str, object]:
        """Plain values, for `from_json` in another process."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, object]) -> SpeakerTask:
        """The task that gave `values`."""
        task = SpeakerTask(**values)  # type: ignore[arg-type]
        return SpeakerTask(
            task.split, Speaker(**task.speaker), tuple(Speaker(**babbler) for babbler in task.babblers),  # type: ignore[arg-type]
            tuple(map(tuple, task.sentences)), task.target_s, task.snr_db, tuple(task.seed),
        )  # fmt: skip


def speak_as(task: SpeakerTask, folder: Path) -> float:
    """Write `folder`/SPLIT/SPEAKER, whole or not at all; seconds of audio."""
    rng = np.random.default_rng(task.seed)
    whole = folder / task.split / task.speaker.spk_id
    part = whole.with_name(f".part-{whole.name}-{os.getpid()}")
    chapter = part / CHAPTER
    chapter.mkdir(parents=True)
    stem = f"{task.speaker.spk_id}-{CHAPTER}"
    room, babble = Room.draw(task.snr_db, rng), _babble(task, rng)
    seconds, transcripts, word_lines, phone_lines = 0.0, "", "", ""
    for index, words in enumerate(task.sentences):
        if seconds >= task.target_s:
            break
        utt_id = f"{stem}-{index:04d}"
        samples, timed_words, timed_phones = _utter(task.speaker, words, room, babble, rng)
        soundfile.write(chapter / f"{utt_id}.flac", samples, SAMPLE_RATE, subtype="PCM_16")
        transcripts += f"{utt_id} {' '.join(words)}\n"
        word_lines += ctm_lines(utt_id, timed_words)
        phone_lines += ctm_lines(utt_id, timed_phones)
        seconds += samples.size / SAMPLE_RATE
    for name, text in (("trans.txt", transcripts), ("words.ctm", word_lines), ("phones.ctm", phone_lines)):
        (chapter / f"{stem}.{name}").write_text(text, encoding="utf-8")
    if whole.exists():  # a part that was cut off is spoken again from its first speaker on, for espeak's state
        shutil.rmtree(part)
    else:
        part.rename(whole)
    return seconds


def _utter(
    speaker: Speaker, words: tuple[str, ...], room: Room, babble: Waveform, rng: np.random.Generator
) -> tuple[Pcm, list[Timed], list[Timed]]:
    pauses = frozenset(np.flatnonzero(rng.random(len(words) - 1) < PAUSE_PROBABILITY).tolist())
    espeak().set_voice(speaker.voice)
    speech = _say(speaker, words, pauses)
    lead_in, lead_out = (round(seconds * speech.sample_rate) for seconds in rng.uniform(*SILENCE_S, size=2).tolist())
    clean = resample(np.pad(speech.samples, (lead_in, lead_out)), speech.sample_rate)
    timed_words, timed_phones = true_times(words, speech, lead_in / speech.sample_rate)
    return record(clean, room, babble, rng), timed_words, timed_phones


def _say(speaker: Speaker, words: tuple[str, ...], pauses: frozenset[int]) -> Speech:
    return espeak().speak(tuple(word.lower() for word in words), speaker.rate_wpm, speaker.pitch, speaker.pitch_range, pauses)


def _babble(task: SpeakerTask, rng: np.random.Generator) -> Waveform:
    """Some voices of the split, talking at once without end: each says sentences of this speaker's from its own place on."""
    size = BABBLE_S * SAMPLE_RATE
    mixture = np.zeros(size)
    for babbler in task.babblers:
        espeak().set_voice(babbler.voice)
        chosen = [task.sentences[index] for index in rng.integers(len(task.sentences), size=BABBLE_SENTENCES).tolist()]
        said = [resample(_say(babbler, words, frozenset()).samples, espeak().sample_rate) for words in chosen]
        voice = np.concatenate(said)
        mixture += np.roll(np.resize(voice, size), int(rng.integers(size))) / max(float(np.sqrt(np.mean(voice**2))), 1.0)
    return mixture


def main() -> int:
    """Speak the tasks of standard input: {"folder": ..., "tasks": [...]}; exit code 2 and one line when that fails."""
    request = json.load(sys.stdin)
    try:
        for values in request["tasks"]:
            print(speak_as(SpeakerTask.from_json(values), Path(request["folder"])), flush=True)
    except (AsrKdError, OSError, soundfile.LibsndfileError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
