"""The corpus and text stages: manifests, lexicon and language model of an experiment."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asr_kd.errors import AsrKdError
from asr_kd.espeak import espeak_is_installed
from asr_kd.g2p import complete_lexicon
from asr_kd.hmm.tree import check_num_states
from asr_kd.lexicon import Lexicon, read_lexicon
from asr_kd.lm import estimate_kneser_ney, read_vocabulary, text_lines, write_arpa
from asr_kd.manifest import Utterance, check_unique, find_split, load_split, read_manifest, speech_files, write_exclusions, write_manifest
from asr_kd.settings import Settings, split_name
from asr_kd.stage import Record, file_fingerprint, file_state, fingerprint, run_stage

log = logging.getLogger(__name__)

LARGEST_UNKNOWN_SHARE = 0.05  # of a split's words, without a warning


@dataclass(frozen=True)
class Corpus:
    """Transcribed speech by split, and which of it serves what.

    Attributes:
        splits: name -> usable utterances.
        train: ids of the utterances that everything is trained on.
        tuning: ids of the held-out speakers of the training splits, on whom every choice is made.
        evaluation: names of the splits that are reported.
        fingerprints: split -> identifies its transcripts and audio.
    """

    splits: dict[str, list[Utterance]]
    train: list[str]
    tuning: list[str]
    evaluation: list[str]
    fingerprints: dict[str, str]

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """Transcript of every utterance."""
        return {utterance.utt_id: utterance.words for utterances in self.splits.values() for utterance in utterances}

    @property
    def speakers(self) -> dict[str, str]:
        """Speaker of every utterance."""
        return {utterance.utt_id: utterance.spk_id for utterances in self.splits.values() for utterance in utterances}


@dataclass(frozen=True)
class Text:
    """What the aligner and the decoder know of words.

    Attributes:
        lexicon: pronunciations, generated ones included.
        arpa: path of the n-gram language model.
        fingerprint: identifies both, for the decoder; an alignment depends on less, see `pronunciations_fingerprint`.
    """

    lexicon: Lexicon
    arpa: Path
    fingerprint: str

    def pronunciations_fingerprint(self, transcripts: Iterable[Sequence[str]]) -> str:
        """Identifies what an alignment of these transcripts takes from the lexicon: their words' pronunciations, and the phones."""
        words = sorted({word for words in transcripts for word in words if word in self.lexicon})
        return fingerprint([self.lexicon.phones, [(word, self.lexicon[word]) for word in words]])


def prepare_corpus(settings: Settings, data_folder: Path) -> tuple[Corpus, Record]:
    """Write a manifest of every split, and the list of what cannot be used, to `manifests/`.

    Raises:
        AsrKdError: no such split, an utterance id in two splits, or a tuning speaker who is not in the training splits.
    """
    names = {split: split_name(split) for split in (*settings.train_splits, *settings.dev_splits, *settings.test_splits)}

    def work(folder: Path) -> None:
        for split, name in names.items():
            utterances, exclusions = load_split(split, data_folder)
            write_manifest(folder / f"{name}.csv", utterances)
            write_exclusions(folder / f"{name}.exclusions.csv", exclusions)

    folder = settings.output / "manifests"
    inputs = {name: _speech_fingerprint(split, data_folder) for split, name in names.items()}
    places = {name: find_split(split, data_folder).absolute() for split, name in names.items()}  # manifests hold absolute paths
    record = run_stage("manifests", folder, {"data_folder": data_folder.absolute(), "splits": places}, inputs, work)
    splits = {name: read_manifest(folder / f"{name}.csv") for name in names.values()}
    check_unique(utterance for utterances in splits.values() for utterance in utterances)
    in_training = [utterance for split in settings.train_splits for utterance in splits[names[split]]]
    tuning_speakers = set(settings.tuning_speakers) or choose_tuning_speakers(in_training)
    unknown = tuning_speakers - {utterance.spk_id for utterance in in_training}
    if unknown:
        raise AsrKdError(f"tuning_speakers: {', '.join(sorted(unknown))} not in {', '.join(settings.train_splits)}; choose from the spk_id column of {folder}")
    train = [utterance.utt_id for utterance in in_training if utterance.spk_id not in tuning_speakers]
    tuning = [utterance.utt_id for utterance in in_training if utterance.spk_id in tuning_speakers]
    if not train:
        raise AsrKdError("tuning_speakers: nobody is left to train on; hold out fewer")
    evaluation = [names[split] for split in (*settings.dev_splits, *settings.test_splits)]
    check_apart(in_training, {name: splits[name] for name in evaluation})
    log.info("corpus: %d utterances to train on, %d for tuning (speakers %s), %s", len(train), len(tuning), ", ".join(sorted(tuning_speakers)),
             ", ".join(f"{len(splits[name])} in {name}" for name in evaluation))
    return Corpus(splits, train, tuning, evaluation, inputs), record


