"""The feature and alignment stages of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asr_kd.corpus import Corpus, Text
from asr_kd.distributed import by_first_process, concrete_device, rank
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.evaluation import log_posteriors
from asr_kd.features import FbankOptions, Windows, extract_features
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.align import Segments, align, align_with_network, with_state_priors
from asr_kd.hmm.aligner import Aligner
from asr_kd.hmm.model import HmmModel
from asr_kd.hmm.train import GmmHmmSettings, train_gmm_hmm
from asr_kd.lexicon import SpokenWords
from asr_kd.manifest import Utterance
from asr_kd.settings import Settings
from asr_kd.stage import Record, combined, fingerprint, folder_fingerprint, run_stage

Words = Mapping[str, Sequence[str]]
AlignOne = Callable[[FrameStore, Words, Mapping[str, str], Path], object]
"""Aligns a store's utterances, given words and speakers by utterance id, into a folder."""


@dataclass(frozen=True)
class Features:
    """Log-mel features of every split.

    Attributes:
        stores: split -> store; speed-perturbed copies of a training split are "split-sp0.9".
        origin: name of a store -> its split, and the prefix of utterance and speaker ids in it.
        fingerprints: name of a store -> identifies it.
    """

    stores: dict[str, FrameStore]
    origin: dict[str, tuple[str, str]]
    fingerprints: dict[str, str]

    def names_in_training(self, corpus: Corpus) -> list[str]:
        """Names of the stores of the training splits, copies at other speeds included."""
        return [name for name, (split, _) in self.origin.items() if split not in corpus.evaluation]

    def windows(self, settings: Settings, utt_ids: Sequence[str]) -> Windows:
        """Windows of utterances that may lie in several stores; those without features are listed beside the features and left out.

        Raises:
            AsrKdError: none of them has features.
        """
        wanted = set(utt_ids)
        stores = [store for store in self.stores.values() if not wanted.isdisjoint(store.utt_ids)]
        if not stores:
            raise AsrKdError("none of the utterances asked for has features; see exclusions.csv beside the features")
        found = [utt_id for utt_id in utt_ids if any(utt_id in store for store in stores)]
        return Windows(stores, found, settings.left_context, settings.right_context, settings.device)


@dataclass(frozen=True)
class Targets:
    """HMM-state targets of every split by one alignment, and the inventory that they index.

    Attributes:
        stores: split -> (N,) state ids, as `Features.stores`.
        hmm: with priors counted on the training utterances.
        fingerprints: name of a store -> identifies it and the inventory.
    """

    stores: dict[str, FrameStore]
    hmm: HmmModel
    fingerprints: dict[str, str]

    def spoken_words(self, transcripts: Words) -> SpokenWords:
        """How words were said in some utterances, of which those without alignment count nothing."""
        spoken = SpokenWords()
        for store in self.stores.values():
            aligned = transcripts.keys() & store.utt_ids
            if aligned:  # never in copies at other speeds, which have no segments
                segments = Segments(store.folder)
                for utt_id in aligned:
                    spoken.pronunciations.update(segments.pronunciations(utt_id, transcripts[utt_id]))
                    spoken.pauses.update(segments.pauses(utt_id, transcripts[utt_id]))
        return spoken


def prepare_features(settings: Settings, corpus: Corpus) -> tuple[Features, Record]:
    """Log-mel features of every split, in `features/{split}`; the training splits also at other speeds.

    Raises:
        AsrKdError: as `asr_kd.features.extract_features`, or a folder in the way that no stage wrote.
    """
    options = fbank_options(settings)
    records, origin = {}, {}
    for name, (split, speed) in store_names(settings, corpus).items():

        def work(folder: Path, utterances: list[Utterance] = corpus.splits[split], speed: float = speed) -> None:
            extract_features(utterances, folder, options, settings.cmvn, settings.device, speed, settings.num_jobs)

        choices = {**asdict(options), "cmvn": settings.cmvn, "speed": speed}
        records[name] = run_stage("features", settings.output / "features" / name, choices, {"manifest": corpus.fingerprints[split]}, work)
        origin[name] = (split, speed_prefix(speed))
    stores = {name: FrameStore(settings.output / "features" / name) for name in records}
    return Features(stores, origin, {name: record.fingerprint for name, record in records.items()}), combined("features", records)


