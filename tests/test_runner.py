"""Many results at once: one that fails or is killed is named, and the others are made."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children, get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignlens.core.errors import AlignError, AlignlensError
from alignlens.study import Variant, runner

TASKS = [("variant", (Variant("llama", method),)) for method in ("dpo", "kto", "orpo", "sft")]


class Making:
    """Stands for a study whose results are files."""

    device, progress = "cpu", False

    def __init__(self, preset, progress=False):
        self.preset = preset

    def get(self, name, variant):
        what = self.preset.fate.get(variant.method)
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fails":
            raise AlignError("it diverged")
        if what == "sleeps":
            (self.preset.folder / "asleep").touch()
            time.sleep(60)
        (self.preset.folder / variant.method).touch()


def making(folder, jobs, **fate):
    return Making(SimpleNamespace(jobs=jobs, folder=folder, fate=fate))


@pytest.fixture
def forked(monkeypatch):
    """Workers that start in no time; all else is as with the study's own."""
    monkeypatch.setattr(runner, "get_context", lambda kind: get_context("fork"))


@pytest.mark.parametrize(
    ("jobs", "fate", "error", "words"),
    [
        (1, {"dpo": "fails"}, AlignError, {"variant llama-dpo-seed0: it diverged"}),
        (1, {"dpo": "fails", "sft": "fails"}, AlignError, {"variant llama-dpo-seed0, variant llama-sft-seed0: it div"}),
        (
            2, {"dpo": "killed", "orpo": "fails"}, AlignlensError,
            {"variant llama-dpo-seed0: its process was killed", "variant llama-orpo-seed0: it diverged"},
        ),
    ],
)  # fmt: skip
def test_what_fails_is_named_and_the_rest_of_its_step_is_made(tmp_path, forked, jobs, fate, error, words):
    later = [("variant", (Variant("llama", "ppo"),))]
    with pytest.raises(error) as caught:
        runner.run(making(tmp_path, jobs, **fate), [TASKS, later])
    assert {p.name for p in tmp_path.iterdir()} == {"dpo", "kto", "orpo", "sft"} - set(fate)
    assert not [part for part in words if part not in str(caught.value)]


def test_a_process_that_is_killed_while_it_has_nothing_to_do_is_replaced(tmp_path, forked):
    with runner._processes(making(tmp_path, 2), 9) as pools:
        pids = [pool.submit(os.getpid).result() for pool in pools]
        os.kill(pids[0], signal.SIGKILL)
        while pids[0] in {child.pid for child in active_children()}:
            time.sleep(0.05)
        made = list(runner._side_by_side(making(tmp_path, 2), TASKS, [], pools))
    assert sorted(made, key=str) == sorted([(task, None) for task in TASKS], key=str)


def test_an_interrupt_ends_everything_at_once(tmp_path):
    """Of the process that asked alone, as when a notebook is interrupted: it ends its workers."""
    words = f"""
import pathlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_runner as t
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
t.runner.get_context = lambda kind: t.get_context("fork")
t.runner.run(t.making(pathlib.Path({str(tmp_path)!r}), 2, dpo="sleeps", kto="sleeps"), [t.TASKS])"""
    asked = subprocess.Popen([sys.executable, "-c", words], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "asleep").exists():
        assert asked.poll() is None, asked.stderr.read()
        time.sleep(0.1)
    os.kill(asked.pid, signal.SIGINT)
    said = asked.communicate(timeout=10)[1]  # returns when the last of them has closed its stderr
    assert said.endswith("KeyboardInterrupt\n")


class Bar(list):
    """Stands for a progress bar, closed after its first description."""

    disable = False

    def set_description(self, words):
        self.append(words)
        self.disable = True


def test_the_bar_says_how_far_a_training_run_is(tmp_path):
    study, bar = SimpleNamespace(working=lambda *task: tmp_path), Bar()
    (tmp_path / "progress").write_text("step 12 of 60, dose 0.5 nats, 01:20 left at most")
    runner._describe(bar, study, TASKS[:1] + [("activations", (Variant("llama", "kto"),))])
    words = "variant llama-dpo-seed0 (step 12 of 60, dose 0.5 nats, 01:20 left at most); activations llama-kto"
    assert bar[0].startswith(words)
