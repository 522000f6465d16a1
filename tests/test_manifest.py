"""LibriSpeech folders and CSV manifests, whole and broken."""

from __future__ import annotations

import csv
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.errors import AsrKdError
from asr_kd.manifest import Exclusion, Utterance, librispeech_utterances, load_split, load_splits, read_manifest, write_exclusions, write_manifest

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def make_chapter(root: Path, split: str, spk: str, transcripts: dict[str, str], audio: list[str], chapter: str = "7") -> Path:
    """One chapter in the LibriSpeech layout, a tenth of a second per utterance."""
    folder = root / split / spk / chapter
    folder.mkdir(parents=True)
    (folder / f"{spk}-{chapter}.trans.txt").write_text("".join(f"{utt_id} {words}\n" for utt_id, words in transcripts.items()))
    for utt_id in audio:
        soundfile.write(folder / f"{utt_id}.flac", np.zeros(1600), 16000)
    return folder


def test_the_librispeech_layout_is_read_in_order(tmp_path: Path) -> None:
    make_chapter(tmp_path, "dev", "84", {"84-7-0001": "B C", "84-7-0000": "A"}, ["84-7-0000", "84-7-0001"])
    folder = make_chapter(tmp_path, "dev", "19", {"19-7-0000": "IT'S"}, ["19-7-0000"])
    utterances, exclusions = load_split("dev", tmp_path)
    assert exclusions == []
    assert [u.utt_id for u in utterances] == ["19-7-0000", "84-7-0000", "84-7-0001"]
    assert utterances[0] == Utterance("19-7-0000", 0.1, folder / "19-7-0000.flac", "19", ("IT'S",))


def test_the_folder_around_librispeech_serves_too(tmp_path: Path) -> None:
    make_chapter(tmp_path / "LibriSpeech", "dev", "84", {"84-7-0000": "A"}, ["84-7-0000"])
    assert load_split("dev", tmp_path) == load_split("dev", tmp_path / "LibriSpeech")


def test_what_cannot_be_used_is_counted_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transcripts = {"84-7-0000": "A", "84-7-0001": "NO AUDIO", "84-7-0002": "", "84-7-0004": "TEXT", "84-7-0005": "ZERO"}
    folder = make_chapter(tmp_path, "dev", "84", transcripts, ["84-7-0000", "84-7-0002", "84-7-0003"])
    (folder / "84-7-0004.flac").write_text("not audio")
    soundfile.write(folder / "84-7-0005.wav", np.zeros(0), 16000)
    utterances, exclusions = load_split("dev", tmp_path)
    assert [u.utt_id for u in utterances] == ["84-7-0000"]
    assert [(e.utt_id, e.reason.split(f" {tmp_path}")[0].split("; ")[0].split(": ")[-1]) for e in exclusions] == [
        ("84-7-0001", "no audio beside"), ("84-7-0002", "empty transcript in"), ("84-7-0003", "no transcript for"),
        ("84-7-0004", "not readable as audio (Format not recognised)"), ("84-7-0005", "no samples")]
    assert "5 of 6 utterances left out" in caplog.text
    write_exclusions(tmp_path / "exclusions.csv", exclusions)
    with open(tmp_path / "exclusions.csv", newline="") as file:
        assert [Exclusion(row["ID"], row["reason"]) for row in csv.DictReader(file)] == exclusions


def test_audio_is_taken_from_beside_its_transcript(tmp_path: Path) -> None:
    folder = make_chapter(tmp_path, "dev", "84", {"84-7-0000": "A"}, ["84-7-0000"])
    other = make_chapter(tmp_path, "dev", "99", {"99-7-0000": "B"}, ["99-7-0000"])
    soundfile.write(other / "84-7-0000.flac", np.zeros(3200), 16000)
    utterances, exclusions = load_split("dev", tmp_path)
    assert [(u.utt_id, u.duration_s, u.wav.parent) for u in utterances] == [("84-7-0000", 0.1, folder), ("99-7-0000", 0.1, other)]
    assert exclusions == [Exclusion("84-7-0000", f"no transcript for {other / '84-7-0000.flac'}")]


