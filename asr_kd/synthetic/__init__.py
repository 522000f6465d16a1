"""The embedded default corpus: synthetic speech in the LibriSpeech layout, with its true word and phone times."""

from asr_kd.synthetic.corpus import MINUTES, SNR_DB, SyntheticCorpus, make_corpus
from asr_kd.synthetic.times import Timed, read_ctm

__all__ = ["MINUTES", "SNR_DB", "SyntheticCorpus", "Timed", "make_corpus", "read_ctm"]