def check_apart(in_training: Sequence[Utterance], evaluation: Mapping[str, Sequence[Utterance]]) -> None:
    """Raise `AsrKdError` where a reported split holds a recording of the training splits; warn of speakers that are in both."""
    trained_on = {utterance.wav: utterance.utt_id for utterance in in_training}
    speakers = {utterance.spk_id for utterance in in_training}
    for name, utterances in evaluation.items():
        for utterance in utterances:
            if utterance.wav in trained_on:
                raise AsrKdError(f"{utterance.wav}: {utterance.utt_id} of {name} and {trained_on[utterance.wav]} of the training splits, expected speech "
                                 "that was not trained on; remove it from one of them")
        if known := sorted({utterance.spk_id for utterance in utterances} & speakers):
            log.warning("%s: speakers %s%s are in the training splits too: its error rates say little about speakers never heard", name, ", ".join(known[:5]),
                        " ..." if len(known) > 5 else "")


def choose_tuning_speakers(utterances: Sequence[Utterance], share: float = 0.05) -> set[str]:
    """The speakers with least speech, at least two, until they hold `share` of it: they cost training least.

    Raises:
        AsrKdError: fewer than three speakers, or a duration that is not known (0).
    """
    seconds: dict[str, float] = {}
    for utterance in utterances:
        if not utterance.duration_s:
            raise AsrKdError(f"{utterance.utt_id}: its duration is 0, expected seconds, to find the speakers with least speech; give durations in the manifest "
                             "or choose tuning_speakers")
        seconds[utterance.spk_id] = seconds.get(utterance.spk_id, 0.0) + utterance.duration_s
    if len(seconds) < 3:
        raise AsrKdError(f"training splits hold {len(seconds)} speakers, expected 3 or more, as two are held out for tuning; "
                         "give every speaker an id of their own")
    chosen: set[str] = set()
    chosen_s, wanted_s = 0.0, share * sum(seconds.values())
    for speaker in sorted(seconds, key=lambda name: (seconds[name], name))[:-1]:
        if len(chosen) >= 2 and chosen_s >= wanted_s:
            break
        chosen.add(speaker)
        chosen_s += seconds[speaker]
    return chosen


