"""Two processes do what one does: stages, alignment, extraction, the command line; and what happens when one of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started: they import this module by its name

from spectral_speech import LEXICON, SETTINGS, speak

from asr_kd.frames import FrameStore
from asr_kd.hmm.align import align
from asr_kd.hmm.aligner import Aligner
from asr_kd.hmm.checkpoint import load_state
from asr_kd.hmm.train import train_gmm_hmm

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def together(program: str, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a program in two processes of one group, as torchrun starts them, without torchrun's own start-up time and report."""
    script = folder / "program.py"
    script.write_text("import sys\nfrom pathlib import Path\nfrom asr_kd.cli import guarded\n"
                      f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport os, signal, torch\n"
                      f"folder = Path({str(folder)!r})\ntorch.set_num_threads(1)\ndef program(words):\n"
                      + textwrap.indent(textwrap.dedent(program), "    ") + "\nsys.exit(guarded(program, []))\n")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent has it
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [subprocess.Popen([sys.executable, str(script)], env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(2)]
    outputs = [process.communicate(timeout=600) for process in started]
    return [subprocess.CompletedProcess(process.args, process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def ok(processes: list[subprocess.CompletedProcess[str]]) -> None:
    assert [process.returncode for process in processes] == [0, 0], "\n".join(process.stderr[-3000:] for process in processes)


def messages(processes: list[subprocess.CompletedProcess[str]]) -> list[str]:
    """Lines of all processes that say what went wrong."""
    lines = [line for process in processes for line in process.stderr.splitlines()]
    assert not any("Traceback" in line for line in lines), lines
    return [line for line in lines if line.startswith("asr-kd: ")]


STAGES = """
    from asr_kd.distributed import rank
    from asr_kd.stage import run_stage, write_text
    alone = lambda into: write_text(into / "alone", str(rank()))
    each = lambda into: write_text(into / f"part{rank()}", str(rank()))
    records = [run_stage("alone", folder / "alone", {}, {}, alone), run_stage("each", folder / "each", {}, {}, each, together=True)]
    write_text(folder / f"fingerprints{rank()}", " ".join(sorted(record.fingerprint + str(record.files) for record in records)))
"""


def test_the_first_process_writes_or_each_its_part(tmp_path: Path) -> None:
    ok(together(STAGES, tmp_path))
    assert (tmp_path / "alone" / "alone").read_text() == "0"
    assert [(tmp_path / "each" / f"part{number}").read_text() for number in range(2)] == ["0", "1"]
    assert (tmp_path / "fingerprints0").read_text() == (tmp_path / "fingerprints1").read_text()
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/record.json"))]
    ok(together(STAGES, tmp_path))
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/record.json"))] == before


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("together_", [False, True])
def test_an_error_in_one_process_ends_both_with_one_line(tmp_path: Path, number: int, together_: bool) -> None:
    if number == 1 and not together_:
        pytest.skip("the other process does nothing that could fail")
    ended = together(f"""
        from asr_kd.distributed import rank
        from asr_kd.errors import AsrKdError
        from asr_kd.stage import run_stage
        def work(into):
            if rank() == {number}:
                raise AsrKdError("utterance u7: no sound")
        run_stage("stage", folder / "stage", {{}}, {{}}, work, together={together_})
    """, tmp_path)
    assert [process.returncode for process in ended] == [2, 2]
    assert messages(ended) == ["asr-kd: utterance u7: no sound"]
    assert (tmp_path / "stage" / "started.json").exists()


def test_an_error_in_both_is_said_once(tmp_path: Path) -> None:
    ended = together("""
        from asr_kd.experiment import run
        run(folder / "none.yaml")
    """, tmp_path)
    assert [process.returncode for process in ended] == [2, 2]
    assert len(messages(ended)) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(tmp_path: Path, number: int) -> None:
    ended = together(f"""
        from asr_kd.distributed import rank
        from asr_kd.stage import run_stage
        def work(into):
            if rank() == {number}:
                os.kill(os.getpid(), signal.SIGKILL)
        run_stage("stage", folder / "stage", {{}}, {{}}, work, together=True)
    """, tmp_path)
    assert ended[number].returncode == -signal.SIGKILL
    assert ended[1 - number].returncode == 2
    assert len(messages(ended)) == 1
    assert "the same command again" in messages(ended)[0]


ALIGNMENT = """
    from test_distributed import align, Aligner, FrameStore, LEXICON, SETTINGS, speak, train_gmm_hmm
    from asr_kd.distributed import rank
    from asr_kd.hmm import train
    import json
    store = FrameStore(folder / "features")
    words, speakers = json.loads((folder / "words.json").read_text())
    save, count = train.save_state, 0
    def counted(*args):
        global count
        save(*args)
        count += 1
        if count == LAST_PASS and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    train.save_state = counted
    aligner = train_gmm_hmm(store, words, speakers, LEXICON, SETTINGS, folder=folder / "passes")
    if rank() == 0:
        aligner.save(folder / "aligner")
    align(aligner, store, words, speakers, LEXICON, folder / "aligned")
"""


def test_alignment_by_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """With one process killed on the way; the second time both go on where they were."""
    import json

    store, words, speakers, _ = speak(tmp_path / "features", 40, 0)
    (tmp_path / "words.json").write_text(json.dumps([words, speakers]))
    ended = together("    global count\n" + "    count = 0\n" + ALIGNMENT.replace("LAST_PASS", "7"), tmp_path)
    assert ended[1].returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "passes" / "latest.json").read_text())["done"] == 7
    ok(together("    global count\n" + "    count = 0\n" + ALIGNMENT.replace("LAST_PASS", "-1"), tmp_path))
    alone = train_gmm_hmm(store, words, speakers, LEXICON, SETTINGS, folder=tmp_path / "alone")
    align(alone, store, words, speakers, LEXICON, tmp_path / "aligned_alone")
    np.testing.assert_array_equal(Aligner.load(tmp_path / "aligner").hmm.state_table, alone.hmm.state_table)
    histories = [json.loads((tmp_path / folder / "latest.json").read_text())["history"] for folder in ("passes", "alone")]
    for two, one in zip(*histories, strict=True):
        tolerance = 5e-4 if one["pass"].startswith("sat") else 1e-6  # speakers' transforms amplify rounding
        assert two["log_likelihood_per_frame"] == pytest.approx(one["log_likelihood_per_frame"], rel=tolerance), one["pass"]
    one, two = FrameStore(tmp_path / "aligned_alone"), FrameStore(tmp_path / "aligned")
    assert one.utt_ids == two.utt_ids
    assert np.mean(one.frames == two.frames) > 0.99
    notes = json.loads((tmp_path / "passes" / "latest.json").read_text())
    state = load_state(tmp_path / "passes", notes["identity"], words)
    assert state is not None
    assert set(state.aligned) == set(words)  # one process can go on where two were


EXTRACTION = """
    from test_training import NUM_STATES, SHAPE, Ensemble, load
    from asr_kd.distributed import rank
    from asr_kd.soft_targets import ResumableFrameWriter, SoftTargetRecord, extract
    import asr_kd.resumable_frames
    asr_kd.resumable_frames.CHUNK_FRAMES, asr_kd.resumable_frames.SYNC_S = 150, 0.0
    append = ResumableFrameWriter.append
    def killing(self, frames):
        append(self, frames)
        if DIES and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    ResumableFrameWriter.append = killing
    record = SoftTargetRecord(2.0, "arithmetic", NUM_STATES, "t", "f", "s")
    data = load(folder, tuple("abcdefg"))
    extract(Ensemble(SHAPE, [1, 2]), data, folder / "soft", record, seed=0, device=torch.device("cpu"), form="FORM", bytes_per_frame=16)
"""


@pytest.mark.parametrize("form", ["compact", "sparse"])
def test_extraction_by_two_processes_is_that_of_one(tmp_path: Path, form: str) -> None:
    """With one process killed on the way; a shard file per process, joined by utterance id when read."""
    from test_training import NUM_STATES, SHAPE, make_data

    from asr_kd.ensemble import Ensemble
    from asr_kd.soft_targets import SoftTargetRecord, SoftTargetStore, extract

    data = make_data(tmp_path, 1, tuple("abcdefg"))
    ended = together(EXTRACTION.replace("DIES", "True").replace("FORM", form), tmp_path)
    assert ended[1].returncode == -signal.SIGKILL
    ok(together(EXTRACTION.replace("DIES", "False").replace("FORM", form), tmp_path))
    assert sorted(path.name for path in (tmp_path / "soft").glob("shard*")) == ["shard0of2", "shard1of2"]
    record = SoftTargetRecord(2.0, "arithmetic", NUM_STATES, "t", "f", "s")
    extract(Ensemble(SHAPE, [1, 2]), data, tmp_path / "alone", record, seed=0, device=torch.device("cpu"), form=form, bytes_per_frame=16)
    stores = [SoftTargetStore(tmp_path / folder, data, record, torch.device("cpu")) for folder in ("soft", "alone")]
    frames = torch.randperm(data.num_frames, generator=torch.Generator().manual_seed(0))
    two, one = (store.batch(frames) for store in stores)
    two, one = (targets if form == "compact" else targets.dense(NUM_STATES) for targets in (two, one))
    assert ((two - one).abs().amax(1) < 1e-3).float().mean() > 0.99  # a sum rounded otherwise may move an entry by one unit, or a draw to the next state
    (tmp_path / "soft" / "shard0of2" / "index.json").rename(tmp_path / "soft" / "index.json")
    extract(Ensemble(SHAPE, [1, 2]), data, tmp_path / "soft", record, seed=0, device=torch.device("cpu"), form=form, bytes_per_frame=16)
    assert not list((tmp_path / "soft").glob("shard*"))  # by another number of processes it is made anew
    assert (tmp_path / "soft" / "frames.npy").read_bytes() == (tmp_path / "alone" / "frames.npy").read_bytes()


def test_torchrun_runs_the_recipe(tmp_path: Path) -> None:
    """Two processes make what one process then finds finished; training streams its frames."""
    pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeak-ng: pip install -e '.[demo]'")
    from test_recipe import command

    from asr_kd.stage import read_json

    words, environment = command(tmp_path / "out", "--frames_in_memory_gb", "0"), {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, *words[1:]], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(str(tmp_path / "out" / "report.html")) == 1
    for systems in read_json(tmp_path / "out" / "results.json")["splits"].values():
        assert systems["ensemble"]["frame_accuracy"] > systems["baseline"]["frame_accuracy"] > 0.1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("record.json")}
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("record.json")} == before


