"""The example of several tasks on a tiny model: whole, stopped, killed and resumed, on one and on two processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

EXAMPLE = Path(__file__).parents[2] / "examples" / "multitask_moe.py"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")  # on a port that is free
TIMEOUT = 240.0


class Run:
    """The example in a process of its own, or under a launcher in two."""

    def __init__(self, folder: Path, output: str, arguments: tuple[str, ...], launcher: tuple[str, ...] = ()) -> None:
        self.output, self.text = folder / output, folder / f"{output}.txt"
        command = [sys.executable, *launcher, str(EXAMPLE), "--model", str(folder / "model")]
        command += ["--output", str(self.output), "--batch-size", "4", "--train-images", "16", "--test-images", "8"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        with self.text.open("a") as text:  # not a pipe: one that a killed launcher's workers hold never ends
            self.process = subprocess.Popen([*command, *arguments], stdout=text, stderr=text, env=environment)

    def workers(self) -> list[psutil.Process]:
        """Those that train."""
        return psutil.Process(self.process.pid).children() or [psutil.Process(self.process.pid)]

    def lines(self) -> list[str]:
        log = self.output / "log.jsonl"
        return log.read_text().splitlines() if log.exists() else []

    def wait(self) -> int:
        """Until all is over; what does not end is ended, workers too."""
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()
            raise AssertionError(f"still running after {TIMEOUT} s: {self.text.read_text()[-3000:]}") from None

    def finish(self) -> dict[str, float]:
        code = self.wait()
        assert code == 0, self.text.read_text()[-3000:]
        return json.loads((self.output / "results.json").read_text())

    def kill_after(self, updates: int, seconds: float) -> bool:
        """Kill one of the workers so long after so many updates of this run; False if the run was done by then."""
        end, before = time.monotonic() + TIMEOUT, len(self.lines())
        while len(self.lines()) == before or len(self.lines()) < updates:
            if self.process.poll() == 0:
                return False
            assert self.process.poll() is None and time.monotonic() < end, self.text.read_text()[-3000:]
            time.sleep(0.005)
        time.sleep(seconds)
        if self.process.poll() == 0:
            return False
        random.choice(self.workers()).send_signal(signal.SIGKILL)
        return self.wait() != 0


@pytest.fixture
def start(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Run]:
    make_model().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil().save_pretrained(tmp_path / "model")
    return lambda output, *arguments, launcher=(): Run(tmp_path, output, arguments, launcher)


def assert_equal(found: Run, expected: Run, updates: int) -> None:
    """Weights bit for bit, and each update logged once, with the same loss."""
    tensors, others = (load_file(run.output / "adapter" / "adapter_model.safetensors") for run in (found, expected))
    assert set(tensors) == set(others)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in others.items())
    assert [json.loads(line)["update"] for line in found.lines()] == list(range(1, updates + 1))
    assert found.lines() == expected.lines()


@pytest.mark.slow  # three processes; each step of a checkpoint is below, kills are tests of several processes
def test_a_run_that_stops_goes_on_bit_for_bit(start):
    settings = ("--epochs", "2", "--experts", "3", "--gradient-accumulation", "2", "--mixed-precision", "bf16")
    results = (whole := start("whole", *settings)).finish()
    assert set(results) == {"digits", "odd", "ink"}
    start("parts", *settings, "--max-updates", "3").finish()
    parts = start("parts", *settings)
    assert parts.finish() == results
    assert_equal(parts, whole, updates=12)


@pytest.mark.dist
def test_two_processes(start):
    results = start("two", "--epochs", "1", "--experts", "3", "--expert-type", "lora", launcher=TWO).finish()
    assert set(results) == {"digits", "odd", "ink"}


@pytest.mark.dist
@pytest.mark.parametrize("launcher", [(), TWO], ids=["one process", "two processes"])
def test_a_killed_run_goes_on_bit_for_bit(start, launcher):
    """Killed at moments nobody chose, most of them while a checkpoint is written: every update has one."""
    epochs = 2 if launcher == () else 4  # the batches of an epoch are shared
    settings = ("--epochs", str(epochs), "--experts", "3", "--save-every", "1")
    results = (whole := start("whole", *settings, launcher=launcher)).finish()
    seed = random.SystemRandom().randrange(2**32)
    print(f"{seed=}")
    moments = random.Random(seed)
    kills = [
        start("killed", *settings, launcher=launcher).kill_after(updates, moments.uniform(0, 0.3))
        for updates in (3, 9, 15)
    ]
    assert any(kills), "every run was faster than its killer"
    killed = start("killed", *settings, launcher=launcher)
    assert killed.finish() == results
    assert "continuing at update" in killed.text.read_text()
    assert_equal(killed, whole, updates=24)


def test_the_log_ends_where_the_checkpoint_is(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    from multitask_moe import cut_log

    log = tmp_path / "log.jsonl"
    cut_log(log, 0)
    assert log.read_text() == ""
    log.write_text('{"update": 1}\n{"update": 2}\n{"upd')
    cut_log(log, 1)
    assert log.read_text() == '{"update": 1}\n'


class KilledError(Exception):
    """Instead of a signal."""


class OneProcess:
    """What saving needs of an Accelerator."""

    is_main_process = True

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def wait_for_everyone(self) -> None:
        """Nobody else is there."""

    def save_state(self, folder: str) -> None:
        """Two files, which belong together."""
        Path(folder).mkdir(exist_ok=True)
        for name in ("weights", "optimizer"):
            (Path(folder) / name).write_text(str(self.updates))


@pytest.mark.parametrize("step", range(8))
def test_a_checkpoint_is_whole_wherever_saving_ends(monkeypatch, tmp_path, step):
    """Update 1 is saved; update 2's saving ends in front of its n-th change of the disk; updates 3 and 4 are saved."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import multitask_moe

    multitask_moe.save_checkpoint(OneProcess(1), tmp_path, 1)
    left = step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KilledError
            left -= 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "write_text"), (os, "unlink"), (os, "rmdir"), (Path, "mkdir")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            multitask_moe.save_checkpoint(OneProcess(2), tmp_path, 2)
            assert step == 7  # all of it
        except KilledError:
            assert step < 7
    for updates in (None, 3, 4):
        if updates:
            multitask_moe.save_checkpoint(OneProcess(updates), tmp_path, updates)
        newest = multitask_moe.checkpoints(tmp_path)[-1]
        found = {(newest / name).read_text() for name in ("weights", "optimizer")}
        assert found == {newest.name.rpartition("-")[2]} and (updates is None or found == {str(updates)})
