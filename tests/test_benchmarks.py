"""The benchmarks run, at sizes that mean nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from asr_kd.frames import FrameStore, FrameWriter

ROOT = Path(__file__).parents[1]


def figures(*arguments: str) -> list[dict[str, object]]:
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


SMALL = ("--hidden_layers", "2", "--hidden_units", "32", "--batch", "64")


@pytest.mark.parametrize(("arguments", "key"), [
    (["gpu", "--device", "cpu", "--tiny", "--members", "2"], "share_of_limit"),
    (["training", *SMALL, "--frames", "2400", "--repeats", "1"], "student_share_of_limit"),
    (["teachers", *SMALL, "--frames", "2400", "--repeats", "1", "--members", "2"], "together_share_of_limit"),
    (["scale", *SMALL, "--hours", "0.2", "--parts", "2", "--part_frames", "33000"], "over_in_memory"),
])
def test_benchmarks_run(arguments: list[str], key: str) -> None:
    found = [row[key] for row in figures(*arguments) if key in row]
    assert found
    assert all(isinstance(value, float) and value > 0 for value in found)


def test_the_list_of_benchmarks_names_files_that_are_there() -> None:
    listed = subprocess.run([sys.executable, "-m", "tests.benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("training", "teachers", "soft_targets", "features", "alignment", "word_starts", "graph", "decoding", "scale", "losses", "gpu"):
        assert f"  {name} " in listed
        assert (ROOT / "tests" / "benchmarks" / f"{name}.py").is_file()
    wrong = subprocess.run([sys.executable, "-m", "tests.benchmarks", "speed"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "'speed': expected one of training" in wrong.stderr


def test_states_are_divided_by_their_neighbouring_phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence (state 0), then phones 2 and 3 of states 1 to 3 and 4 to 6, the first one again, and silence; by hand."""
    monkeypatch.syspath_prepend(ROOT)
    soft_targets = importlib.import_module("tests.benchmarks.soft_targets")
    states, rows = [0, 0, 1, 2, 2, 3, 4, 5, 6, 6, 1, 2, 3, 0], [(1, -1, 0, 2), (2, 0, 2, 6), (3, 0, 6, 10), (2, 0, 10, 13), (1, -1, 13, 14)]
    with FrameWriter(tmp_path / "segments", (4,), np.int32) as segments, FrameWriter(tmp_path, (), np.int32) as targets:
        segments.append("u", np.array(rows, np.int32))
        targets.append("u", np.array(states, np.int32))
    found = soft_targets.contexts_of(FrameStore(tmp_path), ["u"])
    assert found[[0, 2, 4, 6, 9, 10, 12, 13]].tolist() == [[0, 0, 2], [1, 1, 3], [2, 1, 3], [4, 2, 2], [6, 2, 2], [1, 3, 1], [3, 3, 1], [0, 2, 0]]
    own, of_dev = soft_targets.divided(found, np.array([[2, 1, 3], [2, 3, 1], [5, 1, 1]], np.int32), 7, 9)
    assert sorted(set(own.tolist())) == list(range(9))  # the first two of the contexts of two frames are states of their own
    assert own[0] == own[1] == 7
    assert own[3] == own[4] == of_dev[0] == 8
    assert of_dev[1:].tolist() == [2, 5]
