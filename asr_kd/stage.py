"""Stages: folders that are either whole and recorded, or not there.

A stage writes into its folder; `record.json`, written last, says what went in. A re-run skips a stage whose record
still matches, redoes one whose record does not, and continues one that was cut off (`started.json` without `record.json`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_kd import __version__
from asr_kd.distributed import by_first_process, rank, wait_for_all
from asr_kd.errors import AsrKdError

RECORD = "record.json"
STARTED = "started.json"

log = logging.getLogger(__name__)


@contextmanager
def atomic_path(target: Path | str, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Give a path beside `target` to write to; on success it is flushed to disk and renamed to `target`, else removed.

    Args:
        failures: what the writer raises, beside OSError, when it cannot write.

    Raises:
        AsrKdError: the disk is full or the folder cannot be written to.
    """
    target = Path(target)
    caught: tuple[type[Exception], ...] = (OSError, *failures)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.chmod(0o644)  # some writers make files that only their owner can read
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_folder(target.parent)
    except caught as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise AsrKdError(f"{target}: could not be written ({reason}); free space or choose another output_folder") from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(target: Path | str, text: str) -> None:
    """Write `text` to `target` so that a reader sees the old file or the whole new one."""
    with atomic_path(target) as part:
        part.write_text(text, encoding="utf-8")