def fbank_options(settings: Settings) -> FbankOptions:
    """The filterbank of the features, and of the bundle that is made of a network trained on them."""
    return FbankOptions(settings.num_mels, settings.sample_rate, low_freq_hz=settings.low_freq_hz, high_freq_hz=settings.high_freq_hz)


def store_names(settings: Settings, corpus: Corpus) -> dict[str, tuple[str, float]]:
    """Names of the stores of features and targets, "split" or "split-sp0.9" -> split and speed; evaluation splits have no copies.

    Raises:
        AsrKdError: a split has the name of another one's copy.
    """
    copies = sorted(set(settings.speeds) - {1.0})
    names = {f"{split}-sp{speed:g}": (split, speed) for split in corpus.splits if split not in corpus.evaluation for speed in copies}
    taken = next((name for name in names if name in corpus.splits), None)
    if taken is not None:
        raise AsrKdError(f"{taken}: a split has the name of the copy of {names[taken][0]} at another speed; rename the split's folder or manifest")
    return {split: (split, 1.0) for split in corpus.splits} | names


def speed_prefix(speed: float) -> str:
    """What ids of utterances and speakers begin with in a copy at another speed, as in Kaldi."""
    return "" if speed == 1.0 else f"sp{speed:g}-"


def targets_folder(settings: Settings, number: int) -> Path:
    """Where the alignment number `number` lies (0: by mixtures); the last one, which all systems share, is in `targets`."""
    return settings.output / ("targets" if number == settings.network_realignments else f"targets_{number}")


def prepare_targets(settings: Settings, corpus: Corpus, text: Text, features: Features) -> tuple[Targets, Record]:
    """Train the mixture aligner on the training speakers and align every split with it.

    Raises:
        AsrKdError: nothing to train on or to decide on, or fewer `num_states` than three per phone.
    """
    gmm = GmmHmmSettings(num_states=settings.num_states, num_gaussians=settings.num_gaussians, mono_passes=settings.mono_passes, tri_passes=settings.tri_passes,
                         sat=settings.speaker_adaptation)
    splits = [split for split in corpus.splits if split not in corpus.evaluation]
    stores = [features.stores[split] for split in splits]
    words = corpus.words

    def usable_of(utt_ids: Sequence[str]) -> dict[str, Sequence[str]]:
        """The others are listed by the text stage for their words, by the feature stage for their audio."""
        pronounced = [utt_id for utt_id in utt_ids if all(word in text.lexicon for word in words[utt_id])]
        return {utt_id: words[utt_id] for utt_id in pronounced if any(utt_id in store for store in stores)}

    usable = usable_of(corpus.train)
    if corpus.tuning and not usable_of(corpus.tuning):
        raise AsrKdError(f"tuning_speakers: none of their {len(corpus.tuning)} utterances has features and pronunciations, expected some to decide on; see "
                         f"{settings.output / 'features'} and {settings.output / 'text'}, or choose other speakers")

    def work(folder: Path) -> None:
        trained = train_gmm_hmm(stores, usable, corpus.speakers, text.lexicon, gmm, folder=folder / "passes", device=settings.device)
        if rank() == 0:
            trained.save(folder / "aligner")

    inputs = {"features": fingerprint([features.fingerprints[split] for split in splits]), "lexicon": text.pronunciations_fingerprint(usable.values())}
    trained = run_stage("hmm", settings.output / "hmm", {**asdict(gmm), "train": fingerprint(sorted(usable))}, inputs, work, together=True)
    folder = settings.output / "hmm" / "aligner"
    files = by_first_process(lambda: folder_fingerprint(folder))  # another machine makes another tree from the same settings
    trained = replace(trained, inputs=trained.inputs | {"aligner": files})
    aligner = Aligner.load(folder)

    def align_one(store: FrameStore, words: Words, speakers: Mapping[str, str], folder: Path) -> object:
        return align(aligner, store, words, speakers, text.lexicon, folder, device=settings.device, resume=True)

    root = targets_folder(settings, 0)
    records = _align_all("align", root, corpus, text, features, {"hmm": trained.fingerprint}, align_one)
    return _read_targets(root, corpus, aligner.hmm, records), combined("align", {"hmm": trained, **records})