def prepare_text(settings: Settings, corpus: Corpus, lexicon_paths: Sequence[Path], arpa: Path | None, lm_text: Path | None) -> tuple[Text, Record]:
    """Complete the lexicon for the transcripts; estimate the language model where none is given.

    Without `arpa` and `lm_text` the language model is estimated from the training transcripts. Where pronunciations are generated, all words of
    the language model get one: which words can be recognised must not depend on the transcripts of the reported splits.

    Raises:
        AsrKdError: lexicon or language model cannot be read, differ in case from each other or from the transcripts, or share no word.
    """
    folder = settings.output / "text"

    def work(folder: Path) -> None:
        utterances = [utterance for split in corpus.splits.values() for utterance in split]
        sentences = _sentences(corpus, lm_text) if arpa is None else []
        lm_words = set(read_vocabulary(arpa)) if arpa is not None else {word for sentence in sentences for word in sentence}
        lexicon = read_lexicon(lexicon_paths, settings.strip_stress)
        for name, spoken in corpus.splits.items():  # each by itself: in a small split another case would not be noticed among the words of all
            own = {word for utterance in spoken for word in utterance.words}
            lexicon.check_case(own, f"the transcripts of {name}")
            if near := lexicon.near_misses(own):
                log.warning("%s: %d words of the transcripts, such as %r, are in the lexicon but for case or punctuation; they are taken for other words. "
                            "Write the transcripts as the lexicon and the language model are", name, len(near), near[0])
        extended, generated, exclusions = complete_lexicon(lexicon, utterances, settings.unknown_words == "g2p", lm_words)
        if not any(word in extended for word in lm_words):
            raise AsrKdError(f"{arpa or lm_text or 'training transcripts'}: none of the {len(lm_words)} words (such as {min(lm_words, default='')!r}) is among "
                             f"the {len(extended)} of the lexicon (such as {min(extended)!r}), expected words in common; give both for the same language")
        for name in corpus.evaluation:
            own_words = [word for utterance in corpus.splits[name] for word in utterance.words]
            unknown = sum(word not in extended or word not in lm_words for word in own_words)
            if unknown > LARGEST_UNKNOWN_SHARE * len(own_words):
                log.warning("%s: %d of %d words (%.0f %%) are not in the lexicon and the language model, and can never be recognised; "
                            "give a larger language model or more text", name, unknown, len(own_words), 100 * unknown / len(own_words))
        extended.write(folder / "lexicon.txt")
        generated.write(folder / "lexicon_generated.txt")
        write_exclusions(folder / "without_pronunciation.csv", exclusions)
        if arpa is None:
            write_arpa(estimate_kneser_ney(sentences, settings.lm_order), folder / "lm.arpa")

    inputs = {"manifests": fingerprint(corpus.fingerprints)} | {f"lexicon {n}": file_fingerprint(path) for n, path in enumerate(lexicon_paths)}
    inputs |= {name: file_fingerprint(path) for name, path in (("lm", arpa), ("lm_text", lm_text)) if path is not None}
    inputs |= {"lm_text": fingerprint(corpus.train)} if arpa is None and lm_text is None else {}
    choices = {"strip_stress": settings.strip_stress, "unknown_words": settings.unknown_words, "lm_order": settings.lm_order if arpa is None else None}
    choices |= {"espeak": espeak_is_installed()} if settings.unknown_words == "g2p" else {}  # who installs it wants what it pronounces
    record = run_stage("text", folder, choices, inputs, work)
    path, lm = folder / "lexicon.txt", arpa or folder / "lm.arpa"
    lexicon = read_lexicon([path])
    check_num_states(settings.num_states, 1 + len(lexicon.phones))  # now, not when the tree grows
    return Text(lexicon, lm, fingerprint([file_fingerprint(path), inputs["lm"] if arpa else file_fingerprint(lm)])), record


def _sentences(corpus: Corpus, lm_text: Path | None) -> list[list[str]]:
    if lm_text is None:
        words = corpus.words
        return [list(words[utt_id]) for utt_id in corpus.train]
    return [line.split() for _, line in text_lines(lm_text) if line]


def _speech_fingerprint(split: str, data_folder: Path) -> str:
    """Identifies a split's transcripts and audio by name, size and time of the last change of each file, without reading the audio.

    Where they lie makes no difference: a corpus that is moved is the same speech.
    """
    path = find_split(split, data_folder)
    if path.is_file():
        return fingerprint([file_fingerprint(path), [file_state(utterance.wav) for utterance in read_manifest(path, data_folder)]])
    return fingerprint([[file.relative_to(path), *file_state(file)] for file in speech_files(path)])
