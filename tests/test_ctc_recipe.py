"""The CTC recipe on a handful of real utterances: teachers, a student of theirs, and what distillation adds to the loss."""

import importlib.util
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain import Stage
from speechbrain.dataio.batch import PaddedBatch

from asr_kd.errors import AsrKdError
from asr_kd.model import save_tensors
from asr_kd.stage import alone_in

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "LibriSpeech" / "CTC"
REAL = ROOT.parent / "shared" / "data" / "mini-librispeech-opus.tar"
CHAPTERS = {"train-mini/19/198": 4, "train-mini/1737/146161": 3, "dev-mini/2136/5147": 3}  # chapter: utterances taken
TINY = {"channels": 16, "number_of_epochs": 1, "batch_size": 2, "tuning_speakers": "[1737]", "lr": 0.01}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ctc_recipe", RECIPE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ctc_recipe"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not REAL.exists():
        pytest.skip(f"no real speech at {REAL}")
    folder = tmp_path_factory.mktemp("speech")
    with tarfile.open(REAL) as tar:
        tar.extractall(folder, list(handful(tar)), filter="data")
    for transcripts in folder.rglob("*.trans.txt"):
        kept = [line for line in transcripts.read_text().splitlines() if (transcripts.parent / f"{line.split()[0]}.opus").exists()]
        transcripts.write_text("\n".join(kept) + "\n")
    return folder / "LibriSpeech"


