"""Benchmarks, run by hand: `python -m tests.benchmarks NAME [--option value ...]` (`NAME --help` lists the options).

Each prints JSON, with the limit measured in the same run, or the aim, beside its figures where there is one, and a table where a person
looks (stdout is a terminal).
README.md holds what was measured, where, and with which command.
"""

from __future__ import annotations

import importlib
import sys

from asr_kd.errors import AsrKdError
from asr_kd.runtime import prepare_process

NAMES = {
    "training": "student steps beside the machine's matrix products and beside the plain SpeechBrain way",
    "teachers": "ten teachers as one batched product beside a loop over ten modules",
    "soft_targets": "writing and reading soft targets; students of their small forms (speed, corpus, simulation)",
    "features": "filterbanks beside torchaudio's",
    "alignment": "monophone and triphone passes over growing amounts of speech",
    "word_starts": "how near the aligner comes to the truth of synthetic speech",
    "graph": "time and memory of large decoding graphs",
    "decoding": "real-time factor and what the beam costs",
    "scale": "streamed training on a corpus larger than memory",
    "losses": "time and memory of the distillation loss",
    "gpu": "the paper's network on a GPU: student, ten teachers, soft targets",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        width = max(map(len, NAMES))
        print(__doc__ + "\n" + "\n".join(f"  {known:{width}}  {text}" for known, text in NAMES.items()))
        sys.exit(0 if name in ("", "-h", "--help") else f"benchmark {name!r}: expected one of {', '.join(NAMES)}")
    prepare_process()
    try:
        importlib.import_module(f"tests.benchmarks.{name}").main(sys.argv[2:])
    except AsrKdError as error:
        sys.exit(f"benchmark {name}: {error}")


if __name__ == "__main__":
    main()
