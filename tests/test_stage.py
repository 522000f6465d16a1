"""Stages: done once, redone when something changed, continued when cut off, never taken as whole when they are not."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd import stage as module
from asr_kd.errors import AsrKdError
from asr_kd.stage import atomic_path, combined, file_fingerprint, fingerprint, read_json, read_record, run_stage, write_json, write_text


class Work:
    """Writes three files, one after another, and counts; can be told to stop before one of them."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.stop_before: str | None = None

    def __call__(self, folder: Path) -> None:
        for name in ("a", "b", "deep/c"):
            if (folder / name).exists():
                continue
            if name == self.stop_before:
                raise KeyboardInterrupt
            write_text(folder / name, name * 10)
            self.written.append(name)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    work = Work()
    first = run_stage("toy", tmp_path / "s", {"size": 3}, {"corpus": "x"}, work)
    again = run_stage("toy", tmp_path / "s", {"size": 3}, {"corpus": "x"}, work)
    assert work.written == ["a", "b", "deep/c"]
    assert first == again == read_record(tmp_path / "s")
    assert first.files == {"a": 10, "b": 10, "deep/c": 60}
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["a", "b", "deep", "record.json"]


@pytest.mark.parametrize(("changed_settings", "changed_inputs"), [({"size": 4}, {}), ({"more": None}, {}), ({}, {"corpus": "y"}), ({}, {"extra": "z"})])
def test_changed_settings_or_inputs_start_from_nothing(tmp_path: Path, changed_settings: dict[str, Any], changed_inputs: dict[str, str]) -> None:
    first = run_stage("toy", tmp_path / "s", {"size": 3}, {"corpus": "x"}, Work())
    (tmp_path / "s" / "stray").write_text("of the earlier settings")
    work = Work()
    second = run_stage("toy", tmp_path / "s", {"size": 3} | changed_settings, {"corpus": "x"} | changed_inputs, work)
    assert work.written == ["a", "b", "deep/c"]
    assert not (tmp_path / "s" / "stray").exists()
    assert first.fingerprint != second.fingerprint


def test_why_a_finished_stage_is_made_anew_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "asr_kd")
    run_stage("s", tmp_path / "s", {"a": 1, "b": 2}, {"x": "1"}, Work())
    assert not caplog.records
    run_stage("s", tmp_path / "s", {"a": 1, "c": 2}, {"x": "2"}, Work())
    (tmp_path / "s" / "a").unlink()
    run_stage("s", tmp_path / "s", {"a": 1, "c": 2}, {"x": "2"}, Work())
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 's'}: made anew, for b, c, x changed",
                                                                  f"{tmp_path / 's'}: made anew, for files of it were lost"]


def test_another_version_of_the_library_runs_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage("toy", tmp_path / "s", {}, {}, Work())
    monkeypatch.setattr(module, "__version__", "0.0.other")
    work = Work()
    run_stage("toy", tmp_path / "s", {}, {}, work)
    assert work.written == ["a", "b", "deep/c"]


def test_settings_may_hold_paths_tuples_and_numpy_numbers(tmp_path: Path) -> None:
    chosen = {"path": Path("/data"), "size": np.int64(3), "pair": (1, 2)}
    work = Work()
    for _ in range(2):
        record = run_stage("toy", tmp_path / "s", chosen, {}, work)
    assert (work.written, record.settings) == (["a", "b", "deep/c"], {"path": "/data", "size": 3, "pair": [1, 2]})
    with pytest.raises(TypeError, match="object is not JSON-able"):
        run_stage("toy", tmp_path / "s", {"what": object()}, {}, work)


def test_a_cut_off_stage_continues_unless_something_changed(tmp_path: Path) -> None:
    work = Work()
    work.stop_before = "b"
    with pytest.raises(KeyboardInterrupt):
        run_stage("toy", tmp_path / "s", {"size": 3}, {}, work)
    with pytest.raises(AsrKdError, match=r"no finished output here .*run the stage"):
        read_record(tmp_path / "s")
    work.stop_before = None
    record = run_stage("toy", tmp_path / "s", {"size": 3}, {}, work)
    assert work.written == ["a", "b", "deep/c"]
    work.stop_before = "b"
    with pytest.raises(KeyboardInterrupt):
        run_stage("toy", tmp_path / "s", {"size": 4}, {}, work)
    work.stop_before = None
    other = run_stage("toy", tmp_path / "s", {"size": 3}, {}, work)  # what the run of size 4 left is not continued
    assert work.written == ["a", "b", "deep/c", "a", "a", "b", "deep/c"]
    assert record.fingerprint == other.fingerprint


