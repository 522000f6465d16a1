"""One folder that recognises speech: network, states, lexicon, graph and every setting; and its use on audio files.

    bundle.json                 format, feature and decoding settings, fingerprint of every file below
    model.safetensors           the network
    hmm.json, hmm.safetensors   states, transitions, priors
    lexicon.txt                 pronunciations
    graph/                      HCLG.fst, words.txt, graph.json (or elsewhere, if the bundle refers to it)
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asr_kd import __version__
from asr_kd.audio import audio_duration_s
from asr_kd.const_fst import check_const_fst
from asr_kd.decode import Decoder, DecodeSettings
from asr_kd.errors import AsrKdError
from asr_kd.features import FbankOptions, fbank
from asr_kd.graph import GRAPH, INFO, WORDS, read_graph_info
from asr_kd.hmm.model import HmmModel
from asr_kd.lexicon import Lexicon, read_lexicon
from asr_kd.model import AcousticModel
from asr_kd.normalisation import LevelSums, MeanNormalisation, log_posteriors
from asr_kd.progress import progress
from asr_kd.segments import read_segments, tell_low_rate
from asr_kd.stage import atomic_path, file_fingerprint, read_json, write_json

log = logging.getLogger(__name__)

FORMAT = 2
BUNDLE = "bundle.json"
MODEL = "model.safetensors"
LEXICON = "lexicon.txt"
_OWN_FILES = (MODEL, "hmm.json", "hmm.safetensors", LEXICON)
_GRAPH_FILES = (GRAPH, WORDS, INFO)


@dataclass(frozen=True)
class InputSettings:
    """From audio to the network's input.

    Attributes:
        fbank: filterbank options.
        left, right: frames of context.
        normalisation: mean that is subtracted.
    """

    fbank: FbankOptions
    left: int
    right: int
    normalisation: MeanNormalisation

    @property
    def dim(self) -> int:
        """Width of the network's input."""
        return (self.left + 1 + self.right) * self.fbank.num_mels


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle, ready to transcribe."""

    folder: Path
    model: AcousticModel
    hmm: HmmModel
    inputs: InputSettings
    decoder: Decoder

    @cached_property
    def lexicon(self) -> Lexicon:
        """Pronunciations; the graph holds what recognition needs of them."""
        return read_lexicon(self.folder / LEXICON)

    def log_posteriors(self, frames: NDArray[np.floating]) -> NDArray[np.float32]:
        """(T, F) normalised features -> (T, S) natural log posteriors."""
        return log_posteriors(self.model, frames, self.inputs.left, self.inputs.right)


def save_bundle(folder: Path | str, model: AcousticModel, hmm: HmmModel, lexicon: Lexicon, graph_folder: Path | str, inputs: InputSettings,
                decoding: DecodeSettings, *, copy_graph: bool = True) -> None:
    """Write a bundle; `bundle.json` comes last, so a folder with it is whole.

    Args:
        graph_folder: what `build_graph` wrote.
        copy_graph: put the graph into the bundle (a hard link where the file system can); otherwise refer to it by relative path.

    Raises:
        AsrKdError: the parts do not belong together, or the disk is full.
    """
    folder, graph_folder = Path(folder), Path(graph_folder)
    _check_parts(folder, model, hmm, inputs, graph_folder)
    (folder / BUNDLE).unlink(missing_ok=True)
    model.save(folder / MODEL)
    hmm.save(folder)
    lexicon.write(folder / LEXICON)
    if copy_graph:
        for name in _GRAPH_FILES:
            _copy(graph_folder / name, folder / "graph" / name)
    graph_path = "graph" if copy_graph else Path(os.path.relpath(graph_folder, folder)).as_posix()
    files = [*_OWN_FILES, *(f"{graph_path}/{name}" for name in _GRAPH_FILES)]
    write_json(folder / BUNDLE, {"format": FORMAT, "version": __version__, "inputs": _inputs_to_json(inputs), "decoding": asdict(decoding),
                                 "graph": graph_path, "files": {name: file_fingerprint(folder / name) for name in files}})


def load_bundle(folder: Path | str, device: torch.device | str = "cpu") -> Bundle:
    """Read and check a bundle.

    Args:
        device: of the network; the search is on the CPU.

    Raises:
        AsrKdError: no bundle, one of another format, a file that is missing or was changed, or parts that do not belong together.
    """
    folder = Path(folder)
    if not (folder / BUNDLE).is_file():
        raise AsrKdError(f"{folder}: no {BUNDLE} here; give the folder of a bundle, student/bundle in the output folder of a finished run")
    notes = _read_notes(folder / BUNDLE)
    for name, expected in notes["files"].items():
        found = file_fingerprint(folder / name)
        if found != expected:
            raise AsrKdError(f"{folder / name}: fingerprint {found}, expected {expected}: not the file that the bundle was made with; write the bundle again")
    model, hmm, inputs = AcousticModel.load(folder / MODEL), HmmModel.load(folder), notes["inputs"]
    graph_folder = folder / notes["graph"]
    _check_parts(folder, model, hmm, inputs, graph_folder)
    info, words = read_graph_info(graph_folder)
    check_const_fst(graph_folder / GRAPH, info["num_state_ids"] + 1, len(words))
    decoder = Decoder(graph_folder, hmm.log_priors, notes["decoding"])
    return Bundle(folder, model.to(device).eval(), hmm, inputs, decoder)


def transcribe(bundle: Bundle, path: Path | str) -> tuple[str, ...]:
    """Words of an audio file of any length, sample rate and number of channels, from any speaker.

    The file is read twice: for its mean features (see `asr_kd.normalisation`), then segment by segment (see `read_segments`);
    memory does not depend on its length. A word at a cut between two segments may be lost; cuts lie at quiet places.

    Raises:
        AsrKdError: the file is missing, unreadable, without samples, shorter than a window of features, or holds NaN.
    """
    levels = LevelSums(bundle.inputs.fbank.num_mels)
    for frames in _features(bundle, path):
        levels.add(frames)
    if not len(levels):
        raise AsrKdError(f"{path}: shorter than one window of {bundle.inputs.fbank.window_ms:g} ms; nothing can be recognised, give a longer file")
    tell_low_rate(path, bundle.inputs.fbank.sample_rate)
    mean = bundle.inputs.normalisation.mean_of(levels)
    words: list[str] = []
    segments = unfinished = 0
    with progress(desc=f"transcribe {Path(path).name}", total=round(audio_duration_s(path)), unit="s") as bar:
        for frames in _features(bundle, path):
            found = bundle.decoder.decode(str(path), bundle.log_posteriors((frames - mean).astype(np.float32)))
            words += found.words
            segments, unfinished = segments + 1, unfinished + (not found.reached_final)
            bar.update(round(len(frames) * bundle.inputs.fbank.shift_ms / 1000))
    if unfinished:
        log.warning("%s: in %d of %d segments the search ended in no final state, their best unfinished words are used", path, unfinished, segments)
    return tuple(words)


def _features(bundle: Bundle, path: Path | str) -> Iterator[NDArray[np.float32]]:
    """Raw log-mel features of each segment that holds at least a window, (T, F)."""
    for segment in read_segments(path, bundle.inputs.fbank.sample_rate):
        frames = fbank([segment], bundle.inputs.fbank)[0].numpy()
        if len(frames):
            yield frames


def _check_parts(folder: Path, model: AcousticModel, hmm: HmmModel, inputs: InputSettings, graph_folder: Path) -> None:
    graph_states = read_graph_info(graph_folder)[0]["num_state_ids"]
    if not model.shape.num_states == hmm.num_states == graph_states:
        raise AsrKdError(f"{folder}: {model.shape.num_states} states in the network, {hmm.num_states} in the HMM, {graph_states} in the graph; "
                         "use parts of one run")
    if model.shape.input_dim != inputs.dim or len(inputs.normalisation.training_mean) != inputs.fbank.num_mels:
        raise AsrKdError(f"{folder}: the network takes {model.shape.input_dim} inputs, the features make {inputs.dim} "
                         f"with a mean of {len(inputs.normalisation.training_mean)}; use the feature settings it was trained with")


def _copy(source: Path, target: Path) -> None:
    """Hard link or copy: files of a finished stage are replaced, never changed, so a link stays what it was."""
    with atomic_path(target) as part:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)


def _inputs_to_json(inputs: InputSettings) -> dict[str, Any]:
    """JSON knows no infinity: there the pseudo-count is null."""
    pseudo_count = inputs.normalisation.pseudo_count_frames
    return {"fbank": asdict(inputs.fbank), "left": inputs.left, "right": inputs.right, "training_mean": inputs.normalisation.training_mean,
            "pseudo_count_frames": None if math.isinf(pseudo_count) else pseudo_count, "loud_share": inputs.normalisation.loud_share}


def _read_notes(path: Path) -> dict[str, Any]:
    """bundle.json, its `inputs` and `decoding` as settings; one that misses a key or has an unknown one is an `AsrKdError`."""
    notes = read_json(path)
    found = notes.get("format") if isinstance(notes, dict) else None
    if found != FORMAT:
        raise AsrKdError(f"{path}: format {found}, expected {FORMAT}; write the bundle with this version of asr_kd ({__version__})")
    try:
        inputs = notes["inputs"]
        pseudo_count = math.inf if inputs["pseudo_count_frames"] is None else float(inputs["pseudo_count_frames"])
        normalisation = MeanNormalisation(tuple(map(float, inputs["training_mean"])), pseudo_count, float(inputs["loud_share"]))
        return {"inputs": InputSettings(FbankOptions(**inputs["fbank"]), int(inputs["left"]), int(inputs["right"]), normalisation),
                "decoding": DecodeSettings(**notes["decoding"]), "graph": str(notes["graph"]), "files": dict(notes["files"])}
    except (KeyError, TypeError, ValueError) as error:
        raise AsrKdError(f"{path}: not what asr_kd writes ({error!r}); write the bundle again") from error
