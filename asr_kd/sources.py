"""Where an experiment's speech, lexicon and language model come from: given paths, the synthetic corpus, or a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asr_kd.distributed import rank, wait_for_all
from asr_kd.errors import AsrKdError
from asr_kd.settings import Settings
from asr_kd.stage import Record, read_record


@dataclass(frozen=True)
class Sources:
    """Paths of what an experiment starts from.

    Attributes:
        data_folder: holds the splits.
        lexicon: lexicon files.
        lm: ARPA file, or None to estimate one.
        lm_text: text to estimate it from; None takes the training transcripts.
    """

    data_folder: Path
    lexicon: list[Path]
    lm: Path | None
    lm_text: Path | None


def find_sources(settings: Settings) -> tuple[Sources, Record]:
    """Make, download or find the corpus.

    Raises:
        AsrKdError: a path of the settings is not there; no split to train on; espeak-ng is needed for the synthetic corpus and not installed.
    """
    if settings.synthetic_minutes is not None:
        return _synthetic(settings)
    assert settings.data_folder is not None
    if not settings.lexicon:
        raise AsrKdError("lexicon: none given; give the path of one with --lexicon (Kaldi's or CMUdict's format)")
    if settings.download:
        from asr_kd.download import fetch_librispeech

        if rank() == 0:
            fetch_librispeech(settings)
        wait_for_all()
    paths = {"data_folder": settings.data_folder, "lm": settings.lm, "lm_text": settings.lm_text}
    for name, path in [*paths.items(), *(("lexicon", path) for path in settings.lexicon)]:
        if path is not None and not Path(path).exists():
            download = "" if name == "lm_text" else ", or --download true for LibriSpeech's own"
            raise AsrKdError(f"{name}: {path} is not there; give its path with --{name}{download}")
    lm, lm_text = (Path(path) if path else None for path in (settings.lm, settings.lm_text))
    sources = Sources(Path(settings.data_folder), [Path(path) for path in settings.lexicon], lm, lm_text)
    return sources, Record("sources", {}, {}, "", 0.0, {})


def _synthetic(settings: Settings) -> tuple[Sources, Record]:
    from asr_kd.synthetic import make_corpus

    if not settings.train_splits:
        raise AsrKdError(f"train_splits: no split, expected at least one of {', '.join(settings.synthetic_minutes or {})} (synthetic_minutes); name it")
    corpus = make_corpus(settings.output / "corpus", minutes=settings.synthetic_minutes, seed=settings.seed, num_jobs=settings.num_jobs)
    return Sources(corpus.data_folder, [corpus.lexicon], None, corpus.lm_text), read_record(corpus.data_folder)