def handful(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    left = {f"LibriSpeech/{chapter}": number for chapter, number in CHAPTERS.items()}
    for member in tar:
        chapter = str(Path(member.name).parent)
        if chapter in left and (member.name.endswith(".txt") or left[chapter] > 0):
            left[chapter] -= member.name.endswith(".opus")
            yield member


def run(recipe: ModuleType, corpus: Path, output: Path, **settings: object) -> list[str]:
    overrides = [f"--{key}={value}" for key, value in (TINY | {"data_folder": corpus, "output_folder": output} | settings).items()]
    recipe.main([str(RECIPE / "hparams" / "train.yaml"), *overrides, "--device=cpu", "--noprogressbar"])
    return (output / "train_log.txt").read_text().splitlines()


def test_two_teachers_and_a_student(recipe: ModuleType, corpus: Path, tmp_path: Path) -> None:
    teachers = [tmp_path / f"teacher{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(teachers, start=1):
        run(recipe, corpus, folder, seed=seed)
    epoch, test = run(recipe, corpus, tmp_path / "student", seed=3, teachers=f"[{teachers[0]}, {teachers[1]}]", ctc_weight=0.0)
    assert "valid CER" in epoch
    assert "test WER" in test
    assert "WER" in (tmp_path / "student" / "wer_test.txt").read_text()
    with open(RECIPE / "hparams" / "train.yaml", encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, {"data_folder": "", "output_folder": str(tmp_path / "unused"), "channels": 16})
    first, second = recipe.load_teachers(hparams["model"], teachers, "cpu")
    features = torch.randn(1, 60, 40)
    by_hand = ((first(features) / 2).softmax(-1) + (second(features) / 2).softmax(-1)) / 2
    torch.testing.assert_close(recipe.teacher_posteriors([first, second], features, 2.0), by_hand)
    assert not torch.equal(first(features), second(features))
    (test,) = run(recipe, corpus, tmp_path / "ensemble", teachers=f"[{teachers[0]}, {teachers[1]}]", number_of_epochs=0)
    assert "test WER" in test
    assert not (tmp_path / "ensemble" / recipe.WEIGHTS).exists()
    again = run(recipe, corpus, teachers[0], seed=1, number_of_epochs=2)  # continues where the first run ended
    assert [line.split(",")[0] for line in again if "train loss" in line] == ["epoch: 1", "epoch: 2"]


def test_the_loss_of_a_student(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    features, length = torch.randn(2, 40, 6), torch.tensor([1.0, 0.5])
    teacher, log_probs = torch.nn.Linear(6, 5), torch.randn(2, 40, 5).log_softmax(-1)
    with open(RECIPE / "hparams" / "train.yaml", encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, {"data_folder": "", "output_folder": "unused", "temperature": 3.0, "ctc_weight": 0.25})
    brain = object.__new__(recipe.CTC)
    brain.hparams = SimpleNamespace(**hparams | {"teachers": [teacher]})
    batch = PaddedBatch([{"tokens": torch.tensor([1, 2, 3])}, {"tokens": torch.tensor([4])}])
    loss = brain.compute_objectives((features, log_probs, length), batch, Stage.TRAIN)
    soft = (teacher(features) / 3).softmax(-1)
    frames = -(soft * (log_probs / 3).log_softmax(-1)).sum(-1)
    tokens, token_length = batch.tokens
    ctc = hparams["ctc_loss"](log_probs, tokens, length, token_length)
    torch.testing.assert_close(loss, 0.25 * ctc + 9 * (frames[0].sum() + frames[1, :20].sum()) / 60)
    brain.hparams.teachers = []
    torch.testing.assert_close(brain.compute_objectives((features, log_probs, length), batch, Stage.TRAIN), ctc)


def test_an_ensemble_is_the_mean_of_its_teachers_posteriors(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    teachers = [torch.nn.Linear(40, 5) for _ in range(3)]
    brain = object.__new__(recipe.Ensemble)
    brain.device, brain.modules = "cpu", SimpleNamespace(model=teachers[0])
    brain.hparams = SimpleNamespace(fbank=lambda x: x, normalize=lambda x, _: x, log_softmax=torch.nn.LogSoftmax(-1), teachers=teachers)
    features = torch.randn(1, 7, 40)
    batch = PaddedBatch([{"sig": features[0]}])
    _, log_probs, length = brain.compute_forward(batch, Stage.TEST)
    by_hand = sum(teacher(features).softmax(-1) for teacher in teachers) / 3
    torch.testing.assert_close(log_probs.exp(), by_hand)
    assert length.tolist() == [1.0]


def test_a_teacher_that_was_not_trained(recipe: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"no model\.safetensors in it; .* train the teacher first"):
        recipe.load_teachers(torch.nn.Linear(1, 1), [str(tmp_path)], "cpu")


def test_a_teacher_of_another_form_or_a_damaged_one(recipe: ModuleType, tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", torch.nn.Linear(2, 1).state_dict(), {})
    with pytest.raises(AsrKdError, match=r"model\.safetensors: not the weights of a model of this run's form \(size mismatch .*\); .*one form"):
        recipe.load_teachers(torch.nn.Linear(1, 1), [str(tmp_path)], "cpu")
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(AsrKdError, match=r"model\.safetensors: not the weights of a model"):
        recipe.load_teachers(torch.nn.Linear(1, 1), [str(tmp_path)], "cpu")


def test_a_model_is_not_continued_with_another_origin(recipe: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_tensors(tmp_path / name / "model.safetensors", torch.nn.Linear(1, 1).state_dict(), {})
    student = tmp_path / "student"
    hparams = {"output_folder": str(student), "save_folder": str(student / "save"), "teachers": [str(tmp_path / "a")], "seed": 1, "temperature": 2.0,
               "ctc_weight": 0.5}
    hparams |= {name: 1 for name in recipe.LEARNT_FROM if name not in hparams}
    recipe.note_origin(hparams | {"seed": 7})  # a run that was cut before it had a model
    recipe.note_origin(hparams)
    (student / "save" / "CKPT+1").mkdir(parents=True)
    recipe.note_origin(hparams)
    for change, name in (({"teachers": [str(tmp_path / "b")]}, "teachers"), ({"temperature": 1.0, "seed": 2}, "seed, temperature"),
                         ({"train_hours": 0.5, "channels": 32}, "train_hours, channels")):
        with pytest.raises(AsrKdError, match=rf"student: holds a model with other {name}, expected one of this run's to continue; give another output_folder"):
            recipe.note_origin(hparams | change)
    (student / "origin.json").unlink()
    with pytest.raises(AsrKdError, match="holds a model with unknown teachers, seed, temperature, ctc_weight"):
        recipe.note_origin(hparams)


def test_a_refused_run_leaves_the_folder_as_it_was(recipe: ModuleType, corpus: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", torch.nn.Linear(1, 1).state_dict(), {})
    (tmp_path / "hyperparams.yaml").write_text("of the model")
    with pytest.raises(AsrKdError, match="unknown teachers"):
        run(recipe, corpus, tmp_path)
    assert (tmp_path / "hyperparams.yaml").read_text() == "of the model"


def test_speech_that_is_trained_on_is_not_tested_on_nor_two_runs_made_in_one_folder(recipe: ModuleType, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"of test_splits and .* of the training splits, expected speech that was not trained on"):
        run(recipe, corpus, tmp_path / "a", test_splits="[train-mini]")
    with alone_in(tmp_path / "b"), pytest.raises(AsrKdError, match="another run works here"):
        run(recipe, corpus, tmp_path / "b")


def test_an_untrained_model_is_not_left_as_a_trained_one(recipe: ModuleType, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match="number_of_epochs: 0 and no teachers"):
        run(recipe, corpus, tmp_path / "m", number_of_epochs=0)
    assert not (tmp_path / "m" / recipe.WEIGHTS).exists()


def test_a_character_outside_the_alphabet_is_named(recipe: ModuleType) -> None:
    utterances = [SimpleNamespace(utt_id=name, words=words, duration_s=1.0, wav="x.wav") for name, words in (("u1", ("AB", "C")), ("u2", ("AB", "C-D")))]
    with pytest.raises(AsrKdError, match="u2: '-' in its transcript is not in the alphabet ' ABCD'; change the transcripts"):
        recipe.dataset(utterances, " ABCD", 16000)


def test_audio_has_the_sample_rate_of_the_settings(recipe: ModuleType, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    utterance = SimpleNamespace(utt_id="u", words=("A",), duration_s=1.0, wav=tmp_path / "a.wav")
    assert recipe.dataset([utterance], "A", 8000)[0]["sig"].shape == (8000,)


def test_training_hours_are_the_same_for_every_teacher(recipe: ModuleType) -> None:
    utterances = [SimpleNamespace(utt_id=f"{i:02}", duration_s=600.0) for i in range(20)]
    chosen = recipe.training_hours(utterances, 1.5)
    assert len(chosen) == 9
    assert chosen == recipe.training_hours(utterances[::-1], 1.5)
    assert recipe.training_hours(utterances, None) == utterances


def test_debug_leaves_no_model_that_would_pass_for_a_trained_one(recipe: ModuleType, corpus: Path, tmp_path: Path) -> None:
    overrides = [f"--{key}={value}" for key, value in (TINY | {"data_folder": corpus, "output_folder": tmp_path}).items()]
    recipe.main([str(RECIPE / "hparams" / "train.yaml"), *overrides, "--device=cpu", "--noprogressbar", "--debug"])
    assert not (tmp_path / recipe.WEIGHTS).exists()
