"""Training of the aligner: flat start, monophones, tied triphones, LDA + MLLT, speaker adaptation."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.distributed import add_over_processes, by_first_process, from_all_processes, from_first_process, total_over_processes
from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore
from asr_kd.hmm.aligner import Aligner, GmmHmm, align_with, learn_transitions, speaker_transforms
from asr_kd.hmm.boundaries import train_boundaries
from asr_kd.hmm.checkpoint import TrainState, alignment_name, load_state, save_state
from asr_kd.hmm.corpus import Aligned, Graphs, Pronouncer, map_chunks, own_utterances, usable_utterances
from asr_kd.hmm.em import VARIANCE_FLOOR, accumulate_over, expect, frames_of, maximise, moments_of_all, states_of
from asr_kd.hmm.features import joined
from asr_kd.hmm.frontend import CPU, NUM_CEPSTRA, SPLICE, Frontend
from asr_kd.hmm.gmm import GaussianMixtures, Statistics, accumulate, single_gaussians
from asr_kd.hmm.model import SIL, HmmModel, split_codes, untied_model
from asr_kd.hmm.topology import even_path
from asr_kd.hmm.transforms import TransformStatistics, lda, mllt
from asr_kd.hmm.tree import ContextStatistics, grow_tree, state_table
from asr_kd.precision import precision_context
from asr_kd.stage import fingerprint

log = logging.getLogger(__name__)

LDA_DIM = 40
FRAMES_PER_HOUR = 360_000
FLAT_PASSES = 4
"""Passes on the even alignment, while only silence gets more Gaussians."""
STAGE_HOURS = 100.0
"""Triphone stages before the last train on so much audio, from all over the corpus: what they leave behind is a start for the next."""
QUIET_MARGIN = 3
"""Frames before the first and after the last loud frame that are taken for speech at the flat start."""


@dataclass(frozen=True)
class GmmHmmSettings:
    """Settings of the aligner's training.

    Attributes:
        num_states: tied triphone states (at least three per phone; at most 14,000 have been asked for in print).
        num_gaussians: Gaussians of the triphone models.
        mono_hours: monophones train on the shortest utterances, up to this much audio.
        mono_gaussians: Gaussians of the monophone model.
        mono_passes: passes of EM over monophones.
        tri_passes: passes of EM in each triphone stage.
        realign_every: triphone stages realign after so many passes.
        lda: a triphone stage on spliced features with LDA and MLLT.
        sat: a last stage on speaker-adapted features (fMLLR).
        boundaries: models that move the boundaries of the phones found.
        min_leaf_frames: frames that a tied state needs.
    """

    num_states: int = 1200
    num_gaussians: int = 10_000
    mono_hours: float = 1.0
    mono_gaussians: int = 1000
    mono_passes: int = 20
    tri_passes: int = 12
    realign_every: int = 4
    lda: bool = True
    sat: bool = True
    boundaries: bool = True
    min_leaf_frames: int = 100


@dataclass(frozen=True)
class Pass:
    """One pass of EM: what happens before it, and how many Gaussians there are after it."""

    stage: str
    number: int
    share_done: float
    full_gaussians: int
    realign: bool
    transform: bool

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.stage} {self.number}"

    def gaussians(self, num_states: int) -> int:
        """Gaussians after this pass: from one per state they grow over the first three quarters of the stage."""
        return num_states + round((self.full_gaussians - num_states) * min(1.0, self.share_done / 0.75))


def schedule(settings: GmmHmmSettings) -> list[Pass]:
    """All passes of a training."""
    passes = []
    flat = min(FLAT_PASSES, settings.mono_passes // 2)
    for number in range(1, settings.mono_passes + 1):
        realign = number > flat and (number <= 12 or number % 2 == 0)
        share_done = max(number - flat, 0) / (settings.mono_passes - flat)
        passes.append(Pass("mono", number, share_done, settings.mono_gaussians, realign, False))
    stages = ["tri", *(["lda"] if settings.lda else []), *(["sat"] if settings.sat else [])]
    for stage in stages:
        for number in range(1, settings.tri_passes + 1):
            transform = stage != "tri" and number % 2 == 0 and number <= settings.tri_passes // 2
            realign = number > 1 and (number - 1) % settings.realign_every == 0
            passes.append(Pass(stage, number, number / settings.tri_passes, settings.num_gaussians, realign, transform))
    return passes


def train_gmm_hmm(features: FrameStore | Sequence[FrameStore], transcripts: Mapping[str, Sequence[str]], speakers: Mapping[str, str], lexicon: Pronouncer,
                  settings: GmmHmmSettings, *, folder: Path | str | None = None, device: torch.device | str = "cpu") -> Aligner:
    """Train an aligner on every utterance that can be aligned; those that cannot are left to `align` to list.

    The result depends on nothing random. With `folder`, the state after each pass is kept there and an earlier, cut-off training
    of the same data and settings is continued. Of several processes each works on its share of the speakers, and statistics are
    summed over all.

    Args:
        features: stored log-mel.
        transcripts: utterance id -> words.
        speakers: utterance id -> speaker id.
        lexicon: pronunciations.
        device: where mixtures are evaluated and trained, and paths searched for; LDA and the tree are made on the CPU.

    Raises:
        AsrKdError: nothing to train on, or fewer states asked for than three per phone.
    """
    graphs = Graphs(transcripts, lexicon, ("SIL", *lexicon.phones))
    stores = joined(features)
    usable, exclusions = usable_utterances(graphs, stores)
    if exclusions:
        log.warning("%d utterances cannot be aligned and are left out of training (first: %s, %s)", len(exclusions), exclusions[0].utt_id, exclusions[0].reason)
    if not usable:
        raise AsrKdError(f"no utterance of {len(exclusions)} can be aligned (first: {exclusions[0].utt_id}, {exclusions[0].reason}); check lexicon and features"
                         if exclusions else "no transcripts to train on; check the training split")
    own = own_utterances(usable, speakers, stores)
    trainer = _Trainer(Frontend.of(stores, speakers, own, device), graphs, usable, own, settings, lexicon)
    with tempfile.TemporaryDirectory() as temporary, precision_context("fp32", torch.device(device)):
        return trainer.run(Path(folder or from_first_process(temporary)))


class _Trainer:
    """The passes of one training over one corpus, `all_utt_ids`, of which this process works on `utt_ids`."""

    def __init__(self, frontend: Frontend, graphs: Graphs, all_utt_ids: list[str], utt_ids: list[str], settings: GmmHmmSettings,
                 lexicon: Pronouncer) -> None:
        self.frontend = frontend
        self.graphs = graphs
        self.all_utt_ids, self.utt_ids = all_utt_ids, utt_ids
        self.settings = settings
        self.phones = ("SIL", *lexicon.phones)

    def run(self, folder: Path) -> Aligner:
        identity = self.identity()
        state = load_state(folder, identity, self.utt_ids)
        if state is None:
            state = self.flat_start()
        else:
            log.info("continuing after pass %d", state.done)
        passes = schedule(self.settings)
        for step in passes[state.done:]:
            state = self.run_pass(step, state)
            save_state(folder, state, identity)
        boundaries = self.boundaries(state) if self.settings.boundaries else ()
        if self.settings.sat:
            assert state.independent is not None
            return Aligner(state.independent, state.model, boundaries)
        return Aligner(state.model, boundaries=boundaries)

    def boundaries(self, state: TrainState) -> tuple[GmmHmm, ...]:
        """Boundary models from about as much speech as monophones train on."""
        chosen = {utt_id: state.aligned[utt_id] for utt_id in self.sample(self.settings.mono_hours) if utt_id in state.aligned}
        return train_boundaries(self.frontend, self.graphs, dict(sorted(chosen.items())), self.phones, self.settings.mono_gaussians)

    def sample(self, hours: float) -> list[str]:
        """Utterances of this process from all over the corpus: about so many hours of all processes' together."""
        frames = sum(map(self.frontend.store.length, self.all_utt_ids))
        step = max(1, round(frames / (hours * FRAMES_PER_HOUR)))
        chosen = set(self.all_utt_ids[::step])
        return [utt_id for utt_id in self.utt_ids if utt_id in chosen]

    def identity(self) -> str:
        """Names this training: settings, data and pronunciations."""
        store = self.frontend.store
        words = {word: self.graphs.lexicon[word] for utt_id in self.all_utt_ids for word in self.graphs.transcripts[utt_id]}
        index = [[utt_id, store.length(utt_id), list(self.graphs.transcripts[utt_id]), self.frontend.speakers[utt_id]] for utt_id in self.all_utt_ids]
        sample = [store[utt_id][0].astype(np.float64).sum() for utt_id in self.all_utt_ids]
        return fingerprint([asdict(self.settings), self.phones, index, words, sample])

    def run_pass(self, step: Pass, state: TrainState) -> TrainState:
        """One pass: a new stage begins, or the alignment, the projection or the adaptation is renewed; then E and M step."""
        start = time.monotonic()
        if step.number == 1 and step.stage != "mono":
            state = self.begin_stage(step.stage, state)
        frontend = self.view(state)
        if step.realign:
            state = self.realign(state, frontend, list(state.aligned), is_rough=step.stage == "mono")
        if step.transform and step.stage == "lda":
            state = replace(state, model=self.rotate(state, frontend))
        elif step.transform:
            state = replace(state, transforms=speaker_transforms(state.model, frontend, state.codes))
        frontend = self.view(state)
        statistics = expect(state.model, frontend, state.codes)
        mixtures = maximise(state.model, statistics, step.gaussians(state.model.hmm.num_states))
        per_frame = statistics.log_likelihood / statistics.num_frames
        log.info("%s: log-likelihood per frame %.4f, %d Gaussians, %d states%s, %.1f s", step.name, per_frame, state.model.mixtures.num_gaussians,
                 state.model.hmm.num_states, ", realigned" if step.realign else "", time.monotonic() - start)
        note: dict[str, object] = {"pass": step.name, "log_likelihood_per_frame": per_frame, "gaussians": state.model.mixtures.num_gaussians}
        return replace(state, done=state.done + 1, model=replace(state.model, mixtures=mixtures), history=(*state.history, note))

    def view(self, state: TrainState) -> Frontend:
        """Features as the state's model wants them."""
        return replace(self.frontend, projection=state.model.projection, transforms=state.transforms)

    def flat_start(self) -> TrainState:
        """Even alignments of the shortest utterances; all states share the Gaussian of all frames."""
        own = set(self.utt_ids)
        by_length = sorted(self.all_utt_ids, key=lambda utt_id: (self.frontend.store.length(utt_id), utt_id))
        until = np.searchsorted(np.cumsum([self.frontend.store.length(utt_id) for utt_id in by_length]), self.settings.mono_hours * FRAMES_PER_HOUR) + 1
        aligned = {utt_id: self.even_alignment(utt_id) for utt_id in by_length[:until] if utt_id in own}
        hmm = untied_model(self.phones)
        one = single_gaussians(torch.zeros(1, 39), torch.ones(1, 39)).to(self.frontend.device)

        def work(chunk: list[str]) -> Statistics:
            return accumulate(one, frames_of(self.frontend, chunk), np.zeros(self.length(chunk), np.int64))

        overall = accumulate_over(work, one, aligned, self.frontend, "flat start")
        mixtures = single_gaussians(*(moment.expand(hmm.num_states, -1) for moment in moments_of_all(overall)))
        return TrainState(0, GmmHmm(hmm, mixtures), aligned=aligned, aligned_in=alignment_name(1))

    def even_alignment(self, utt_id: str) -> Aligned:
        """All states equally long; the path is not one of the alignment graph."""
        quiet = quiet_edges(self.frontend.cepstra(utt_id).cpu())
        codes = even_path(self.graphs.pronunciations(utt_id), len(self.phones), self.frontend.store.length(utt_id), quiet)
        return Aligned(codes, np.full_like(codes, -1), 0.0)

    def begin_stage(self, stage: str, state: TrainState) -> TrainState:
        """Align utterances with the model so far, in the last stage all of them, then tie states anew on the features of this stage, one Gaussian each."""
        utt_ids = self.utt_ids if stage == schedule(self.settings)[-1].stage else self.sample(STAGE_HOURS)
        state = self.realign(state, self.view(state), utt_ids, is_rough=stage == "tri")
        previous = state.model
        if stage == "lda":
            state = replace(state, model=replace(previous, projection=self.discriminate(previous.hmm, state.codes)))
        elif stage == "sat":
            state = replace(state, independent=previous, transforms=speaker_transforms(previous, self.view(state), state.codes))
        frontend = self.view(state)
        statistics = self.context_statistics(frontend, state.codes)
        total = statistics.moments.sum(0)
        dim = (len(total) - 1) // 2
        floor = VARIANCE_FLOOR * (total[dim + 1 :] / total[0] - (total[1 : dim + 1] / total[0]) ** 2)
        leaves = by_first_process(lambda: grow_tree(statistics, len(self.phones), self.settings.num_states, min_frames=self.settings.min_leaf_frames,
                                                    min_gain=1.0, variance_floor=floor))
        half = np.full(len(leaves), np.log(0.5), np.float32)
        hmm = HmmModel(self.phones, state_table(leaves, len(self.phones)), half, half, previous.hmm.log_optional_silence, half)
        hmm = learn_transitions(hmm, state.codes.values(), self.num_words(state.codes))
        log.info("%s: %d states tied from %d in context", stage, hmm.num_states, len(statistics.codes))
        return replace(state, model=GmmHmm(hmm, first_gaussians(hmm, statistics, floor), state.model.projection))

    def realign(self, state: TrainState, frontend: Frontend, utt_ids: list[str], is_rough: bool = False) -> TrainState:
        """Align with the current model, near the latest alignment unless that is a rough one, and count transitions.

        Utterances without a path are left out until the next stage.
        """
        found = align_with(state.model, frontend, self.graphs, utt_ids, guide=None if is_rough else state.aligned)
        aligned = {utt_id: own for utt_id in utt_ids if (own := found[utt_id]) is not None}
        found_anywhere, wanted = map(int, total_over_processes(len(aligned), len(utt_ids)))
        if found_anywhere < wanted:
            log.warning("%d of %d utterances have no path and are left out", wanted - found_anywhere, wanted)
        if not found_anywhere:
            raise AsrKdError(f"none of {wanted} utterances could be aligned; check that audio and transcripts belong together")
        state = replace(state, aligned=aligned, aligned_in=alignment_name(state.done + 1))
        return replace(state, model=replace(state.model, hmm=learn_transitions(state.model.hmm, state.codes.values(), self.num_words(aligned))))

    def rotate(self, state: TrainState, frontend: Frontend) -> GmmHmm:
        """The model with its projection turned by MLLT, and its means with it."""
        model = state.model
        mixtures = model.mixtures.to(frontend.device)

        def work(chunk: list[str]) -> tuple[Statistics, TransformStatistics]:
            frames, states = frames_of(frontend, chunk), states_of(model.hmm, state.codes, chunk)
            sums = TransformStatistics(mixtures.dim)
            sums.add(mixtures, frames, frames, states)
            return accumulate(mixtures, frames, states), sums

        statistics, sums = Statistics.zero(model.mixtures.num_gaussians, model.mixtures.dim), TransformStatistics(model.mixtures.dim)
        for own, own_sums in map_chunks(work, state.codes, frontend.store, frontend.device, "MLLT"):
            statistics += own
            sums += own_sums
        matrix = from_first_process(mllt(model.mixtures, statistics.over_processes(), sums.over_processes()))
        assert model.projection is not None
        return replace(model, projection=model.projection @ matrix.T, mixtures=replace(model.mixtures, means=model.mixtures.means @ matrix.T))

    def discriminate(self, hmm: HmmModel, codes: Mapping[str, NDArray[np.int32]]) -> Tensor:
        """LDA of spliced cepstra with the tied speech states as classes; C classes have C - 1 directions, and any others would be chance."""
        frontend = replace(self.frontend, device=CPU)

        def work(chunk: list[str]) -> tuple[NDArray[np.float64], ...]:
            path = np.concatenate([codes[utt_id] for utt_id in chunk])
            speech = split_codes(path, len(self.phones))[1] != SIL
            frames = torch.cat([frontend.spliced(utt_id) for utt_id in chunk])[torch.from_numpy(speech)]
            tied = torch.from_numpy(hmm.flat_table[path[speech]].astype(np.int64))
            sums = torch.zeros(hmm.num_states, frames.shape[1]).index_add_(0, tied, frames)
            return np.bincount(tied.numpy(), minlength=hmm.num_states).astype(np.float64), sums.double().numpy(), (frames.T @ frames).double().numpy()

        dim = (2 * SPLICE + 1) * NUM_CEPSTRA
        counts, sums, second = np.zeros(hmm.num_states), np.zeros((hmm.num_states, dim)), np.zeros((dim, dim))
        for part in map_chunks(work, codes, frontend.store, CPU, "LDA"):
            for whole, own in zip((counts, sums, second), part, strict=True):
                whole += own
        add_over_processes([torch.from_numpy(whole) for whole in (counts, sums, second)])
        total = counts.sum()
        mean = sums.sum(0) / total
        means = sums / np.maximum(counts, 1)[:, None]
        between = (means * counts[:, None]).T @ means / total - np.outer(mean, mean)
        num_directions = min(LDA_DIM, max(1, int((counts > 0).sum()) - 1))
        return from_first_process(lda(second / total - np.outer(mean, mean) - between, between, num_directions))

    def context_statistics(self, frontend: Frontend, codes: Mapping[str, NDArray[np.int32]]) -> ContextStatistics:
        """Moments of the frames of every state in context."""
        frontend = replace(frontend, device=CPU)
        own_names = np.unique(np.concatenate([np.empty(0, np.int32), *(np.unique(path) for path in codes.values())]))
        names = np.unique(np.concatenate(from_all_processes(own_names)))

        def work(chunk: list[str]) -> tuple[NDArray[np.intp], Tensor]:
            frames = frames_of(frontend, chunk)
            rows = np.searchsorted(names, np.concatenate([codes[utt_id] for utt_id in chunk]))
            moments = torch.cat([torch.ones(len(frames), 1), frames, frames.square()], 1)
            return rows, moments

        total = torch.zeros(len(names), 1 + 2 * frontend.dim, dtype=torch.float64)
        for rows, moments in map_chunks(work, codes, frontend.store, CPU, "states in context"):
            total.index_add_(0, torch.from_numpy(rows), moments.double())
        add_over_processes([total])
        return ContextStatistics(names.astype(np.int32), total.numpy())

    def length(self, utt_ids: list[str]) -> int:
        return sum(map(self.frontend.store.length, utt_ids))

    def num_words(self, utt_ids: Iterable[str]) -> int:
        return sum(len(self.graphs.transcripts[utt_id]) for utt_id in utt_ids)


