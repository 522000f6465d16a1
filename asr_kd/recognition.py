"""The decoding stages: graph, choice of scales on the tuning speakers, hypotheses of every system on every split."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from asr_kd.corpus import Corpus, Text
from asr_kd.decode import DecodeSettings, Hypothesis, Utterances, decode, read_trn, real_time_factor, tune, unfinished_utterances, write_trn
from asr_kd.ensemble import Ensemble
from asr_kd.evaluation import log_posteriors
from asr_kd.features import Windows
from asr_kd.graph import GraphSettings, build_graph
from asr_kd.hmm.model import HmmModel
from asr_kd.settings import Settings
from asr_kd.stage import RECORD, Record, read_json, remove_folder, run_stage, write_json
from asr_kd.targets import Features, Targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recogniser:
    """A graph with the scales that were chosen for it.

    Attributes:
        graph: folder of the graph.
        hmm: gives the priors.
        decoding: scales, beam.
        fingerprint: identifies all of it.
    """

    graph: Path
    hmm: HmmModel
    decoding: DecodeSettings
    num_jobs: int
    fingerprint: str

    def __call__(self, utterances: Utterances, total: int | None = None) -> dict[str, Hypothesis]:
        """Decode (utt_id, (T, S) log posteriors)."""
        return decode(self.graph, utterances, self.hmm.log_priors, self.decoding, self.num_jobs, total)


def prepare_graph(settings: Settings, corpus: Corpus, text: Text, targets: Targets, targets_fingerprint: str) -> Record:
    """Build the decoding graph; how probable a word's pronunciations are, and silence after it, is counted in the aligned training speech."""
    choices = GraphSettings()

    def work(folder: Path) -> None:
        words = corpus.words
        spoken = targets.spoken_words({utt_id: words[utt_id] for utt_id in corpus.train})
        build_graph(text.lexicon, text.arpa, targets.hmm, folder, choices, spoken)

    return run_stage("graph", settings.output / "graph", asdict(choices), {"text": text.fingerprint, "hmm": targets_fingerprint}, work)


def tune_decoding(settings: Settings, graph: Record, hmm: HmmModel, network: Ensemble, network_fingerprint: str, windows: Windows,
                  corpus: Corpus) -> tuple[Recogniser, Record]:
    """Choose acoustic scale and word insertion penalty on the tuning speakers by one teacher alone; they then serve every system.

    Args:
        windows: of the tuning speakers' utterances; at most `tuning_utterances` of them are decoded, evenly drawn.
    """
    chosen = windows.utt_ids[::max(1, -(-len(windows.utt_ids) // settings.tuning_utterances))]
    words = corpus.words
    middle = sorted(settings.acoustic_scales)[len(settings.acoustic_scales) // 2]
    start = DecodeSettings(acoustic_scale=middle, beam=settings.beam, max_active=settings.max_active)

    def work(folder: Path) -> None:
        candidates = {"acoustic_scale": settings.acoustic_scales, "word_insertion_penalty": settings.word_insertion_penalties}
        tuning = tune(settings.output / "graph", lambda: log_posteriors(network, windows, chosen), {utt_id: words[utt_id] for utt_id in chosen},
                      hmm.log_priors, candidates, start, settings.num_jobs)
        tried = [{**asdict(tried), **errors.as_json()} for tried, errors in tuning.tried]
        write_json(folder / "tuning.json", {"chosen": asdict(tuning.settings), "tried": tried, "utterances": chosen})

    choices = {"start": asdict(start), "scales": settings.acoustic_scales, "penalties": settings.word_insertion_penalties, "utterances": chosen}
    folder = settings.output / "tuning"
    record = run_stage("tuning", folder, choices, {"graph": graph.fingerprint, "network": network_fingerprint}, work)
    decoding = DecodeSettings(**read_json(folder / "tuning.json")["chosen"])
    log.info("tuning: acoustic scale %g, word insertion penalty %g", decoding.acoustic_scale, decoding.word_insertion_penalty)
    return Recogniser(settings.output / "graph", hmm, decoding, settings.num_jobs, record.fingerprint), record


@dataclass(frozen=True)
class Decoded:
    """Hypotheses of one system on one split.

    Attributes:
        words: utt_id -> recognised words.
        real_time_factor: processor seconds of search per second of speech.
        unfinished: utterances whose search did not end in a final state.
    """

    words: Mapping[str, Sequence[str]]
    real_time_factor: float
    unfinished: list[str]


def remove_other_systems(output: Path, systems: Collection[str]) -> None:
    """Remove the hypotheses of systems that an earlier run in the folder decoded and this one did not: beside its own they would pass for its."""
    for folder in sorted((output / "decode").iterdir()):
        if (folder / RECORD).is_file() and folder.name not in systems:  # what no stage wrote is the user's
            log.info("%s: removed, as it is of an earlier run", folder)
            remove_folder(folder)


def decode_system(settings: Settings, recogniser: Recogniser, system: str, network: Ensemble, network_fingerprint: str,
                  windows: Mapping[str, Windows], features: Features) -> tuple[dict[str, Decoded], Record]:
    """Decode every split of `windows` by one system into `decode/{system}/{split}.trn`; splits that a cut-off run finished are kept."""
    folder = settings.output / "decode" / system

    def work(folder: Path) -> None:
        for split, own in windows.items():
            if (folder / f"{split}.json").is_file():
                continue
            hypotheses = recogniser(log_posteriors(network, own, own.utt_ids), len(own.utt_ids))
            write_trn(folder / f"{split}.trn", {utt_id: hypothesis.words for utt_id, hypothesis in hypotheses.items()})
            write_json(folder / f"{split}.json", {"real_time_factor": real_time_factor(hypotheses), "unfinished": unfinished_utterances(hypotheses)})

    inputs = {"recogniser": recogniser.fingerprint, "network": network_fingerprint, **{f"features {split}": features.fingerprints[split] for split in windows}}
    record = run_stage(f"decode {system}", folder, {**asdict(recogniser.decoding), "splits": sorted(windows)}, inputs, work)
    return {split: Decoded(read_trn(folder / f"{split}.trn"), **read_json(folder / f"{split}.json")) for split in windows}, record
