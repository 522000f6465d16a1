"""Downloads from a local server that cuts connections, ignores ranges, serves other bytes, or has nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asr_kd import download as module
from asr_kd.download import CORPORA, RESOURCES, Retries, download, fetch_corpus, fetch_librispeech, fetch_resource, unpack
from asr_kd.errors import AsrKdError

CONTENT = bytes(range(256)) * 4000
QUICK = Retries(without_progress=3, wait_s=0.0, timeout_s=5.0)


def checksum(content: bytes, algorithm: str = "md5") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


@dataclass
class Behaviour:
    """What the server does; `ranges` collects the Range headers it was sent."""

    files: dict[str, bytes]
    cut_after: int | None = None
    ignore_range: bool = False
    fail_first: int = 0
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Behaviour]:
    behaviour = Behaviour({})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            behaviour.ranges.append(self.headers.get("Range"))
            if behaviour.fail_first:
                behaviour.fail_first -= 1
                return self.send_error(503)
            if self.path not in behaviour.files:
                return self.send_error(404)
            content, asked = behaviour.files[self.path], self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not behaviour.ignore_range else 0
            if start >= len(content) > 0:
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][:behaviour.cut_after])
            return None

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    behaviour.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield behaviour
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_cut_connection_is_continued_where_it_stopped(server: Behaviour, tmp_path: Path) -> None:
    server.files["/a"] = CONTENT
    server.cut_after = 300_000
    target = download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_part_left_by_a_killed_run_is_continued(server: Behaviour, tmp_path: Path) -> None:
    server.files["/a"] = CONTENT
    (tmp_path / "a.part").write_bytes(CONTENT[:1000])
    assert download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_whole_part_is_only_checked(server: Behaviour, tmp_path: Path) -> None:
    server.files["/a"] = CONTENT
    (tmp_path / "a.part").write_bytes(CONTENT)
    assert download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"something else", CONTENT + b"longer than the file"])
def test_a_part_of_another_file_is_thrown_away(server: Behaviour, tmp_path: Path, left: bytes) -> None:
    server.files["/a"] = CONTENT
    (tmp_path / "a.part").write_bytes(left)
    assert download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK).read_bytes() == CONTENT


def test_a_server_that_ignores_ranges_starts_over(server: Behaviour, tmp_path: Path) -> None:
    server.files["/a"] = CONTENT
    server.ignore_range = True
    (tmp_path / "a.part").write_bytes(CONTENT[:1000])
    assert download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT, "sha256"), QUICK).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_damaged_content_is_refused_and_the_next_mirror_is_asked(server: Behaviour, tmp_path: Path) -> None:
    server.files |= {"/bad": CONTENT[:-1] + b"!", "/good": CONTENT}
    with pytest.raises(AsrKdError, match=r"/bad: .*md5 \w{32}, expected \w{32}") as caught:
        download([f"{server.url}/bad"], tmp_path / "a", checksum(CONTENT), QUICK)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    urls = [f"{server.url}/missing", f"{server.url}/bad", f"{server.url}/good"]
    assert download(urls, tmp_path / "a", checksum(CONTENT), QUICK).read_bytes() == CONTENT


def test_errors_name_every_address_and_what_it_said(server: Behaviour, tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"/x: HTTP 404 .*/y: HTTP 404"):
        download([f"{server.url}/x", f"{server.url}/y"], tmp_path / "a", checksum(CONTENT), QUICK)
    assert len(server.ranges) == 2  # not found is not asked again
    server.fail_first = 100
    with pytest.raises(AsrKdError, match=r"HTTP 503 .* \(3 times\)"):
        download([f"{server.url}/x"], tmp_path / "a", checksum(CONTENT), QUICK)
    with pytest.raises(AsrKdError, match=r"Connection refused.*\(3 times\)"):
        download(["http://127.0.0.1:1/x"], tmp_path / "a", checksum(CONTENT), QUICK)
    with pytest.raises(AsrKdError, match="http://"):
        download(["file:///etc/hostname"], tmp_path / "a", checksum(CONTENT), QUICK)


def test_a_busy_server_is_asked_again(server: Behaviour, tmp_path: Path) -> None:
    server.files["/a"] = CONTENT
    server.fail_first = 2
    assert download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK).read_bytes() == CONTENT


def test_a_file_that_is_there_is_checked_not_fetched(server: Behaviour, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK)
    assert server.ranges == []
    (tmp_path / "a").write_bytes(b"damaged")
    with pytest.raises(AsrKdError, match=r"expected .*remove"):
        download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK)


def test_a_full_disk_is_said_and_keeps_what_came(server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/a"] = CONTENT
    monkeypatch.setattr(module, "BLOCK", 100_000)
    real = module._open_part

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, block: bytes) -> int:
            if self.file.tell() >= 200_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(block))

    monkeypatch.setattr(module, "_open_part", lambda part, start: Full(real(part, start)))
    with pytest.raises(AsrKdError, match=r"No space left on device.*free space"):
        download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK)
    assert (tmp_path / "a.part").read_bytes() == CONTENT[:200_000]
    monkeypatch.setattr(module, "_open_part", real)
    assert download([f"{server.url}/a"], tmp_path / "a", checksum(CONTENT), QUICK).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=200000-"]


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SPLIT = {"LibriSpeech/SPEAKERS.TXT": b"84 | F", "LibriSpeech/tiny/84/1/84-1.trans.txt": b"84-1-0000 HELLO\n", "LibriSpeech/tiny/84/1/84-1-0000.flac": b"fLaC"}


def test_a_corpus_is_fetched_unpacked_and_not_fetched_again(server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(SPLIT)
    monkeypatch.setitem(CORPORA, "tiny", ("99", checksum(content)))
    server.files["/resources/99/tiny.tar.gz"] = content
    for _ in range(2):
        split = fetch_corpus("tiny", tmp_path, [f"{server.url}/nothing", f"{server.url}/resources"], QUICK)
        assert (split / "84/1/84-1.trans.txt").read_bytes() == b"84-1-0000 HELLO\n"
    assert len(server.ranges) == 2
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".download.lock", "84-1-0000.flac", "84-1.trans.txt", "SPEAKERS.TXT"]


def test_two_runs_do_not_download_into_one_folder_at_a_time(server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(SPLIT)
    monkeypatch.setitem(CORPORA, "tiny", ("99", checksum(content)))
    server.files["/99/tiny.tar.gz"] = content
    inside, other_came, meanwhile = threading.Event(), threading.Event(), []

    def slow(archive: Path, folder: Path) -> None:
        inside.set()
        meanwhile.append(other_came.wait(0.3))
        unpack(archive, folder)

    monkeypatch.setattr(module, "unpack", slow)
    first = threading.Thread(target=fetch_corpus, args=("tiny", tmp_path, [server.url], QUICK))
    first.start()
    assert inside.wait(5)
    fetch_corpus("tiny", tmp_path, [server.url], QUICK)
    other_came.set()
    first.join()
    assert meanwhile == [False]
    assert len(server.ranges) == 1


def test_a_split_of_ones_own_below_the_librispeech_folder_is_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "LibriSpeech" / "mine").mkdir(parents=True)
    settings: Any = SimpleNamespace(data_folder=tmp_path, train_splits=["mine"], dev_splits=[], test_splits=[], lexicon=[], lm=None)
    fetch_librispeech(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["LibriSpeech"]
    settings.dev_splits = ["theirs"]
    with pytest.raises(AsrKdError, match="theirs: no split of this name to download"):
        fetch_librispeech(settings)


def test_settings_name_what_is_fetched(server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(SPLIT)
    monkeypatch.setitem(CORPORA, "tiny", ("99", checksum(content)))
    monkeypatch.setitem(RESOURCES, "words.txt", ("11", checksum(b"HELLO HH")))
    server.files |= {"/99/tiny.tar.gz": content, "/11/words.txt": b"HELLO HH"}
    monkeypatch.setattr(module.fetch_corpus, "__defaults__", ([server.url], QUICK))
    monkeypatch.setattr(module.fetch_resource, "__defaults__", ([server.url], QUICK))
    (tmp_path / "own").mkdir()
    (tmp_path / "lm.arpa").write_text("own")
    settings: Any = SimpleNamespace(data_folder=tmp_path, train_splits=["tiny"], dev_splits=["own", "mine.csv"], test_splits=["tiny"],
                                    lexicon=[tmp_path / "lm" / "words.txt"], lm=tmp_path / "lm.arpa")
    fetch_librispeech(settings)
    assert (tmp_path / "LibriSpeech" / "tiny" / "84").is_dir()
    assert (tmp_path / "lm" / "words.txt").read_bytes() == b"HELLO HH"
    settings.data_folder = tmp_path / "LibriSpeech"
    settings.dev_splits = []
    fetch_librispeech(settings)
    assert len(server.ranges) == 2
    settings.train_splits, settings.lm = ["other"], tmp_path / "lm.arpa.gz"
    with pytest.raises(AsrKdError, match=r"lm\.arpa\.gz: no file of this name"):
        fetch_librispeech(settings)
    assert len(server.ranges) == 2  # not after hours of other downloads


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"train-clean-7: no split .*train-clean-100, "):
        fetch_corpus("train-clean-7", tmp_path)
    with pytest.raises(AsrKdError, match=r"5-gram: no file .*librispeech-lexicon.txt"):
        fetch_resource("5-gram", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "no tar", "escape", "absolute"])
def test_a_broken_or_hostile_archive_leaves_nothing(tmp_path: Path, damage: str) -> None:
    hostile = {"escape": {**SPLIT, "../../outside": b"x"}, "absolute": {**SPLIT, "LibriSpeech/../../outside": b"x"}}
    content = archive_of(hostile.get(damage, {**SPLIT, "LibriSpeech/tiny/noise": hashlib.sha256(b"").digest() * 5000}))
    content = {"cut": content[:len(content) // 2], "no tar": b"<html>not found</html>"}.get(damage, content)
    folder = tmp_path / "deep" / "data"
    folder.mkdir(parents=True)
    (folder / "tiny.tar.gz").write_bytes(content)
    with pytest.raises(AsrKdError, match=r"tiny\.tar\.gz: broken archive"):
        unpack(folder / "tiny.tar.gz", folder)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["tiny.tar.gz"]
    assert not (folder / "LibriSpeech").exists()

