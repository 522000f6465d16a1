"""Frame stores: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.stage import read_json, write_json


def write(folder: Path, parts: dict[str, np.ndarray], **attributes: object) -> None:
    first = next(iter(parts.values()))
    with FrameWriter(folder, first.shape[1:], first.dtype, dict(attributes)) as writer:
        for utt_id, frames in parts.items():
            writer.append(utt_id, frames)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), shape=st.sampled_from([(), (3,), (2, 2)]),
       dtype=st.sampled_from(["float16", "float32", "int32", "uint16"]))
def test_what_is_written_is_read_by_utterance(lengths: list[int], shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(len(lengths))
    parts = {f"u{n}": rng.integers(0, 99, (length, *shape)).astype(dtype) for n, length in enumerate(lengths)}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), parts, temperature=2.0)
        store = FrameStore(folder)
        assert (list(store), len(store), store.attributes) == (list(parts), len(parts), {"temperature": 2.0})
        assert isinstance(store.frames, np.memmap)
        for utt_id, frames in parts.items():
            np.testing.assert_array_equal(store[utt_id], frames)
            assert store[utt_id].dtype == frames.dtype
            assert store.length(utt_id) == len(frames)
        np.testing.assert_array_equal(store.frames, np.concatenate(list(parts.values())))
        np.testing.assert_array_equal(np.load(Path(folder) / "frames.npy", allow_pickle=False), store.frames)  # a plain .npy file


def test_an_unknown_utterance_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"u": np.zeros(3)})
    assert "u" in FrameStore(tmp_path)
    assert "v" not in FrameStore(tmp_path)
    with pytest.raises(AsrKdError, match=r"v: not in .*\(1 utterances\); run the stage"):
        FrameStore(tmp_path)["v"]


@pytest.mark.parametrize(("frames", "message"), [
    (np.zeros((2, 3)), r"v: frames of shape \(3,\), expected \(2,\)"),
    (np.array([[0, 0], [0, np.nan]]), "v: NaN or infinity at frame 1"),
    (np.array([[np.inf, 0]]), "v: NaN or infinity at frame 0"),
    (np.array([[1e6, 0]]), "v: NaN or infinity at frame 0"),  # beyond float16
])
def test_frames_that_cannot_be_kept_are_errors_and_nothing_is_left(tmp_path: Path, frames: np.ndarray, message: str) -> None:
    def attempt() -> None:
        with FrameWriter(tmp_path / "f", (2,), np.float16) as writer:
            writer.append("u", np.zeros((1, 2)))
            writer.append("v", frames)

    with np.errstate(over="ignore"), pytest.raises(AsrKdError, match=message):
        attempt()
    assert list((tmp_path / "f").iterdir()) == []


def test_an_utterance_written_twice_is_an_error(tmp_path: Path) -> None:
    with FrameWriter(tmp_path, (), np.int32) as writer:
        writer.append("u", np.zeros(1))
        with pytest.raises(AsrKdError, match="u: already written"):
            writer.append("u", np.zeros(1))


def test_an_earlier_store_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write(tmp_path, {"u": np.arange(3)})
    with suppress(KeyboardInterrupt), FrameWriter(tmp_path, (), np.int64) as writer:
        writer.append("v", np.zeros(9))
        raise KeyboardInterrupt
    assert FrameStore(tmp_path)["u"].tolist() == [0, 1, 2]
    write(tmp_path, {"v": np.arange(5)})
    assert list(FrameStore(tmp_path)) == ["v"]


def test_damaged_stores_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"u": np.arange(300), "v": np.arange(4)})
    index, content = read_json(tmp_path / "index.json"), (tmp_path / "frames.npy").read_bytes()
    (tmp_path / "frames.npy").write_bytes(content[:-8])
    with pytest.raises(AsrKdError, match=r"not readable .*run the stage"):
        FrameStore(tmp_path)
    (tmp_path / "frames.npy").write_bytes(content)
    write_json(tmp_path / "index.json", {**index, "lengths": [300, 5]})
    with pytest.raises(AsrKdError, match="index of 305 frames beside an array of 304"):
        FrameStore(tmp_path)
    np.save(tmp_path / "frames.npy", np.array([{}] * 305), allow_pickle=True)
    with pytest.raises(AsrKdError, match="not readable"):
        FrameStore(tmp_path)
    (tmp_path / "frames.npy").write_bytes(b"")
    with pytest.raises(AsrKdError, match="not readable"):
        FrameStore(tmp_path)
    (tmp_path / "frames.npy").unlink()
    with pytest.raises(AsrKdError, match="not readable"):
        FrameStore(tmp_path)
    (tmp_path / "frames.npy").write_bytes(content)
    for damaged in ({}, [], {**index, "lengths": None}):
        write_json(tmp_path / "index.json", damaged)
        with pytest.raises(AsrKdError, match=r"index.json: not an index of frames .*run the stage that writes it again"):
            FrameStore(tmp_path)


# a file size limit makes write() fail in the middle of a file, as a full disk does
FULL_DISK = """
import resource, signal, sys
import numpy as np
from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with FrameWriter(sys.argv[1], (40,), np.float16) as writer:
        for number in range(100):
            writer.append(f"u{number}", np.zeros((int(sys.argv[3]), 40)))
except AsrKdError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limits on this system")
@pytest.mark.parametrize(("limit", "frames_each"), [(0, 1), (5000, 1), (300_000, 50), (7900, 1)])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path: Path, limit: int, frames_each: int) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "f", str(limit), str(frames_each)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "could not be written (File too large); free space" in done.stdout
    assert done.stdout.count("\n") == 1
    assert list((tmp_path / "f").iterdir()) == []


OVER_AND_OVER = """
import sys
import numpy as np
from asr_kd.frames import FrameWriter
number = 0
while True:
    number += 1
    with FrameWriter(sys.argv[1], (40,), np.int32) as writer:
        for u in range(number % 7 + 1):
            writer.append(f"u{u}", np.full((number % 50 + 1, 40), number))
    print(number, flush=True)
"""


def test_a_store_killed_at_any_moment_is_whole_or_refused(tmp_path: Path) -> None:
    whole = 0
    for trial in range(6):
        process = subprocess.Popen([sys.executable, "-c", OVER_AND_OVER, tmp_path / "f"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # the first store is there
        time.sleep(0.003 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        try:
            store = FrameStore(tmp_path / "f")
        except AsrKdError:
            continue
        whole += 1
        number = int(store.frames[0, 0])
        assert (store.frames == number).all()
        assert store.offsets.tolist() == [n * (number % 50 + 1) for n in range(number % 7 + 2)]
    assert whole > 0
    write(tmp_path / "f", {"u": np.zeros(3)})
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["frames.npy", "index.json"]  # nothing left of the killed
