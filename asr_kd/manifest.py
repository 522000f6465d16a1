"""Utterances of a corpus: LibriSpeech's folder layout, and CSV manifests with SpeechBrain's columns."""

from __future__ import annotations

import csv
import logging
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asr_kd.audio import audio_duration_s
from asr_kd.errors import AsrKdError
from asr_kd.progress import progress
from asr_kd.stage import atomic_path

COLUMNS = ("ID", "duration", "wav", "spk_id", "wrd")
TRANSCRIPTS = ".trans.txt"  # how their files' names end
AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".snd", ".caf", ".sph", ".w64", ".rf64")  # in either case

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utterance:
    """One recording of one sentence by one speaker."""

    utt_id: str
    duration_s: float
    wav: Path
    spk_id: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Exclusion:
    """An utterance that was left out, and why."""

    utt_id: str
    reason: str


def load_split(split: str | Path, data_folder: Path | str = ".") -> tuple[list[Utterance], list[Exclusion]]:
    """Utterances of a split that can be used, and those that cannot.

    Args:
        split: a folder in the LibriSpeech layout below `data_folder`, or the path of a CSV manifest.
        data_folder: the folder that holds the splits (LibriSpeech's own root or the folder around it);
            takes the place of `$data_root` in a manifest.

    Raises:
        AsrKdError: no such split, duplicate ids, a broken manifest, or nothing usable in it.
    """
    if str(split).endswith(".csv"):
        utterances, exclusions = _usable(read_manifest(find_split(split, data_folder), data_root=data_folder))
    else:
        utterances, exclusions = librispeech_utterances(find_split(split, data_folder))
    if exclusions:
        log.warning("%s: %d of %d utterances left out (first: %s, %s)", split, len(exclusions), len(utterances) + len(exclusions),
                    exclusions[0].utt_id, exclusions[0].reason)
    if not utterances:
        raise AsrKdError(f"{split}: no usable utterance, {len(exclusions)} left out"
                         + (f" (first: {exclusions[0].utt_id}, {exclusions[0].reason})" if exclusions else "") + "; check the data folder")
    return utterances, exclusions


def load_splits(splits: Sequence[str | Path], data_folder: Path | str = ".") -> tuple[list[Utterance], list[Exclusion]]:
    """Several splits read together; an utterance id in two of them is an `AsrKdError`."""
    loaded = [load_split(split, data_folder) for split in splits]
    utterances = [utterance for part, _ in loaded for utterance in part]
    check_unique(utterances)
    return utterances, [exclusion for _, part in loaded for exclusion in part]


def find_split(split: str | Path, data_folder: Path | str) -> Path:
    """Where a split lies: below the data folder, below the LibriSpeech folder that archives unpack to, or a manifest's path as given.

    Raises:
        AsrKdError: nowhere of these; names the places.
    """
    root = Path(data_folder)
    candidates = [root / split, root / "LibriSpeech" / split] + ([Path(split)] if str(split).endswith(".csv") else [])
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise AsrKdError(f"{split}: not found at {' or '.join(map(str, candidates))}; check data_folder and the names of the splits")