def test_torchrun_says_once_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run([*TORCHRUN, "-m", "asr_kd.cli", "train", str(tmp_path / "none.yaml")], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert sum(line.startswith("asr-kd: ") for line in done.stderr.splitlines()) == 1


TRAINING = """
    from test_training import SETTINGS, SHAPE, Ensemble, load, replace, train, training
    from asr_kd.distributed import rank
    training._CHECK_STEPS = 1
    step = training._Trainer._step
    def dying(self, batch):
        if self.step == LAST_STEP and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, batch)
    training._Trainer._step = dying
    networks = Ensemble(replace(SHAPE, dropout=0.0), [1, 2])
    data, heldout = load(folder / "train", tuple("abcdef")), load(folder / "heldout", tuple("xyz"))
    train(networks, data, heldout, folder / "out", replace(SETTINGS, checkpoint_interval_s=0.0), seed=7)
    networks.save(folder / f"networks{rank()}")
"""


def test_training_goes_on_after_one_of_two_processes_was_killed(tmp_path: Path) -> None:
    from dataclasses import replace

    from test_training import SETTINGS, SHAPE, make_data

    from asr_kd.ensemble import Ensemble
    from asr_kd.training import train

    data, heldout = make_data(tmp_path / "train", 1), make_data(tmp_path / "heldout", 2, ("x", "y", "z"))
    ended = together(TRAINING.replace("LAST_STEP", "13"), tmp_path)
    assert ended[1].returncode == -signal.SIGKILL
    assert ended[0].returncode == 2
    assert len(messages(ended)) == 1
    assert torch.load(tmp_path / "out" / "checkpoint.pt")["step"] == 13
    ok(together(TRAINING.replace("LAST_STEP", "-1"), tmp_path))
    alone = Ensemble(replace(SHAPE, dropout=0.0), [1, 2])
    train(alone, data, heldout, tmp_path / "alone", SETTINGS, seed=7)
    for number in range(2):
        for one, two in zip(alone.parameters(), Ensemble.load(tmp_path / f"networks{number}").parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


RESUMING = """
    import time
    from test_training import SETTINGS, SHAPE, Ensemble, load, replace, train, training
    from asr_kd.distributed import rank
    resume = training._Trainer._resume
    def late(self):
        time.sleep(2 * rank())
        resume(self)
        (folder / f"resumed{rank()}").write_text(str(self.step))
    training._Trainer._resume = late
    data, heldout = load(folder / "train", tuple("abcdef")), load(folder / "heldout", tuple("xyz"))
    train(Ensemble(replace(SHAPE, dropout=0.0), [1, 2]), data, heldout, folder / "out", SETTINGS, seed=7)
    if rank() == 0:
        (folder / "out" / "checkpoint.pt").unlink()  # as the stage does when it has written the networks
"""


def test_a_process_that_is_late_to_a_finished_checkpoint_finds_it(tmp_path: Path) -> None:
    from dataclasses import replace

    from test_training import SETTINGS, SHAPE, make_data

    from asr_kd.ensemble import Ensemble
    from asr_kd.training import train

    data, heldout = make_data(tmp_path / "train", 1), make_data(tmp_path / "heldout", 2, ("x", "y", "z"))
    last = train(Ensemble(replace(SHAPE, dropout=0.0), [1, 2]), data, heldout, tmp_path / "out", SETTINGS, seed=7).curves[-1]["step"]
    ok(together(RESUMING, tmp_path))
    assert [int((tmp_path / f"resumed{number}").read_text()) for number in range(2)] == [last, last]
