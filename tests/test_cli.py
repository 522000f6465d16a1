"""The command line: help everywhere, one line and exit code 2 for what the user can mend."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from asr_kd import __version__
from asr_kd.cli import guarded, main, main_train
from asr_kd.experiment import DEMO_HPARAMS


def exit_code(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["sweep"], ["transcribe"], ["report"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([*command, "--help"]) == 0
    assert f"usage: asr-kd {' '.join(command)}".rstrip() in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"asr-kd {__version__}"


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "none.yaml"], "none.yaml: could not be read"),
    (["transcribe", "nowhere", "a.wav"], "nowhere: no bundle.json here"),
    (["report", "nowhere"], "nowhere: no results.json here, expected the output folder of a finished run"),
    (["report", "nowhere", "--loud"], "unknown argument '--loud'"),
    (["transcribe", "bundle"], "the following arguments are required: FILE; see asr-kd transcribe --help"),
    (["invent"], "invalid choice: 'invent'"),
    ([], "required: COMMAND; see asr-kd --help"),
    (["demo", "--seed"], "argument '--seed': no value"),
    (["sweep", str(DEMO_HPARAMS), "--test_splits", "[]"], "sweep: dev_splits and test_splits are empty"),
    (["demo", "--train_splits", "[/data/train]"], "train_splits names '/data/train'; give a plain name"),
    (["demo", "--data_folder", "mine"], "data_folder given beside synthetic_minutes"),
    (["demo", "--temperature", "{"], "argument --temperature: '{' is no value in YAML"),
])
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("asr-kd: ")
    assert message in error
    assert error.count("\n") == 1


def test_one_gpu_by_number_for_several_processes_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert exit_code(["demo", "--output_folder", str(tmp_path), "--device", "cuda:0"]) == 2
    assert capsys.readouterr().err == "asr-kd: device: cuda:0 for 2 processes, expected a GPU for each; give --device cuda\n"


@pytest.mark.parametrize("content", ["[]", "{}", "3", '"text"', '{"splits": []}', '{"splits": {"a": []}}', '{"splits": {"a": {"baseline": {"wer": "high"}}}}',
                                     '{"splits": {"a": {"baseline": {"wer": 0.2, "wer_ci95": []}}}}', '{"stages": {"a": null}}', '{"curves": {"teachers": 3}}'])
def test_report_of_another_file(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(content)
    assert exit_code(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/results.json: not the results of a run" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_report_of_a_split_without_a_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"splits": {"a": {"baseline": {}}}}')
    assert exit_code(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    assert "Results on a" in (tmp_path / "report.html").read_text()


def test_debug_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=re.escape("none.yaml: could not be read")):
        main(["train", "none.yaml", "--debug"])


@pytest.mark.parametrize(("error", "line"), [
    (PermissionError(13, "Permission denied", "out/record.json"), "out/record.json: Permission denied; check the path, its permissions and free space"),
    (OSError(28, "No space left on device"), "a file: No space left on device; check the path, its permissions and free space"),
    (OSError("Could not load this library: /lib/torchaudio.so"),
     "Could not load this library: /lib/torchaudio.so; the installed packages do not fit together: install asr_kd into a fresh environment"),
    (ModuleNotFoundError("No module named 'kaldifst'"),
     "No module named 'kaldifst'; the installed packages do not fit together: install asr_kd into a fresh environment"),
    (MemoryError("no 9 GiB"), "memory: no 9 GiB; lower batch_frames, hidden_units or num_teachers, or prune the language model"),
    (MemoryError(), "memory: exhausted; lower batch_frames, hidden_units or num_teachers, or prune the language model"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
     "memory: CUDA out of memory. Tried to allocate 9 GiB.; lower batch_frames, hidden_units or num_teachers, or prune the language model"),
])
def test_files_and_memory_that_do_not_serve_are_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Sequence[str]) -> None:
        raise error

    assert guarded(fail, []) == 2
    assert capsys.readouterr().err == f"asr-kd: {line}\n"
    with pytest.raises(type(error)):
        guarded(fail, ["--debug"])


def test_torchs_own_words_for_too_little_memory_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda _: print(torch.empty(10**15)), []) == 2
    assert re.fullmatch(r"asr-kd: memory: .*can't allocate memory.*; lower batch_frames, hidden_units or num_teachers, .*\n", capsys.readouterr().err)


def test_mistakes_of_the_program_keep_their_traceback() -> None:
    def fail(_: Sequence[str]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        guarded(fail, [])


def test_an_output_folder_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    (tmp_path / "data").mkdir()
    own = ["--synthetic_minutes", "null", "--data_folder", str(tmp_path / "data"), "--lexicon", str(tmp_path / "out"), "--train_splits", "train",
           "--test_splits", "[]"]
    chapter = tmp_path / "data" / "train" / "1" / "1"
    chapter.mkdir(parents=True)
    (chapter / "1-1.trans.txt").write_text("1-1-1 A\n")
    assert exit_code(["demo", "--output_folder", str(tmp_path / "out"), *own]) == 2
    error = capsys.readouterr().err
    assert error == f"asr-kd: {tmp_path}/out: File exists; check the path, its permissions and free space\n"
    assert (tmp_path / "out").read_text() == "mine"


def test_recipe_script_and_train_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(main_train, [str(tmp_path / "none.yaml"), "--sweep"]) == 2
    assert "none.yaml: could not be read" in capsys.readouterr().err
