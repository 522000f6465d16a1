"""The benchmarks run, at sizes that mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
