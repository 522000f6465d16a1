"""`asr-kd`: parse, call one function, print."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import asr_kd
from asr_kd import __version__
from asr_kd.errors import AsrKdError
from asr_kd.runtime import prepare_process

OVERRIDES = "--key value: any setting of the YAML file, e.g. --temperature 5 --num_teachers 4"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors that the user can mend are one line and exit code 2 (`--debug` shows the traceback)."""
    raise SystemExit(guarded(_run, arguments))


def guarded(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Call `command` with the arguments less `--debug`; turn what went wrong into one line and an exit code."""
    prepare_process()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.CRITICAL, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        _in_process_group(command, words)
        sys.stdout.flush()
    except AsrKdError as error:
        if debug:
            raise
        print(f"asr-kd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("asr-kd: interrupted; the same command continues a run", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `asr-kd ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, MemoryError, RuntimeError) as error:
        advice = _advice(error)
        if debug or advice is None:
            raise
        print(f"asr-kd: {advice}", file=sys.stderr)
        return 2
    return 0


def _advice(error: Exception) -> str | None:
    """One line for a file, a machine or an installation that does not serve; None for what is a mistake of the program."""
    reason = (str(error) or "exhausted").splitlines()[0]
    if isinstance(error, ImportError) or "undefined symbol" in reason or "Could not load this library" in reason:  # the last two are torch's OSError
        return f"{reason}; the installed packages do not fit together: install asr_kd into a fresh environment"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or reason}; check the path, its permissions and free space"
    if isinstance(error, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:  # torch raises RuntimeError
        return f"memory: {reason}; lower batch_frames, hidden_units or num_teachers, or prune the language model"
    return None


def _in_process_group(command: Callable[[Sequence[str]], None], words: Sequence[str]) -> None:
    """Call `command`; started by `torchrun`, as one process of several."""
    if "RANK" not in os.environ:
        return command(words)
    from asr_kd.distributed import process_group  # imports torch, which `--help` need not wait for

    with process_group():
        command(words)


def main_train(words: Sequence[str]) -> None:
    """`recipes/LibriSpeech/train.py HPARAMS [--sweep] [--key value ...]`: the same as `asr-kd train HPARAMS ...` or `asr-kd sweep HPARAMS ...`."""
    _run(["sweep" if "--sweep" in words else "train", *(word for word in words if word != "--sweep")])


def _run(words: Sequence[str]) -> None:
    parser = _parser()
    options, overrides = parser.parse_known_args(words)
    if overrides and not options.takes_settings:
        raise AsrKdError(f"unknown argument {overrides[0]!r}; see asr-kd {options.command} --help")
    options.function(options, overrides)


class _Parser(argparse.ArgumentParser):
    """Mistakes in the arguments are the user's, as all others: one line."""

    def error(self, message: str) -> NoReturn:
        raise AsrKdError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="asr-kd", description=asr_kd.__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("--version", action="version", version=f"asr-kd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace, Sequence[str]], None], text: str, takes_settings: bool) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, epilog=OVERRIDES if takes_settings else None)
        command.set_defaults(function=function, takes_settings=takes_settings)
        return command

    add("demo", _demo, "run the whole recipe on the synthetic corpus (a few minutes on two cores)", True)
    for name, function, text in (("train", _train, "run a recipe: corpus to results.json and report.html; a re-run continues (recipes/LibriSpeech/train.py "
                                  "does the same, and with --sweep what `asr-kd sweep` does)"),
                                 ("sweep", _sweep, "distil one student per temperature in sweep_temperatures and add them to the report")):
        add(name, function, text, True).add_argument("hparams", metavar="HPARAMS", help="settings file, e.g. recipes/LibriSpeech/hparams/mini.yaml")
    transcribe = add("transcribe", _transcribe, "print the words of audio files (any format soundfile reads, any sample rate)", False)
    transcribe.add_argument("bundle", metavar="BUNDLE", type=Path, help="the folder that training wrote as student/bundle")
    transcribe.add_argument("files", metavar="FILE", nargs="+", type=Path)
    add("report", _report, "write report.md and report.html again from results.json", False).add_argument("output_folder", metavar="OUTPUT_FOLDER", type=Path)
    return parser


def _demo(_: argparse.Namespace, overrides: Sequence[str]) -> None:
    from asr_kd.experiment import DEMO_HPARAMS, run

    run(DEMO_HPARAMS, overrides)


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from asr_kd.experiment import run

    run(options.hparams, overrides)


def _sweep(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from asr_kd.experiment import run
    from asr_kd.settings import load_settings

    settings = load_settings(options.hparams, overrides)
    if not settings.dev_splits and not settings.test_splits:
        raise AsrKdError("sweep: dev_splits and test_splits are empty, expected a split to score the students on; give --dev_splits SPLIT")
    run(options.hparams, overrides, sweep=True)


def _transcribe(options: argparse.Namespace, _: Sequence[str]) -> None:
    from asr_kd.bundle import load_bundle, transcribe

    bundle, several = load_bundle(options.bundle), len(options.files) > 1
    failed: list[AsrKdError] = []
    for path in options.files:
        try:
            words = transcribe(bundle, path)
        except AsrKdError as error:
            if not several:
                raise
            print(f"asr-kd: {error}", file=sys.stderr)
            failed.append(error)
        else:
            print(f"{path}\t{' '.join(words)}" if several else " ".join(words), flush=True)
    if failed:
        raise AsrKdError(f"{len(failed)} of {len(options.files)} files were not transcribed, see above") from failed[-1]


def _report(options: argparse.Namespace, _: Sequence[str]) -> None:
    from asr_kd.report import write_report
    from asr_kd.stage import read_json

    path = options.output_folder / "results.json"
    if not path.is_file():
        raise AsrKdError(f"{options.output_folder}: no results.json here, expected the output folder of a finished run")
    results = read_json(path)
    try:
        results["splits"]
        print(write_report(options.output_folder, results))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise AsrKdError(f"{path}: not the results of a run ({error!r}); give the output folder of a finished run, or run the recipe again") from error


if __name__ == "__main__":
    main()