def realign(settings: Settings, corpus: Corpus, text: Text, features: Features, targets: Targets, network: Ensemble, network_fingerprint: str,
            number: int) -> tuple[Targets, Record]:
    """Align every split again by a network's posteriors over priors, as targets number `number` (see `targets_folder`).

    Raises:
        AsrKdError: a network of other states or features.
    """
    hmm, place = targets.hmm, concrete_device(settings.device)

    def align_one(store: FrameStore, words: Words, _: Mapping[str, str], folder: Path) -> object:
        def log_likelihoods(utt_id: str) -> NDArray[np.float32]:
            windows = Windows({utt_id: store}, None, settings.left_context, settings.right_context, place)
            return next(log_posteriors(network, windows))[1] - hmm.log_priors

        return align_with_network(hmm, log_likelihoods, store, words, text.lexicon, folder, device=place, resume=True)

    root = targets_folder(settings, number)
    records = _align_all("realign", root, corpus, text, features, {"network": network_fingerprint}, align_one)
    return _read_targets(root, corpus, hmm, records), combined("realign", records)


def _align_all(stage: str, root: Path, corpus: Corpus, text: Text, features: Features, inputs: Mapping[str, str], align_one: AlignOne) -> dict[str, Record]:
    """Align every split below `root`, each by what it reads alone; copies at other speeds take the alignment of their original."""
    records: dict[str, Record] = {}
    for name, store in features.stores.items():
        split, prefix = features.origin[name]

        def work(folder: Path, split: str = split, prefix: str = prefix, store: FrameStore = store) -> None:
            if prefix:
                stretch_targets(FrameStore(root / split), store, prefix, folder)
            else:
                utterances = corpus.splits[split]
                align_one(store, {u.utt_id: u.words for u in utterances}, {u.utt_id: u.spk_id for u in utterances}, folder)

        own = {"features": features.fingerprints[name]}
        if prefix:
            own["original"] = records[split].fingerprint
        else:
            own |= {**inputs, "lexicon": text.pronunciations_fingerprint(utterance.words for utterance in corpus.splits[split])}
        records[name] = run_stage(stage, root / name, {}, own, work, together=not prefix)
    return records


def stretch_targets(original: FrameStore, features: FrameStore, prefix: str, folder: Path) -> None:
    """Write state ids for a copy of some utterances at another speed, a store of () int32 like the original's, at `folder`.

    An utterance that the copy lacks is left out; the feature stage has listed it. The copy at speed r says at time t what the original
    says at r t. Frame n is centred on n shift + window / 2, so it has the state of the original's frame r (n + w) - w with
    w = window / (2 shift), rounded.
    """
    options, speed = features.attributes["options"], features.attributes["speed"]
    assert isinstance(options, dict)
    assert isinstance(speed, float)
    half_window = options["window_ms"] / options["shift_ms"] / 2
    with FrameWriter(folder, (), np.int32, original.attributes) as writer:
        for utt_id in original:
            if prefix + utt_id in features:
                frames = np.arange(features.length(prefix + utt_id))
                source = np.rint(speed * (frames + half_window) - half_window).astype(np.int64)
                writer.append(prefix + utt_id, original[utt_id][source.clip(0, original.length(utt_id) - 1)])


def _read_targets(root: Path, corpus: Corpus, hmm: HmmModel, records: Mapping[str, Record]) -> Targets:
    stores = {name: FrameStore(root / name) for name in records}
    return Targets(stores, with_state_priors(hmm, stores.values(), corpus.train), {name: record.fingerprint for name, record in records.items()})
