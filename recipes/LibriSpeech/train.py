#!/usr/bin/env python3
"""Table 1 of Hinton, Vinyals & Dean (2015) for your own speech: baseline, ten-teacher ensemble, distilled student.

    python train.py hparams/mini.yaml --data_folder DATA --output_folder OUT [--key value ...]

`asr_kd.experiment.run` is the whole experiment, top to bottom; this script only hands it the settings. A run that was cut
off continues with the same command.
"""

import sys

from asr_kd.cli import guarded, main_train

if __name__ == "__main__":
    sys.exit(guarded(main_train))
