"""Writers that are not Python's own, on a disk that is full: a file size limit makes them fail in the middle of a file."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_graph import toy_hmm

from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.features import Windows
from asr_kd.frame_data import FrameData
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.graph import build_graph
from asr_kd.hmm.model import write_tensors
from asr_kd.lexicon import Lexicon
from asr_kd.lm import estimate_kneser_ney, write_arpa
from asr_kd.model import ModelShape
from asr_kd.training import TrainingSettings, train

LEXICON = Lexicon({"A": (("A",),), "RED": (("R", "E", "D"),)})


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def networks(folder: Path) -> Callable[[], object]:
    ensemble = Ensemble(ModelShape(26, 1, 300, 5), [1])
    return lambda: ensemble.save(folder / "networks.safetensors")


def hmm_tensors(folder: Path) -> Callable[[], object]:
    return lambda: write_tensors(folder / "model.safetensors", {"means": np.zeros(10_000)})


def checkpoint(folder: Path) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    with FrameWriter(folder.parent / "features", (4,), np.float16) as writer:
        writer.append("u", rng.normal(size=(200, 4)))
    data = FrameData(Windows(FrameStore(folder.parent / "features"), left=0, right=0), torch.arange(200, dtype=torch.int32) % 3)
    return lambda: train(Ensemble(ModelShape(4, 1, 300, 3), [1]), data, data, folder, TrainingSettings(batch_frames=50, precision="fp32"), seed=1)


def graph(folder: Path) -> Callable[[], object]:
    write_arpa(estimate_kneser_ney([("A", "RED"), ("RED",)], order=2), folder.parent / "lm.arpa")
    return lambda: build_graph(LEXICON, folder.parent / "lm.arpa", toy_hmm(LEXICON.phones), folder)


@pytest.mark.parametrize("prepare", [networks, hmm_tensors, checkpoint, graph])
@pytest.mark.parametrize("num_bytes", [0, 1000])
def test_one_line_names_the_file_and_nothing_is_left(prepare: Callable[[Path], Callable[[], object]], num_bytes: int, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write = prepare(folder)
    with file_size_limit(num_bytes), pytest.raises(AsrKdError, match="free space or choose another output_folder") as caught:
        write()
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    left = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    assert all(path.suffix in (".txt", ".jsonl") for path in left), left  # written whole before: the graph's lists of words, the learning curve
