"""The whole recipe on a tiny synthetic corpus: every number of results.json, restarts after kill -9, refusals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pretend_gpu import pretend_gpu

from asr_kd import experiment
from asr_kd.bundle import load_bundle, transcribe
from asr_kd.corpus import prepare_corpus, prepare_text
from asr_kd.decode import read_trn
from asr_kd.ensemble import Ensemble
from asr_kd.frames import FrameStore
from asr_kd.hmm.model import HmmModel
from asr_kd.manifest import read_manifest
from asr_kd.score import WordErrors, score_split
from asr_kd.settings import load_settings
from asr_kd.sources import find_sources
from asr_kd.stage import alone_in, read_json

pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeak-ng: pip install -e '.[demo]'")

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "recipes" / "LibriSpeech" / "train.py"
DEMO = ROOT / "recipes" / "LibriSpeech" / "hparams" / "demo.yaml"
TINY = {
    "synthetic_minutes": "{train: 3, dev: 0.4, test: 0.4}", "dev_splits": "[dev]", "num_states": "150", "num_gaussians": "300", "mono_passes": "6",
    "tri_passes": "2", "speaker_adaptation": "false", "network_realignments": "1", "speeds": "[0.9, 1.0]", "lm_order": "2", "beam": "9",
    "num_teachers": "3", "hidden_layers": "2", "hidden_units": "96", "teacher_epochs": "2", "student_epochs": "3", "batch_frames": "256",
    "acoustic_scales": "[0.1, 0.2]", "word_insertion_penalties": "[0.0]", "tuning_utterances": "8", "decoded_members": "2", "precision": "fp32",
    "num_jobs": "1",
}  # fmt: skip


def command(output: Path, *more: str) -> list[str]:
    settings = [word for key, value in TINY.items() for word in (f"--{key}", value)]
    return [sys.executable, str(TRAIN), str(DEMO), "--output_folder", str(output), *settings, *more]


def run(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(output, *more), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recipe") / "out"
    done = run(output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(output / "report.html") in done.stdout
    return output


def test_results_hold_what_the_contract_says(finished: Path) -> None:
    results = read_json(finished / "results.json")
    assert list(results["splits"]) == ["dev", "test"]
    for systems in results["splits"].values():
        for name in ("baseline", "ensemble", "distilled", "control"):
            row = systems[name]
            assert row["wer"] == pytest.approx(row["errors"] / row["words"])
            for measure in ("frame_accuracy", "wer"):
                assert row[f"{measure}_ci95"][0] <= row[measure] <= row[f"{measure}_ci95"][1]
            assert row["real_time_factor"] > 0
        members = [member["frame_accuracy"] for member in systems["members"]]
        assert len(members) == 3
        assert systems["baseline"]["frame_accuracy"] == pytest.approx(np.mean(members))
        decoded = [member for member in systems["members"] if "wer" in member]
        assert systems["baseline"]["decoded_members"] == len(decoded)
        assert systems["baseline"]["errors"] == sum(member["errors"] for member in decoded)
        assert systems["ensemble"]["frame_accuracy"] > systems["baseline"]["frame_accuracy"] > 0.1
        kept = (systems["distilled"]["frame_accuracy"] - systems["baseline"]["frame_accuracy"]) / (
            systems["ensemble"]["frame_accuracy"] - systems["baseline"]["frame_accuracy"])
        assert systems["gain_kept"]["frame_accuracy"] == pytest.approx(kept)
        lead = systems["control"]["wer"] - systems["distilled"]["wer"]
        assert (systems["distilled"]["probability_better_than_control"] - 0.5) * lead >= 0
    assert {"align", "teachers", "student", "control", "graph", "score"} <= results["stages"].keys()
    shapes = results["networks"]
    assert shapes["control"]["hidden_units"] == shapes["distilled"]["hidden_units"]
    assert (shapes["control"]["dropout"], shapes["distilled"]["dropout"]) == (shapes["teachers"]["dropout"], results["settings"]["student_dropout"])
    assert {shape["precision"] for shape in shapes.values()} == {"fp32"}
    assert results["settings"]["temperature"] == 2.0
    about, vocabulary = results["references"]["test"], {line.split()[0] for line in (finished / "graph" / "words.txt").read_text().splitlines()}
    words = [word for utterance in read_manifest(finished / "manifests" / "test.csv") for word in utterance.words]
    assert about == {"words": len(words), "out_of_vocabulary": sum(word not in vocabulary for word in words), "speakers_in_training": []}
    assert f"{about['out_of_vocabulary']} of {len(words)} words" in (finished / "report.md").read_text()


def test_wer_is_that_of_the_trn_files(finished: Path) -> None:
    references = {utterance.utt_id: utterance.words for utterance in read_manifest(finished / "manifests" / "test.csv")}
    results = read_json(finished / "results.json")["splits"]["test"]
    for system in ("ensemble", "distilled", "control"):
        total = sum(score_split(references, read_trn(finished / "decode" / system / "test.trn")).values(), WordErrors())
        assert (total.errors, total.words) == (results[system]["errors"], results[system]["words"])


def test_frame_accuracy_by_the_slow_way(finished: Path) -> None:
    """Windows by clamped indices, plain loops, no class of the pipeline but the stores."""
    targets, features = (FrameStore(finished / folder / "test") for folder in ("targets", "features"))
    teachers = Ensemble.load(finished / "teachers" / "networks.safetensors")
    correct = frames = 0
    nll = 0.0  # of the members, each alone
    sure, right = np.zeros((3, 15)), np.zeros((3, 15))  # by confidence, a row for each member
    import torch

    for utt_id in targets:
        log_mel = np.asarray(features[utt_id], np.float32)
        windows = np.stack([np.concatenate([log_mel[min(max(t + k, 0), len(log_mel) - 1)] for k in range(-20, 6)]) for t in range(len(log_mel))])
        with torch.no_grad():
            of_members = torch.stack([teachers.member(k).eval()(torch.from_numpy(windows)).softmax(-1) for k in range(3)])
        nll -= float(of_members[:, torch.arange(len(log_mel)), torch.from_numpy(targets[utt_id].astype(np.int64))].log().mean(0).sum())
        for member, posteriors in enumerate(of_members.numpy()):
            bins = np.minimum(posteriors.max(-1) * 15, 14).astype(int)
            np.add.at(sure[member], bins, posteriors.max(-1))
            np.add.at(right[member], bins, posteriors.argmax(-1) == targets[utt_id])
        posteriors = of_members.sum(0)
        correct += int((posteriors.argmax(-1).numpy() == targets[utt_id]).sum())
        frames += len(log_mel)
    assert read_json(finished / "results.json")["splits"]["test"]["ensemble"]["frame_accuracy"] == pytest.approx(correct / frames, abs=2e-4)
    calibration = read_json(finished / "results.json")["calibration"]["test"]["baseline"]
    assert calibration["nll"] == pytest.approx(nll / frames, rel=1e-4)
    assert calibration["ece"] == pytest.approx(np.abs(sure - right).sum() / frames / 3, abs=2e-4)


def test_tuning_speakers_are_in_no_training(finished: Path) -> None:
    chosen = set(read_json(finished / "tuning" / "tuning.json")["utterances"])
    speakers = {utterance.utt_id: utterance.spk_id for utterance in read_manifest(finished / "manifests" / "train.csv")}
    held_out = {speakers[utt_id] for utt_id in chosen}
    soft = FrameStore(finished / "soft_targets")
    assert held_out
    assert not held_out & {speakers[utt_id.removeprefix("sp0.9-")] for utt_id in soft}


def test_priors_are_those_of_the_training_targets(finished: Path) -> None:
    soft, targets = FrameStore(finished / "soft_targets"), FrameStore(finished / "targets" / "train")
    hmm = HmmModel.load(finished / "student" / "bundle")
    counts = sum(np.bincount(targets[utt_id], minlength=hmm.num_states) for utt_id in soft if not utt_id.startswith("sp"))
    np.testing.assert_array_equal(hmm.log_priors, hmm.with_counts(counts).log_priors)
    often = counts > 50
    np.testing.assert_allclose(np.exp(hmm.log_priors[often]), counts[often] / counts.sum(), rtol=0.05)


def test_bundle_transcribes_a_file(finished: Path) -> None:
    bundle = load_bundle(finished / "student" / "bundle")
    utterances = read_manifest(finished / "manifests" / "test.csv")[:6]
    words = {utterance.utt_id: transcribe(bundle, utterance.wav) for utterance in utterances}
    references = {utterance.utt_id: utterance.words for utterance in utterances}
    total = sum(score_split(references, words).values(), WordErrors())
    decoded = {utt_id: words for utt_id, words in read_trn(finished / "decode" / "distilled" / "test.trn").items() if utt_id in references}
    assert total.wer == pytest.approx(sum(score_split(references, decoded).values(), WordErrors()).wer, abs=0.3)


def test_a_second_run_does_nothing_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("record.json")}
    again = run(finished)
    assert again.returncode == 0, again.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("record.json")} == before


def records(output: Path) -> dict[str, int]:
    """When the record of each stage was written."""
    return {str(path.parent.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("record.json")}


def test_another_language_model_or_split_retrains_nothing(finished: Path) -> None:
    results, before = read_json(finished / "results.json"), records(finished)
    done = run(finished, "--test_splits", "[]")
    assert done.returncode == 0, done.stderr[-2000:]
    after = records(finished)
    decoding = {"manifests", "text", "student/bundle", *(name for name in before if name.startswith("decode/"))}
    assert {name for name in before if after[name] != before[name]} == decoding
    assert list(read_json(finished / "results.json")["splits"]) == ["dev"]
    done = run(finished, "--test_splits", "[]", "--lm_order", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = after, records(finished)
    decoding = decoding - {"manifests"} | {"graph", "tuning"}
    assert {name for name in before if after[name] != before[name]} == decoding
    of_split = {f"{folder}/test" for folder in ("features", "targets_0", "targets")}
    for folder in of_split:
        shutil.rmtree(finished / folder)
    done = run(finished)
    assert done.returncode == 0, done.stderr[-2000:]
    again = records(finished)
    assert {name for name in before if again[name] != after[name]} == decoding | of_split | {"manifests"}
    assert without_times(read_json(finished / "results.json")["splits"]) == without_times(results["splits"])


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda', but CUDA is not available")
def test_the_whole_recipe_on_a_gpu_gives_the_same(finished: Path, tmp_path: Path) -> None:
    """On one that is pretended: every tensor is where it belongs in every stage, and batches of other sizes change nothing."""
    output = tmp_path / "out"
    shutil.copytree(finished / "corpus", output / "corpus")
    settings = [word for key, value in TINY.items() for word in (f"--{key}", value)]
    with pretend_gpu():
        experiment.run(str(DEMO), ["--output_folder", str(output), "--device", "cuda", *settings])
    for split in ("train", "dev", "test"):
        expected = FrameStore(finished / "targets" / split)
        found = FrameStore(output / "targets" / split)
        assert np.mean(np.concatenate([found[utt_id] != expected[utt_id] for utt_id in expected])) < 1e-3
    there, here = (read_json(folder / "results.json")["splits"]["test"] for folder in (output, finished))
    for system in ("baseline", "ensemble", "distilled", "control"):
        assert there[system]["frame_accuracy"] == pytest.approx(here[system]["frame_accuracy"], abs=0.01)


def test_kill_in_every_stage_loses_nothing(finished: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of each stage; the same command ends with the same results."""
    output = tmp_path / "out"
    middle = {str(path.parent.relative_to(finished)): read_json(path)["seconds"] / 2 for path in finished.rglob("record.json")}
    tried: set[str] = set()
    killed: set[str] = set()
    log = tmp_path / "log"
    for _ in range(60):
        with open(log, "w") as errors:
            process = subprocess.Popen(command(output), stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            begun = {os.path.relpath(place, output) for place, _, names in os.walk(output) if "started.json" in names} - tried  # folders may vanish meanwhile
            if begun:
                into = min(0.3, *(middle[stage] for stage in begun))
                time.sleep(into if into > 0.15 else 0.0)  # a short one may be over before a busy machine comes back to this
                process.kill()
                tried |= begun
                killed |= {stage for stage in begun if (output / stage / "started.json").is_file()}  # the others ended meanwhile
                break
            time.sleep(0.002)
        if process.wait() >= 0:
            break
    assert process.returncode == 0, log.read_text()[-3000:]
    long = {"corpus", "hmm", "targets_0/train", "targets/train", "aligner_1", "teachers", "soft_targets", "student", "control", "tuning",
            "decode/ensemble", "student/bundle"}
    assert long <= killed, sorted(middle.keys() - killed)
    assert len(killed) >= 20, sorted(middle.keys() - killed)
    one, other = (read_json(folder / "results.json") for folder in (finished, output))
    assert without_times(other["splits"]) == without_times(one["splits"])


def without_times(splits: dict[str, object]) -> object:
    return json.loads(json.dumps(splits), object_hook=lambda row: {key: value for key, value in row.items() if key != "real_time_factor"})


@pytest.mark.parametrize(("more", "words"), [
    (["--temperatur", "3"], "did you mean 'temperature'"),
    (["--num_states", "0"], "num_states is 0"),
    (["--tuning_speakers", "[nobody]"], "tuning_speakers: nobody"),
    (["--device", "cuda:99"], "device"),
])
def test_wrong_settings_are_one_line_and_exit_code_2(finished: Path, more: list[str], words: str) -> None:
    done = run(finished, *more)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("asr-kd: ")
    assert words in last
    assert "Traceback" not in done.stderr


def test_two_runs_in_one_folder_are_refused(finished: Path) -> None:
    with alone_in(finished):
        done = run(finished)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"asr-kd: {finished}: another run works here; wait until it has ended or give another output_folder"
    with alone_in(finished):  # an ended run has left nothing that is in the way
        pass


def test_targets_alone_are_those_of_the_recipe(finished: Path) -> None:
    before = records(finished)
    settings = command(finished)[2:]
    done = subprocess.run([sys.executable, str(ROOT / "data_prep" / "targets.py"), *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert records(finished) == before
    store = FrameStore(finished / "targets_0" / "dev")
    assert f"{finished}/targets_0/dev: {len(store)} utterances, {len(store.frames)} frames, {store.attributes['num_states']} states\n" in done.stdout


def test_the_readmes_command_for_ones_own_speech(finished: Path, tmp_path: Path) -> None:
    """As far as the words: the command as it stands there, on manifests, with and without a language model."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    words = shlex.split(next(line for line in text.splitlines() if "hparams/own.yaml" in line))[2:]
    places = {"DATA": tmp_path, "OUT": tmp_path / "out", "lexicon.txt": finished / "corpus" / "lexicon.txt", "lm.arpa.gz": finished / "text" / "lm.arpa"}
    overrides = [str(places.get(word, word)) for word in words[1:]]
    for split in ("train", "dev"):
        shutil.copy(finished / "manifests" / f"{split}.csv", tmp_path / f"{split}.csv")
    overrides = [word.replace("[", f"[{tmp_path}/") if word.endswith(".csv]") else word for word in overrides]
    for more in (overrides, overrides[:overrides.index("--lm")]):
        settings = load_settings(ROOT / words[0], more)
        sources, _ = find_sources(settings)
        corpus, _ = prepare_corpus(settings, sources.data_folder)
        prepared, _ = prepare_text(settings, corpus, sources.lexicon, sources.lm, sources.lm_text)
        assert corpus.train
        assert corpus.tuning
        assert {word for utt_id in corpus.train for word in corpus.words[utt_id]} <= set(prepared.lexicon)


def test_a_damaged_store_is_made_again(finished: Path) -> None:
    """A file that was cut off after its stage ended is noticed, and the stage is done again."""
    frames = finished / "features" / "dev" / "frames.npy"
    whole = frames.read_bytes()
    frames.write_bytes(whole[: len(whole) // 2])
    done = run(finished)
    assert done.returncode == 0, done.stderr[-2000:]
    assert frames.read_bytes() == whole


def test_temperature_sweep(finished: Path) -> None:
    """A student per temperature; the one at the recipe's own temperature is the distilled student."""
    done = run(finished, "--sweep", "--sweep_temperatures", "[2, 5]")
    assert done.returncode == 0, done.stderr[-2000:]
    results = read_json(finished / "results.json")
    rows = results["temperature_sweep"]["rows"]
    assert [row["temperature"] for row in rows] == [2.0, 5.0]
    distilled = results["splits"]["dev"]["distilled"]
    assert (rows[0]["frame_accuracy"], rows[0]["errors"]) == (distilled["frame_accuracy"], distilled["errors"])
    assert rows[1]["frame_accuracy"] != rows[0]["frame_accuracy"]
    assert {f"{stage}_T5" for stage in ("soft_targets", "student", "decode distilled")} <= results["stages"].keys()
    assert "Temperature" in (finished / "report.md").read_text()
    assert (finished / "decode" / "distilled_T5" / "dev.trn").is_file()
    assert run(finished).returncode == 0  # without a sweep: the one that was made is still of these networks
    assert read_json(finished / "results.json")["temperature_sweep"] == results["temperature_sweep"]
    assert run(finished, "--dev_splits", "[]").returncode == 0
    assert "temperature_sweep" not in read_json(finished / "results.json")  # it was of a split that is no more
    assert not (finished / "decode" / "distilled_T5").exists()
    assert run(finished, "--decoded_members", "1").returncode == 0
    assert {folder.name for folder in (finished / "decode").iterdir()} == {"member_0", "ensemble", "distilled", "control"}