def test_only_ends_of_lines_end_transcripts(tmp_path: Path) -> None:
    folder = make_chapter(tmp_path, "dev", "84", {}, ["84-7-0000", "84-7-0001"])
    (folder / "84-7.trans.txt").write_bytes("84-7-0000 ONE\x85TWO\u2028THREE\r\n84-7-0001 FOUR\x0bFIVE\n".encode())
    utterances, exclusions = load_split("dev", tmp_path)
    assert [u.words for u in utterances] == [("ONE", "TWO", "THREE"), ("FOUR", "FIVE")]
    assert exclusions == []


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="names of files are not UTF-8 here")
def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = make_chapter(tmp_path, "dev", "84", {"84-7-0000": "A"}, ["84-7-0000"])
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/Ger\xe4t.txt")).write_text("a note")
    except OSError:
        pytest.skip("this file system refuses such names itself")
    assert len(load_split("dev", tmp_path)[0]) == 1
    os.rename(folder / "84-7-0000.flac", os.fsencode(folder) + b"/\xe9t\xe9.flac")
    with pytest.raises(AsrKdError, match=r"xe9t.xe9\.flac': the name is not UTF-8; rename"):
        load_split("dev", tmp_path)


def test_the_data_root_of_a_manifest_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "m.csv").write_text("ID,duration,wav,spk_id,wrd\na,0.1,$data_root/a.wav,s,A\n")
    soundfile.write(tmp_path / "data" / "a.wav", np.zeros(1600), 16000)
    monkeypatch.chdir(tmp_path)
    for split, root in (("m.csv", "data"), ("data/m.csv", "data"), ("data/m.csv", tmp_path / "data")):
        utterances, _ = load_split(split, root)
        assert utterances[0].wav.samefile(tmp_path / "data" / "a.wav")


def test_two_audio_files_of_one_utterance_are_left_out_and_suffixes_have_any_case(tmp_path: Path) -> None:
    folder = make_chapter(tmp_path, "dev", "84", {"84-7-0000": "A", "84-7-0001": "B"}, ["84-7-0000"])
    soundfile.write(folder / "84-7-0000.wav", np.zeros(3200), 16000)
    for name in ("84-7-0001.FLAC", "84-7-0002.FLAC"):
        soundfile.write(folder / name, np.zeros(1600), 16000, format="FLAC")
    utterances, exclusions = load_split("dev", tmp_path)
    assert [(u.utt_id, u.wav.name) for u in utterances] == [("84-7-0001", "84-7-0001.FLAC")]
    assert [(e.utt_id, e.reason.split(f" {tmp_path}")[0]) for e in exclusions] == [("84-7-0000", "2 audio files beside"), ("84-7-0002", "no transcript for")]
    assert "(84-7-0000.flac, 84-7-0000.wav), expected one" in exclusions[0].reason


def test_audio_at_other_depths_and_of_unknown_suffix_is_listed(tmp_path: Path) -> None:
    folder = make_chapter(tmp_path, "dev", "84", {"84-7-0000": "A", "84-7-0001": "B"}, ["84-7-0000"])
    for path in (folder / "deep" / "84-7-0002.flac", folder.parent / "84-7-0003.wav", folder.parents[1] / "84-7-0004.wav"):
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.zeros(1600), 16000)
    (folder / "84-7-0001.m4a").write_bytes(b"audio")
    (folder / "again").symlink_to(folder.parents[1])  # a link to a folder around it is not followed
    utterances, exclusions = load_split("dev", tmp_path)
    assert [u.utt_id for u in utterances] == ["84-7-0000"]
    assert [e.utt_id for e in exclusions] == ["84-7-0001", "84-7-0002", "84-7-0003", "84-7-0004"]
    assert "no audio beside" in exclusions[0].reason
    assert "(found 84-7-0001.m4a, expected .flac .wav" in exclusions[0].reason
    assert exclusions[1].reason == (f"{folder}/deep/84-7-0002.flac is not two folders below {tmp_path}/dev, expected a speaker's and a chapter's; "
                                    "move it beside its transcript")


@pytest.mark.parametrize("suffix", [".aif", ".aiff", ".au", ".caf", ".flac", ".oga", ".ogg", ".rf64", ".snd", ".sph", ".w64", ".wav"])
def test_formats_that_soundfile_reads_are_audio(tmp_path: Path, suffix: str) -> None:
    form = {".aif": "AIFF", ".snd": "AU", ".sph": "NIST", ".oga": "OGG"}.get(suffix, suffix[1:].upper())
    folder = make_chapter(tmp_path, "dev", "84", {"84-7-0000": "A"}, [])
    soundfile.write(folder / f"84-7-0000{suffix}", np.zeros(1600), 16000, format=form)
    assert [u.wav.name for u in load_split("dev", tmp_path)[0]] == [f"84-7-0000{suffix}"]