def test_time_is_added_over_cut_off_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 7.0, 100.0, 105.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    work = Work()
    work.stop_before = "b"
    with pytest.raises(KeyboardInterrupt):
        run_stage("toy", tmp_path / "s", {}, {}, work)
    work.stop_before = None
    assert run_stage("toy", tmp_path / "s", {}, {}, work).seconds == 12.0


def test_the_time_of_a_killed_run_counts_up_to_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    work.stop_before = "b"
    with monkeypatch.context() as killed:
        killed.setattr(module, "_note_time", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            run_stage("toy", tmp_path / "s", {}, {}, work)
    os.utime(tmp_path / "s" / "started.json", (1000.0, 1000.0))
    os.utime(tmp_path / "s" / "a", (1060.0, 1060.0))
    work.stop_before = None
    assert 60.0 <= run_stage("toy", tmp_path / "s", {}, {}, work).seconds < 65.0


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_file_lost_later_is_noticed(tmp_path: Path, damage: str) -> None:
    run_stage("toy", tmp_path / "s", {}, {}, Work())
    if damage == "missing":
        (tmp_path / "s" / "deep" / "c").unlink()
    else:
        (tmp_path / "s" / "deep" / "c").write_text("short")
    with pytest.raises(AsrKdError, match=r"deep/c: (missing|5 bytes), expected 60 bytes; remove .* and run the toy stage again"):
        read_record(tmp_path / "s")
    work = Work()
    run_stage("toy", tmp_path / "s", {}, {}, work)
    assert work.written == ["a", "b", "deep/c"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "toy"}', "\x00"])
def test_a_damaged_record_is_an_error_and_the_stage_is_redone(tmp_path: Path, content: str) -> None:
    run_stage("toy", tmp_path / "s", {}, {}, Work())
    (tmp_path / "s" / "record.json").write_text(content)
    with pytest.raises(AsrKdError, match=r"record\.json: not .*run the stage"):
        read_record(tmp_path / "s")
    work = Work()
    run_stage("toy", tmp_path / "s", {}, {}, work)
    assert work.written == ["a", "b", "deep/c"]


def test_the_fingerprint_of_folders_together_depends_on_each(tmp_path: Path) -> None:
    records = {name: run_stage("toy", tmp_path / name, {"split": name}, {}, Work()) for name in ("train", "dev")}
    changed = records | {"dev": run_stage("toy", tmp_path / "dev", {"split": "other"}, {}, Work())}
    assert combined("toy", records).fingerprint != combined("toy", changed).fingerprint
    assert combined("toy", records).seconds == pytest.approx(sum(record.seconds for record in records.values()), abs=1e-3)


def test_fingerprints_identify_contents(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": (2, 3), "a": 1}) != fingerprint({"a": 1, "b": [3, 2]})
    (tmp_path / "f").write_bytes(b"abc")
    assert file_fingerprint(tmp_path / "f") == "ba7816bf8f01cfea"  # SHA-256 of "abc", FIPS 180-2 appendix B.1
    with pytest.raises(AsrKdError, match="none: could not be read"):
        file_fingerprint(tmp_path / "none")


def test_json_round_trip_and_refusal_of_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "x.json", {"ä": [1.5, np.float32(2), Path("p")]})
    assert read_json(tmp_path / "deep" / "x.json") == {"ä": [1.5, 2.0, "p"]}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "deep" / "x.json", float("nan"))
    assert read_json(tmp_path / "deep" / "x.json") == {"ä": [1.5, 2.0, "p"]}


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "earlier")

    def fail() -> None:
        with atomic_path(tmp_path / "x") as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(AsrKdError, match=r"x: could not be written \(No space left on device\); free space"):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "earlier")]
    (tmp_path / "file").write_text("")
    with pytest.raises(AsrKdError, match="could not be written"):
        write_text(tmp_path / "file" / "below", "a file is no folder")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from asr_kd.errors import AsrKdError
