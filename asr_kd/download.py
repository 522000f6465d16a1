"""Download LibriSpeech (OpenSLR 12), mini LibriSpeech (31) and their lexicon and language models (11): checksummed, resumable."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from asr_kd.errors import AsrKdError
from asr_kd.progress import progress

if TYPE_CHECKING:
    from asr_kd.settings import Settings

MIRRORS = ("https://www.openslr.org/resources", "https://openslr.elda.org/resources", "https://openslr.trmal.net/resources",
           "https://openslr.magicdatatech.com/resources")

# 12 and 31: as in OpenSLR's own md5sum.txt. 11: as checked by public recipes (sha256: RWTH's i6_experiments; md5: pydrobert's LibriSpeech preparation)
CORPORA = {
    "dev-clean": ("12", "md5:42e2234ba48799c1f50f24a7926300a1"),
    "dev-other": ("12", "md5:c8d0bcc9cca99d4f8b62fcc847357931"),
    "test-clean": ("12", "md5:32fa31d27d2e1cad72775fee3f4849a9"),
    "test-other": ("12", "md5:fb5a50374b501bb3bac4815ee91d3135"),
    "train-clean-100": ("12", "md5:2a93770f6d5c6c964bc36631d331a522"),
    "train-clean-360": ("12", "md5:c0e676e450a7ff2f54aeade5171606fa"),
    "train-other-500": ("12", "md5:d1a0fd59409feb2c614ce4d30c387708"),
    "train-clean-5": ("31", "md5:5df7d4e78065366204ca6845bb08f490"),
    "dev-clean-2": ("31", "md5:6d7ab67ac6a1d2c993d050e16d61080d"),
}
RESOURCES = {
    "librispeech-lexicon.txt": ("11", "sha256:d722bc29908cd338ae738edd70f61826a6fca29aaa704a9493f0006773f79d71"),
    "3-gram.pruned.3e-7.arpa.gz": ("11", "md5:8f67ec741827742eee05799ab7605b50"),
    "3-gram.pruned.1e-7.arpa.gz": ("11", "md5:9a0f1325bcaf3a0f7b7be4be10823c2a"),
    "3-gram.arpa.gz": ("11", "sha256:263649573475c2991d3e755eb4e690c9d2656f2b3283a1eb589e1e4e174bf874"),
    "4-gram.arpa.gz": ("11", "sha256:f2b2d1507637ddf459d3579159f7e8099ed7d77452ff1059aeeeaea33d274613"),
}
BLOCK = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retries:
    """How often and how patiently a broken transfer is taken up again."""

    without_progress: int = 5
    wait_s: float = 2.0
    timeout_s: float = 30.0


class _MirrorError(Exception):
    """This address cannot serve the file; another may."""


class _ChecksumError(AsrKdError):
    """A file is not the one that was expected."""


def fetch_librispeech(settings: Settings) -> None:
    """Download what a recipe's settings name and is not there yet: lexicon and language model to their paths, splits into the data folder.

    Raises:
        AsrKdError: a name that is not to be downloaded, before anything is; else as `fetch_corpus`.
    """
    assert settings.data_folder is not None
    folder = Path(settings.data_folder)
    paths = [Path(path) for path in [*settings.lexicon, *([settings.lm] if settings.lm else [])] if not Path(path).exists()]
    splits = [split for split in dict.fromkeys([*settings.train_splits, *settings.dev_splits, *settings.test_splits])
              if not split.endswith(".csv") and not any((place / split).is_dir() for place in (folder, folder / "LibriSpeech"))]
    for path in paths:
        _known(path.name, RESOURCES, "file")
    for split in splits:
        _known(split, CORPORA, "split")
    for path in paths:
        fetch_resource(path.name, path.parent)
    for split in splits:
        fetch_corpus(split, folder)


def fetch_corpus(name: str, data_folder: Path | str, mirrors: Sequence[str] = MIRRORS, retries: Retries | None = None) -> Path:
    """Download and unpack a split, e.g. "train-clean-100"; return its folder, `data_folder`/LibriSpeech/name.

    A `data_folder` that is called LibriSpeech itself gets the split directly. A folder that is there is whole: it is moved
    into place after unpacking. The archive is removed then.

    Raises:
        AsrKdError: unknown name, no mirror serves it, wrong checksum, broken archive, or the disk is full.
    """
    number, checksum = _known(name, CORPORA, "split")
    folder = Path(data_folder)
    folder = folder.parent if folder.name == "LibriSpeech" else folder
    split = folder / "LibriSpeech" / name
    if split.is_dir():
        return split
    with _one_at_a_time(folder):
        if not split.is_dir():  # nor did another run fetch it meanwhile
            archive = download([f"{mirror}/{number}/{name}.tar.gz" for mirror in mirrors], folder / f"{name}.tar.gz", checksum, retries)
            unpack(archive, folder)
            if not split.is_dir():
                raise AsrKdError(f"{archive}: unpacked without LibriSpeech/{name}; remove it and download it again")
            archive.unlink()
    return split


def fetch_resource(name: str, folder: Path | str, mirrors: Sequence[str] = MIRRORS, retries: Retries | None = None) -> Path:
    """Download a lexicon or language model of OpenSLR 11 into `folder`; return its path."""
    number, checksum = _known(name, RESOURCES, "file")
    target = Path(folder) / name
    with nullcontext() if target.is_file() else _one_at_a_time(target.parent):
        return download([f"{mirror}/{number}/{name}" for mirror in mirrors], target, checksum, retries)


def download(urls: Sequence[str], target: Path | str, checksum: str, retries: Retries | None = None) -> Path:
    """Download a file from the first of several addresses that can serve it, continuing what an earlier try left.

    The transfer goes to `target`.part and is renamed when its checksum fits; a file that is there and fits is not fetched again.

    Args:
        urls: addresses of the same file, in order of preference.
        target: where to.
        checksum: "md5:..." or "sha256:...".
        retries: patience; an attempt that brought bytes does not count.

    Raises:
        AsrKdError: no address serves the file, wrong checksum, or the disk is full.
    """
    target, retries = Path(target), retries or Retries()
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise AsrKdError(f"{url}: expected an address that starts with http:// or https://")
    if target.is_file():
        _check(target, checksum, f"remove {target} and run again")
        return target
    _transfer_from_any(urls, target, checksum, retries)
    return target


def unpack(archive: Path | str, folder: Path | str) -> None:
    """Unpack a tar archive of a LibriSpeech folder so that each split below `folder`/LibriSpeech appears whole or not at all.

    Raises:
        AsrKdError: a broken archive, a member that would be written elsewhere, or the disk is full.
    """
    archive, folder = Path(archive), Path(folder)
    if not hasattr(tarfile, "data_filter"):
        raise AsrKdError("this Python's tarfile cannot unpack safely; update to the last patch release of your Python version")
    part = folder / f".{archive.name}.unpacking"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        with open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar, \
                progress(desc=f"unpacking {archive.name}", total=archive.stat().st_size, unit="B") as bar:
            for member in tar:
                tar.extract(member, part, filter="data")
                bar.update(file.tell() - bar.n)
        for path in sorted(part.glob("*/*"), key=lambda path: path.is_dir()):  # speaker tables first, splits last
            destination = folder / path.relative_to(part)
            destination.parent.mkdir(exist_ok=True)
            if not destination.exists():
                os.replace(path, destination)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise AsrKdError(f"{archive}: broken archive ({error}); remove it and download it again") from error
    except OSError as error:
        raise AsrKdError(f"{folder}: could not be written ({error.strerror or error}); free space or choose another data_folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other run downloads into a folder: two would write into one file and clear away what the other unpacks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".download.lock", "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise AsrKdError(f"{folder}: could not be written ({error.strerror or error}); choose another folder for what is downloaded") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another run that downloads into it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            log.warning("%s: this file system has no locks; see to it that no other run downloads into it", folder)
        yield


def _known(name: str, table: dict[str, tuple[str, str]], kind: str) -> tuple[str, str]:
    if name not in table:
        raise AsrKdError(f"{name}: no {kind} of this name to download, known are {', '.join(table)}; or give the path of your own")
    return table[name]


def _transfer_from_any(urls: Sequence[str], target: Path, checksum: str, retries: Retries) -> None:
    """Fill `target`.part from the addresses in turn until its checksum fits, then rename it."""
    part = target.with_name(target.name + ".part")
    problems: dict[str, str] = {}
    # what an earlier run left may be of another file: if the checksum says so, the first address gets a second, fresh try
    for url in [*urls[:1 if part.is_file() else 0], *urls]:
        try:
            _transfer(url, part, retries)
            _check(part, checksum, "another file or damaged on the way")
        except _MirrorError as error:
            problems[url] = str(error)
        except _ChecksumError as error:
            problems[url] = str(error)
            part.unlink()
        else:
            os.replace(part, target)
            return
    raise AsrKdError(f"{target}: not downloaded; " + "; ".join(f"{url}: {problem}" for url, problem in problems.items())
                     + "; check the network, or fetch the file yourself and give its path")


def _transfer(url: str, part: Path, retries: Retries) -> None:
    """Append to `part` until it is as long as the server says, over as many connections as that takes."""
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _continue(url, part, before, retries.timeout_s):
                return
            problem = "connection cut"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing beyond what is there: either all of it or another file's bytes, the checksum tells
                return
            if error.code not in (408, 429) and error.code < 500:
                raise _MirrorError(f"HTTP {error.code} {error.reason}") from error
            problem = f"HTTP {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if part.is_file() and part.stat().st_size > before else failures + 1
        if failures >= retries.without_progress:
            raise _MirrorError(f"{problem} ({failures} times)")
        log.info("%s: %s, continuing in %g s", url, problem, retries.wait_s)
        time.sleep(retries.wait_s)


def _continue(url: str, part: Path, start: int, timeout_s: float) -> bool:
    """One connection: ask for everything from byte `start`; True when the file is whole by the server's account."""
    headers = {"User-Agent": "asr-kd", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s) as response:
        if not (response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")):
            start = 0  # the server sends the whole file, whatever was asked for
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        with _open_part(part, start) as file, progress(desc=part.stem, total=total, unit="B") as bar:
            bar.update(start)
            while block := response.read(BLOCK):
                _write(file, block, part)
                bar.update(len(block))
    return total is None or part.stat().st_size == total


def _open_part(part: Path, start: int) -> IO[bytes]:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        return open(part, "ab" if start else "wb", buffering=0)
    except OSError as error:
        raise _cannot_write(part, error) from error


def _write(file: IO[bytes], block: bytes, part: Path) -> None:
    try:
        written = file.write(block)
    except OSError as error:
        raise _cannot_write(part, error) from error
    if written != len(block):
        raise _cannot_write(part, OSError("only part of a block was taken"))


def _cannot_write(part: Path, error: OSError) -> AsrKdError:
    return AsrKdError(f"{part}: could not be written ({error.strerror or error}); free space or choose another folder, the download will continue")


def _check(path: Path, checksum: str, remedy: str) -> None:
    algorithm, _, expected = checksum.partition(":")
    if algorithm not in ("md5", "sha256"):
        raise AsrKdError(f"checksum {checksum!r}: expected md5:... or sha256:...")
    found = _digest(path, algorithm)
    if found != expected.lower():
        raise _ChecksumError(f"{path}: {algorithm} {found}, expected {expected}; {remedy}")


def _digest(path: Path, algorithm: str) -> str:
    digest: Any = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file, progress(desc=f"checking {path.name}", total=path.stat().st_size, unit="B") as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return str(digest.hexdigest())