def test_a_folder_or_transcripts_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_chapter(tmp_path, "dev", "84", {"84-7-0000": "A"}, ["84-7-0000"])
    real = os.scandir

    def refused(path: str) -> object:
        if str(path) == str(folder.parent):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        with pytest.raises(AsrKdError, match=r"dev/84: folder not readable \(Permission denied\); change its permissions or remove it"):
            load_split("dev", tmp_path)
    transcripts = folder / "84-7.trans.txt"
    transcripts.write_text("84-7-0000 A\n", encoding="utf-16")
    with pytest.raises(AsrKdError, match=r"84-7\.trans\.txt: transcripts not readable .*; save it as UTF-8"):
        load_split("dev", tmp_path)
    transcripts.unlink()
    transcripts.symlink_to(tmp_path / "nowhere")
    with pytest.raises(AsrKdError, match=r"84-7\.trans\.txt: transcripts not readable \(No such file or directory\); replace the file or remove it"):
        load_split("dev", tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path: Path) -> None:
    folder = make_chapter(tmp_path, "dev", "84", {"\ufeff84-7-0000": "A", "84-7-0001": "B"}, ["84-7-0000", "84-7-0001"])
    assert (folder / "84-7.trans.txt").read_bytes().startswith(b"\xef\xbb\xbf")
    utterances, exclusions = load_split("dev", tmp_path)
    assert [u.utt_id for u in utterances] == ["84-7-0000", "84-7-0001"]
    assert exclusions == []


def test_ids_must_be_unique(tmp_path: Path) -> None:
    make_chapter(tmp_path, "dev", "84", {"84-7-0000": "A"}, ["84-7-0000"])
    make_chapter(tmp_path, "train", "84", {"84-7-0000": "A", "84-7-0001": "B"}, ["84-7-0000", "84-7-0001"])
    with pytest.raises(AsrKdError, match=r"84-7-0000: utterance id occurs 2 times \(1 ids repeated\).*splits read together"):
        load_splits(["dev", "train"], tmp_path)
    make_chapter(tmp_path, "dev", "84", {"84-7-0000": "A"}, [], chapter="8")
    with pytest.raises(AsrKdError, match=r"84-7-0000: transcripts in .*84-7\.trans\.txt and .*84-8\.trans\.txt"):
        load_split("dev", tmp_path)


def test_a_missing_or_empty_split_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"dev-clean: not found at .*dev-clean or .*LibriSpeech/dev-clean; check data_folder"):
        load_split("dev-clean", tmp_path)
    (tmp_path / "dev").mkdir()
    with pytest.raises(AsrKdError, match=r"dev: no SPEAKER/CHAPTER/\*\.trans\.txt"):
        load_split("dev", tmp_path)
    make_chapter(tmp_path, "mute", "84", {"84-7-0000": "A"}, [])
    with pytest.raises(AsrKdError, match=r"mute: no usable utterance, 1 left out \(first: 84-7-0000, no audio"):
        load_split("mute", tmp_path)


words = st.lists(st.text("ABÄß'\",;-日", min_size=1), max_size=5).map(tuple)
ids = st.text("abz019-_.", min_size=1)


@settings(deadline=None, max_examples=20)
@given(st.dictionaries(ids, st.tuples(words, ids, st.floats(0.01, 1e4)), max_size=5))
def test_a_manifest_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, tuple[tuple[str, ...], str, float]]) -> None:
    path = tmp_path_factory.mktemp("manifest") / "dev.csv"
    utterances = [Utterance(utt_id, float(f"{seconds:.6g}"), Path(f"/data/{utt_id}.flac"), spk, spoken) for utt_id, (spoken, spk, seconds) in rows.items()]
    write_manifest(path, utterances)
    assert read_manifest(path) == utterances