from asr_kd.stage import run_stage, write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def work(folder):
    for number in range(3):
        if not (folder / str(number)).exists():
            write_text(folder / str(number), "x" * 1000 * (number + 1))
            print("wrote", number)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    print(run_stage("toy", Path(sys.argv[1]), {}, {}, work).files)
except AsrKdError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limits on this system")
def test_a_stage_that_filled_the_disk_goes_on_when_there_is_space(tmp_path: Path) -> None:
    def run(limit: int) -> list[str]:
        return subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "s", str(limit)], capture_output=True, text=True, check=True).stdout.splitlines()

    assert run(1500) == ["wrote 0", f"{tmp_path / 's' / '1'}: could not be written (File too large); free space or choose another output_folder"]
    assert run(10_000) == ["wrote 1", "wrote 2", "{'0': 1000, '1': 2000, '2': 3000}"]
    assert run(10) == ["{'0': 1000, '1': 2000, '2': 3000}"]


SLOW_STAGE = """
import sys, time
from pathlib import Path
from asr_kd.stage import run_stage, write_text
def work(folder):
    print("at work", flush=True)
    for number in range(20):
        if not (folder / str(number)).exists():
            write_text(folder / str(number), str(number) * 2000)
            time.sleep(0.002)
run_stage("toy", Path(sys.argv[1]), {"size": 1}, {}, work)
print("done", flush=True)
"""


def test_a_stage_killed_again_and_again_ends_whole(tmp_path: Path) -> None:
    folder, everything = tmp_path / "s", set(map(str, range(20)))
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", SLOW_STAGE, folder], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if process.stdout.readline() != "done\n":
            time.sleep(0.04)
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        if process.communicate()[0] == "done\n" or (folder / "record.json").exists():
            break
        for path in folder.glob("[0-9]*"):
            assert path.read_text() == path.name * 2000
    assert kills > 0
    assert read_record(folder).files == {name: 2000 * len(name) for name in everything}
    assert {path.name for path in folder.iterdir()} - {"started.json"} == everything | {"record.json"}


def test_what_no_stage_wrote_is_not_touched(tmp_path: Path) -> None:
    """An output folder may be, or hold, a folder of the user's own."""
    def work(folder: Path) -> None:
        (folder / "whole").write_text("1")

    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".started.json.part-7").write_text("{")  # a stage killed as it began
    run_stage("s", tmp_path / "s", {}, {}, work)
    (tmp_path / "mine" / "speech").mkdir(parents=True)
    (tmp_path / "mine" / "speech" / "a.flac").write_bytes(b"x")
    with pytest.raises(AsrKdError, match=r"mine: holds files that no stage wrote \(speech\).*move them away or choose another output_folder"):
        run_stage("s", tmp_path / "mine", {}, {}, work)
    assert (tmp_path / "mine" / "speech" / "a.flac").read_bytes() == b"x"


def test_a_stage_killed_while_its_old_output_is_removed_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(folder: Path) -> None:
        for name in "abc":
            (folder / name).write_text("1")

    def removes_the_record_and_dies(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "record.json").unlink()
            raise KeyboardInterrupt

    run_stage("s", tmp_path / "s", {"size": 1}, {}, work)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", removes_the_record_and_dies)
        with pytest.raises(KeyboardInterrupt):
            run_stage("s", tmp_path / "s", {"size": 2}, {}, work)
    assert run_stage("s", tmp_path / "s", {"size": 2}, {}, work).files == {"a": 1, "b": 1, "c": 1}


def test_leftover_folders_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / ".build.part-1").mkdir()
        (folder / ".build.part-1" / "x").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("s", tmp_path / "s", {}, {}, dies)

    def work(folder: Path) -> None:
        (folder / ".build.part-2").mkdir()
        (folder / "whole").write_text("1")

    record = run_stage("s", tmp_path / "s", {}, {}, work)
    assert record.files == {"whole": 1}
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["record.json", "whole"]