def librispeech_utterances(split_folder: Path | str) -> tuple[list[Utterance], list[Exclusion]]:
    """Utterances below `split_folder`/SPEAKER/CHAPTER/ with their `*.trans.txt`, in order of id.

    Audio lies beside its transcript. Left out, with the reason: a transcript without audio or with two files of it, audio without a
    transcript beside it or at another depth, an empty transcript, unreadable or empty audio.

    Raises:
        AsrKdError: no transcript file at all, an id that has two transcripts, or a folder that cannot be read.
    """
    folder = Path(split_folder)
    files = files_below(folder)
    in_chapters = [path for path in files if len(path.relative_to(folder).parts) == 3]
    transcripts = _transcripts(folder, in_chapters)
    audio: dict[tuple[Path, str], list[Path]] = {}  # by folder and utterance id
    others: dict[tuple[Path, str], list[Path]] = {}
    for path in in_chapters:
        (audio if path.suffix.lower() in AUDIO_SUFFIXES else others).setdefault((path.parent, path.stem), []).append(path)
    utterances = []
    transcribed = {(trans_path.parent, utt_id) for utt_id, (trans_path, _) in transcripts.items()}
    exclusions = [Exclusion(utt_id, f"no transcript for {paths[0]}") for (parent, utt_id), paths in audio.items() if (parent, utt_id) not in transcribed]
    exclusions += [Exclusion(path.stem, f"{path} is not two folders below {folder}, expected a speaker's and a chapter's; move it beside its transcript")
                   for path in sorted(set(files) - set(in_chapters)) if path.suffix.lower() in AUDIO_SUFFIXES]
    for utt_id, (trans_path, words) in progress(sorted(transcripts.items()), desc=f"reading {folder.name}", unit="utt"):
        try:
            paths = audio.get((trans_path.parent, utt_id), [])
            if not paths:
                unknown = [path.name for path in others.get((trans_path.parent, utt_id), [])]
                raise AsrKdError(f"no audio beside {trans_path}" + (f" (found {', '.join(unknown)}, expected {' '.join(AUDIO_SUFFIXES)})" if unknown else ""))
            if len(paths) > 1:
                raise AsrKdError(f"{len(paths)} audio files beside {trans_path} ({', '.join(path.name for path in paths)}), expected one; remove the others")
            if not words:
                raise AsrKdError(f"empty transcript in {trans_path}")
            utterances.append(Utterance(utt_id, audio_duration_s(paths[0]), paths[0], trans_path.parent.parent.name, words))
        except AsrKdError as error:
            exclusions.append(Exclusion(utt_id, str(error)))
    return utterances, sorted(exclusions, key=lambda exclusion: exclusion.utt_id)


def read_manifest(path: Path | str, data_root: Path | str | None = None) -> list[Utterance]:
    """Rows of a CSV manifest with the columns ID, duration (seconds), wav, spk_id and wrd; others are ignored, but for `start` and `stop`.

    A relative `wav` is relative to the manifest's folder; `$data_root` or `{data_root}` in it stands for `data_root`.

    Raises:
        AsrKdError: the file cannot be read, a column is missing, a row is broken or a part of a recording, or an id occurs twice.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise AsrKdError(f"{path}: not readable as a CSV manifest ({error}); save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise AsrKdError(f"{path}: not readable as a CSV manifest ({error}); check the path in the settings") from error
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise AsrKdError(f"{path}: no column {', '.join(missing)}; found {', '.join(columns) or 'none'}, expected {', '.join(COLUMNS)}")
    if {"start", "stop"} & {column.lower() for column in columns}:
        raise AsrKdError(f"{path}: columns start, stop say where utterances lie within recordings, expected one file for each utterance; "
                         "cut the recordings, or remove the columns if they hold nothing else than whole files")
    for line, row in rows:
        if any("\n" in cell for cell in row.values() if isinstance(cell, str)):
            raise AsrKdError(f"{path} line {line}: the row of {row['ID']} that ends here holds an end of line within quotation marks, expected one row "
                             "per line; close the quotation mark, or double it where it is part of the text")
    utterances = [_from_row(path, line, row, data_root) for line, row in rows]
    check_unique(utterances, where=f"{path}: ")
    return utterances


def write_manifest(path: Path | str, utterances: Iterable[Utterance]) -> None:
    """Write a CSV manifest that `read_manifest` and SpeechBrain's `DynamicItemDataset.from_csv` read."""
    _write_csv(path, COLUMNS, ((u.utt_id, f"{u.duration_s:.6g}", u.wav.absolute(), u.spk_id, " ".join(u.words)) for u in utterances))


def write_exclusions(path: Path | str, exclusions: Iterable[Exclusion]) -> None:
    """Write the list of what was left out: columns ID, reason."""
    _write_csv(path, ("ID", "reason"), ((exclusion.utt_id, exclusion.reason) for exclusion in exclusions))


def check_unique(utterances: Iterable[Utterance], where: str = "") -> None:
    """Raise `AsrKdError` when an utterance id occurs twice."""
    counts = Counter(utterance.utt_id for utterance in utterances)
    repeated = [utt_id for utt_id, count in counts.items() if count > 1]
    if repeated:
        raise AsrKdError(f"{where}{repeated[0]}: utterance id occurs {counts[repeated[0]]} times ({len(repeated)} ids repeated); "
                         "ids must be unique across the splits read together")