def test_accents_are_composed_in_words_and_left_in_ids(tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text("ID,duration,wav,spk_id,wrd\ne\u0301-1,1.5,/a.wav,s,cafe\u0301 A\n")
    (utterance,) = read_manifest(tmp_path / "dev.csv")
    assert (utterance.utt_id, utterance.words) == ("e\u0301-1", ("caf\u00e9", "A"))
    make_chapter(tmp_path, "dev", "84", {"84-7-0000": "cafe\u0301"}, ["84-7-0000"])
    assert load_split("dev", tmp_path)[0][0].words == ("caf\u00e9",)


def test_our_manifest_has_the_form_that_speechbrain_writes(tmp_path: Path) -> None:
    write_manifest(tmp_path / "dev.csv", [Utterance("84-7-0000", 1.5, Path("/data/a.flac"), "84", ("A", "B"))])
    assert (tmp_path / "dev.csv").read_text() == "ID,duration,wav,spk_id,wrd\n84-7-0000,1.5,/data/a.flac,84,A B\n"


def manifest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "m.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_manifest_as_speechbrain_recipes_write_it(tmp_path: Path) -> None:
    path = manifest(tmp_path, "\ufeffID,duration,wav,spk_id,wrd,extra\n"
                              "a, 1.25, $data_root/x/a.flac, s1, HELLO  WORLD, 1\nb,2,{data_root}/b.wav,s1,,2\nc,3,sub/c.wav,s2,\"ONE, TWO\",3\n")
    assert read_manifest(path, data_root="/corpus") == [
        Utterance("a", 1.25, Path("/corpus/x/a.flac"), "s1", ("HELLO", "WORLD")), Utterance("b", 2.0, Path("/corpus/b.wav"), "s1", ()),
        Utterance("c", 3.0, tmp_path / "sub/c.wav", "s2", ("ONE,", "TWO"))]
    with pytest.raises(AsrKdError, match=r"line 2: wav holds \$data_root but no data folder"):
        read_manifest(path)


def test_a_manifest_split_leaves_out_what_is_missing(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    path = manifest(tmp_path, "ID,duration,wav,spk_id,wrd\na,0.1,a.wav,s,A\nb,0.1,b.wav,s,B\nc,0.1,a.wav,s,\n")
    utterances, exclusions = load_split(path)
    assert [u.utt_id for u in utterances] == ["a"]
    assert exclusions == [Exclusion("b", f"no audio at {tmp_path / 'b.wav'}"), Exclusion("c", "empty transcript")]
    assert load_split("m.csv", tmp_path) == (utterances, exclusions)


@pytest.mark.parametrize(("text", "message"), [
    ("ID,duration,wav,speaker\na,1,a.wav,s\n", r"no column spk_id, wrd; found ID, duration, wav, speaker, expected ID, duration, wav, spk_id, wrd"),
    ("", r"no column ID.*found none"),
    ("ID,duration,wav,spk_id,wrd\na,long,a.wav,s,A\n", r"line 2: duration 'long' is no number of seconds"),
    ("ID,duration,wav,spk_id,wrd\na,nan,a.wav,s,A\n", r"line 2: duration 'nan'"),
    ("ID,duration,wav,spk_id,wrd\na,1,a.wav,s\n", r"line 2: another number of cells"),
    ("ID,duration,wav,spk_id,wrd\na,1,a.wav,s,ONE, TWO\n", r"line 2: another number of cells"),
    ("ID,duration,wav,spk_id,wrd\n,1,a.wav,s,A\n", r"line 2: empty ID"),
    ("ID,duration,wav,spk_id,wrd\na,1,,s,A\n", r"line 2: empty wav"),
    ("ID,duration,wav,spk_id,wrd\na b,1,a.wav,s,A\n", r"line 2: ID 'a b' holds a space"),
    ('ID,duration,wav,spk_id,wrd\na,1,a.wav,s,A\nb,1,b.wav,s,"TIS B\nc,1,c.wav,s,C\nd,1,d.wav,s,"D"\n',
     r"line 5: the row of b .* end of line within quotation marks"),
    ("ID,duration,wav,spk_id,wrd\na,1,a.wav,s,A\nb,1,b.wav,s,B\na,1,c.wav,s,C\n", r"a: utterance id occurs 2 times"),
])
def test_broken_manifests_are_errors_that_say_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AsrKdError, match=r"m\.csv.*" + message):
        read_manifest(manifest(tmp_path, text))


def test_parts_of_recordings_are_refused(tmp_path: Path) -> None:
    path = manifest(tmp_path, "ID,duration,wav,start,stop,spk_id,wrd\nu1,2.0,a.wav,0,32000,s,HELLO\n")
    with pytest.raises(AsrKdError, match=r"columns start, stop .* cut the recordings"):
        read_manifest(path)


def test_unreadable_manifests(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"none\.csv: not readable as a CSV manifest"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(AsrKdError, match=r"binary\.csv: not readable .*; save it as UTF-8"):
        read_manifest(tmp_path / "binary.csv")


@pytest.mark.skipif(not (REAL / "unpack.py").is_file(), reason="shared/data with mini LibriSpeech is not beside the repository")
def test_real_librispeech_folders_have_the_published_numbers(tmp_path: Path) -> None:
    """dev-mini: 151 utterances of 4 speakers, 0.52 h, 4,957 words (its README)."""
    with tarfile.open(REAL / "mini-librispeech-opus.tar") as tar:
        tar.extractall(tmp_path, members=[m for m in tar if "dev-mini" in m.name], filter="data")
    folder = next(path for path in tmp_path.rglob("dev-mini"))
    utterances, exclusions = librispeech_utterances(folder)
    assert (len(utterances), exclusions, len({u.spk_id for u in utterances})) == (151, [], 4)
    assert sum(len(u.words) for u in utterances) == 4957
    assert sum(u.duration_s for u in utterances) / 3600 == pytest.approx(0.52, abs=0.005)