def write_json(target: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(target, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process however that ends; `AsrKdError` where another run has it.

    Two runs in one folder would each remove what the other has begun. Of the processes of one run the first holds it.
    """
    if rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AsrKdError(f"{folder}: another run works here; wait until it has ended or give another output_folder") from error
        except OSError:
            log.warning("%s: this file system has no locks; see to it that no other run works here", folder)
        yield


def read_json(path: Path | str) -> Any:
    """Read a JSON file; an unreadable or cut-off one is an `AsrKdError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AsrKdError(f"{path}: not readable as JSON ({error}); remove it and run the stage that writes it again") from error


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that identify a JSON-able value (order of keys does not matter)."""
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path | str) -> str:
    """Sixteen hexadecimal digits that identify a file's bytes.

    Raises:
        AsrKdError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise AsrKdError(f"{path}: could not be read ({error.strerror}); check the path in the settings") from error
    return digest.hexdigest()[:16]


def file_state(path: Path) -> list[object]:
    """Size and time of the last change (ns), which tell without reading a file whether it is another one; "missing" where there is none."""
    if not path.is_file():
        return ["missing"]
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def folder_fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that identify the files below a folder."""
    return fingerprint([[str(path.relative_to(folder)), file_fingerprint(path)] for path in sorted(folder.rglob("*")) if path.is_file()])


@dataclass(frozen=True)
class Record:
    """What went into a stage's folder, and what it holds."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    version: str
    seconds: float
    files: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Identifies this output: the same stage, settings and inputs give the same value."""
        return fingerprint([self.stage, self.settings, self.inputs, self.version])


def read_record(folder: Path | str) -> Record:
    """The record of a finished stage folder.

    Raises:
        AsrKdError: the stage never finished, or a file it wrote is missing or of another size.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise AsrKdError(f"{folder}: no finished output here (no {RECORD}); run the stage that writes it again")
    try:
        record = Record(**read_json(folder / RECORD))
    except TypeError as error:
        raise AsrKdError(f"{folder / RECORD}: not a stage's record ({error}); remove {folder} and run the stage again") from error
    for name, size in record.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise AsrKdError(f"{path}: {'missing' if found is None else f'{found} bytes'}, expected {size} bytes; "
                             f"remove {folder} and run the {record.stage} stage again")
    return record


def run_stage(stage: str, folder: Path | str, settings: Mapping[str, Any], inputs: Mapping[str, str], work: Callable[[Path], None], *,
              together: bool = False) -> Record:
    """Run `work(folder)` unless `folder` already holds its result; return the record.

    Under `torchrun` the first process looks at the folder and writes the records; the others come back when the stage is finished.

    Args:
        stage: name for messages and for the record.
        folder: where `work` writes. What a cut-off run of the same settings and inputs left there is kept for `work` to continue from.
        settings: everything that decides the result, JSON-able.
        inputs: name -> fingerprint of each input.
        work: writes the stage's files; must write anything it would continue from atomically.
        together: all processes do `work`, each its share, instead of the first one alone.
    """
    folder, is_first = Path(folder), rank() == 0
    wanted = {"stage": stage, "settings": json.loads(json.dumps(dict(settings), default=_plain)), "inputs": dict(inputs), "version": __version__}
    finished = by_first_process(lambda: _finished(folder, wanted))
    if finished is not None:
        return finished
    spent = by_first_process(lambda: _begin(folder, wanted))
    start = time.monotonic()
    try:
        if is_first or together:
            work(folder)
        if together:
            wait_for_all()
    except BaseException:
        if is_first and folder.is_dir():
            _note_time(folder / STARTED, wanted, spent + time.monotonic() - start)
        raise
    return by_first_process(lambda: _finish(folder, wanted, spent + time.monotonic() - start))


def _finished(folder: Path, wanted: dict[str, Any]) -> Record | None:
    """The record of an earlier run with the same settings and inputs, if its files are whole."""
    earlier = _read_if_whole(folder / RECORD)
    if earlier is not None and {key: earlier.get(key) for key in wanted} == wanted:
        with suppress(AsrKdError):  # a file was lost after the record was written: redo the stage
            return read_record(folder)
    return None


def _begin(folder: Path, wanted: dict[str, Any]) -> float:
    """Prepare the folder, keeping what a cut-off run of the same left there; the seconds that it spent."""
    _check_ours(folder, wanted["stage"])
    started = _read_if_whole(folder / STARTED)
    spent = float(started.pop("seconds", 0.0)) + _seconds_of_killed(folder) if started else 0.0
    if started != wanted:
        if (earlier := _read_if_whole(folder / RECORD)) is not None:
            log.info("%s: made anew, for %s", folder, _what_changed(earlier, wanted))
        remove_folder(folder)
        spent = 0.0
    (folder / RECORD).unlink(missing_ok=True)
    write_json(folder / STARTED, {**wanted, "seconds": spent})
    return spent


def _what_changed(earlier: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In what a finished stage differs from the one that is wanted, in words."""
    changed = [] if earlier.get("version") == wanted["version"] else ["version"]
    for part in ("settings", "inputs"):
        before, now = earlier.get(part) or {}, wanted[part]
        changed += sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return f"{', '.join(changed)} changed" if changed else "files of it were lost"


def _seconds_of_killed(folder: Path) -> float:
    """How long a run that was killed, and so noted no time, is known to have worked here: from its beginning to the last file that it wrote."""
    return max(0.0, max(path.stat().st_mtime for path in folder.rglob("*")) - (folder / STARTED).stat().st_mtime)


def _check_ours(folder: Path, stage: str) -> None:
    """Raise `AsrKdError` where there is something that no stage wrote: it may be the user's own."""
    if not folder.exists() or (folder / STARTED).is_file() or (folder / RECORD).is_file():
        return
    found = sorted(path.name for path in folder.iterdir() if not path.match(".*.part-*")) if folder.is_dir() else [folder.name]
    if found:
        raise AsrKdError(f"{folder}: holds files that no stage wrote ({', '.join(found[:3])}), expected nothing there; the {stage} stage would "
                         "replace them: move them away or choose another output_folder")


def remove_folder(folder: Path) -> None:
    """Remove a folder; under another name first, since a kill would leave part of it that looks like the whole."""
    trash = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _finish(folder: Path, wanted: dict[str, Any], seconds: float) -> Record:
    """Write the record."""
    for left in [*folder.rglob(".*.part-*")]:  # by a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))
             if path.is_file() and path.name not in (STARTED, RECORD)}
    record = Record(**wanted, seconds=round(seconds, 3), files=files)
    write_json(folder / RECORD, record.__dict__)
    (folder / STARTED).unlink(missing_ok=True)
    return record


def combined(stage: str, records: Mapping[str, Record]) -> Record:
    """One record for several folders of a stage: their fingerprints as inputs, their seconds added."""
    inputs = {name: record.fingerprint for name, record in records.items()}
    return Record(stage, {}, inputs, __version__, round(sum(record.seconds for record in records.values()), 3), {})


def _note_time(path: Path, wanted: dict[str, Any], seconds: float) -> None:
    """Remember how long a cut-off stage ran; failing to do so must not hide why it was cut off."""
    with suppress(AsrKdError):
        write_json(path, {**wanted, "seconds": seconds})


def _read_if_whole(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except AsrKdError:
        return None
    return value if isinstance(value, dict) else None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """JSON form of what settings commonly hold: paths, numpy scalars, tuples."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON-able: {value!r}")