def speech_files(split_folder: Path) -> list[Path]:
    """Transcripts and audio below a folder in the LibriSpeech layout, sorted; errors as `files_below`."""
    return [path for path in files_below(split_folder) if _is_speech(path)]


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder that is not hidden, sorted; links are followed, but not to a folder that they lie in.

    Hidden files are those of file managers and file systems (`._x.trans.txt`, `.nfs...`), not of a corpus.

    Raises:
        AsrKdError: a folder that cannot be read, or a transcript or audio whose name is not UTF-8, which no manifest could hold.
    """
    def refuse(error: OSError) -> None:
        raise AsrKdError(f"{error.filename}: folder not readable ({error.strerror}); change its permissions or remove it") from error

    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not Path(root).resolve().is_relative_to(Path(root, name).resolve())]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    for path in files:
        if _is_speech(path) and not _is_utf8(str(path)):
            raise AsrKdError(f"{os.fsencode(path)!r}: the name is not UTF-8; rename the file or its folder")
    return sorted(files)


def _is_speech(path: Path) -> bool:
    return path.name.endswith(TRANSCRIPTS) or path.suffix.lower() in AUDIO_SUFFIXES


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _transcripts(folder: Path, files: Sequence[Path]) -> dict[str, tuple[Path, tuple[str, ...]]]:
    transcripts: dict[str, tuple[Path, tuple[str, ...]]] = {}
    for path in files:
        if not path.name.endswith(TRANSCRIPTS):
            continue
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also end lines at what is a space in a line
        except UnicodeDecodeError as error:
            raise AsrKdError(f"{path}: transcripts not readable ({error}); save it as UTF-8") from error
        except OSError as error:
            raise AsrKdError(f"{path}: transcripts not readable ({error.strerror}); replace the file or remove it") from error
        for utt_id, *words in filter(None, map(str.split, lines)):
            if utt_id in transcripts:
                raise AsrKdError(f"{utt_id}: transcripts in {transcripts[utt_id][0]} and {path}; remove one of them")
            transcripts[utt_id] = (path, _words(" ".join(words)))
    if not transcripts:
        raise AsrKdError(f"{folder}: no SPEAKER/CHAPTER/*.trans.txt with transcripts in it; expected the LibriSpeech layout")
    return transcripts


def _words(text: str) -> tuple[str, ...]:
    """Words with composed accents (NFC), as those of lexicons and language models are read."""
    return tuple(unicodedata.normalize("NFC", text).split())


def _from_row(path: Path, line: int, row: dict[str, str | None], data_root: Path | str | None) -> Utterance:
    cells = {column: (row[column] or "").strip() for column in COLUMNS}
    if None in row or any(row[column] is None for column in COLUMNS):
        raise AsrKdError(f"{path} line {line}: another number of cells than the header has; quote cells that hold commas")
    for column in ("ID", "wav", "spk_id"):
        if not cells[column]:
            raise AsrKdError(f"{path} line {line}: empty {column}; every row needs one")
    if len(cells["ID"].split()) != 1:
        raise AsrKdError(f"{path} line {line}: ID {cells['ID']!r} holds a space; ids must be one word")
    try:
        duration_s = float(cells["duration"])
    except ValueError:
        duration_s = math.nan
    if not 0 <= duration_s < math.inf:
        raise AsrKdError(f"{path} line {line}: duration {cells['duration']!r} is no number of seconds")
    wav = cells["wav"]
    for name in ("$data_root", "{data_root}"):
        if name in wav:
            if data_root is None:
                raise AsrKdError(f"{path} line {line}: wav holds {name} but no data folder was given; set data_folder")
            wav = wav.replace(name, str(Path(data_root).absolute()))  # else relative to the manifest
    return Utterance(cells["ID"], duration_s, path.parent / wav, cells["spk_id"], _words(cells["wrd"]))


def _usable(utterances: Iterable[Utterance]) -> tuple[list[Utterance], list[Exclusion]]:
    """Rows whose audio exists and whose transcript is not empty; the audio itself is read by the feature stage."""
    kept, exclusions = [], []
    for utterance in utterances:
        if not utterance.wav.is_file():
            exclusions.append(Exclusion(utterance.utt_id, f"no audio at {utterance.wav}"))
        elif not utterance.words:
            exclusions.append(Exclusion(utterance.utt_id, "empty transcript"))
        else:
            kept.append(utterance)
    return kept, exclusions


def _write_csv(path: Path | str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