def quiet_edges(cepstra: Tensor) -> tuple[int, int]:
    """Frames at the start and at the end of an utterance that are quieter than half way from its quietest to its loudest (5 % and 95 % quantiles).

    A margin of `QUIET_MARGIN` frames is left to the words, for their soft beginnings. Never more than a third of the utterance each.
    """
    loudness = torch.nn.functional.avg_pool1d(cepstra[None, :, 0], 5, 1, 2, count_include_pad=False)[0]
    low, high = loudness.quantile(torch.tensor([0.05, 0.95]))
    loud = torch.nonzero(loudness > (low + high) / 2)[:, 0]
    if len(loud) == 0:
        return 0, 0
    most = len(loudness) // 3
    lead, tail = int(loud[0]) - QUIET_MARGIN, len(loudness) - 1 - int(loud[-1]) - QUIET_MARGIN
    return min(max(lead, 0), most), min(max(tail, 0), most)


def first_gaussians(hmm: HmmModel, statistics: ContextStatistics, variance_floor: NDArray[np.float64]) -> GaussianMixtures:
    """One Gaussian per tied state from moments; a state without frames has the Gaussian of all frames."""
    moments = np.zeros((hmm.num_states, statistics.moments.shape[1]))
    np.add.at(moments, hmm.flat_table[statistics.codes], statistics.moments)
    moments[moments[:, 0] < 1] = statistics.moments.sum(0)
    dim = (moments.shape[1] - 1) // 2
    means = moments[:, 1 : dim + 1] / moments[:, :1]
    variances = np.maximum(moments[:, dim + 1 :] / moments[:, :1] - means**2, variance_floor)
    return single_gaussians(torch.from_numpy(means), torch.from_numpy(variances))
