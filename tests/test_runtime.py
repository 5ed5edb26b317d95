"""Device, precision, failures and signals."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_tiny
from tqdm import tqdm

import dataset_index
import runtime
from base.errors import UserError

# --- device and precision ---


@pytest.mark.parametrize(
    ("cuda", "mps", "choice", "expected"),
    [
        (False, False, "auto", "cpu"),
        (False, True, "auto", "mps"),
        (True, True, "auto", "cuda"),
        (True, True, "mps", "mps"),
        (True, True, "cpu", "cpu"),
    ],
)
def test_auto_takes_the_first_available_device(monkeypatch, cuda, mps, choice, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert runtime.pick_device(choice).type == expected


def test_a_missing_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: .* no such device .* --device auto"):
        runtime.pick_device("cuda")
    with pytest.raises(UserError, match=r"--device gpu: .* no such device"):
        runtime.pick_device("gpu")


def test_a_device_may_have_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.pick_device("cuda:1") == torch.device("cuda", 1)


def test_amp_choices(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert runtime.amp_dtype("off", cuda) is None
    assert runtime.amp_dtype("bf16", cpu) is torch.bfloat16
    assert runtime.amp_dtype("fp16", cpu) is torch.float16
    assert runtime.amp_dtype("auto", torch.device("mps")) is None
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert runtime.amp_dtype("auto", cuda) is expected


# --- failures ---

CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("a.png: no mask"), "a.png: no mask"),
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), "out of memory (CUDA out of memory); HINT"),
        (MemoryError(), "out of memory (MemoryError); HINT"),
        (RuntimeError(CPU_ALLOCATOR), f"out of memory ({CPU_ALLOCATOR}); HINT"),
        (RuntimeError("shapes do not match"), None),
        (ValueError(CPU_ALLOCATOR), None),
        (KeyError("a bug"), None),
    ],
)
def test_errors_that_the_user_can_mend_have_a_message(error, expected):
    assert runtime.user_message(error, "HINT") == expected


class EndedProcess:
    """A data worker that has ended."""

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def join(self, timeout):
        assert timeout < 1


@pytest.mark.parametrize(("exitcode", "is_named"), [(0, False), (1, True), (-9, True)])
def test_the_death_of_a_data_worker_is_told_from_a_bug(exitcode, is_named):
    workers = [EndedProcess(exitcode)]
    error = RuntimeError("DataLoader worker exited unexpectedly")
    runtime.watch_data_workers(workers)
    try:
        message = runtime.user_message(error, "HINT")
        assert (message is not None and "a process that prepares data died" in message) == is_named
        assert runtime.user_message(ValueError("a bug"), "HINT") is None
    finally:
        runtime.forget_data_workers(workers)
    assert runtime.user_message(error, "HINT") is None


# --- signals ---


@pytest.mark.parametrize("number", runtime.STOP_SIGNALS)
def test_the_first_signal_is_noted_and_the_second_ends_the_run_at_once(capsys, number):
    previous = signal.signal(number, signal.default_int_handler)
    try:
        with runtime.StopRequest() as stop:
            stop.check()
            signal.raise_signal(number)
            assert stop.signal == number
            assert f"{signal.Signals(number).name}: the run ends" in capsys.readouterr().err
            with pytest.raises(runtime.Stopped):
                stop.check()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, previous)


def test_one_of_several_processes_stops_only_after_its_iteration(monkeypatch):
    with runtime.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setenv("WORLD_SIZE", "2")
        stop.check()
        monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(runtime.Stopped):
            stop.check()


@pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
@pytest.mark.parametrize("number", runtime.STOP_SIGNALS)
@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_reader_that_is_gone_ends_no_run(monkeypatch, kind, number):
    """The window of ssh was closed, or Ctrl-C has also ended `| tee`: every print fails."""
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    with open(writer, "w") as console:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, console)
        os.close(reader)
        with runtime.StopRequest() as stop:
            with pytest.raises(OSError):  # before a signal, this is an error as any other
                print("lost", flush=True)
            signal.raise_signal(number)
            assert stop.signal == number
            progress = tqdm(range(3), mininterval=0)
            assert list(progress) == [0, 1, 2]
            print("lost", flush=True)
        print("lost", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that closing it does not fail


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_hangup_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", runtime.STOP_SIGNALS)
def test_a_signal_interrupts_a_command_and_a_second_one_ends_it_at_once(number):
    def interrupt():
        with runtime.interrupt_on_signals():
            try:
                signal.raise_signal(number)
            finally:
                handlers.append(signal.getsignal(number))

    handlers = []
    previous = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(runtime.Interrupted) as raised:
            interrupt()
        assert handlers == [signal.SIG_DFL]
        assert (raised.value.name, raised.value.exit_code) == (signal.Signals(number).name, 128 + number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("flags", [(), ("--preview",)])
def test_a_signal_before_the_training_ends_with_a_line(
    tiny_weights, config_file, tmp_path, monkeypatch, capsys, flags
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        dataset_index, "index_datasets", lambda *args, **_: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert run_tiny(config_file(), tiny_weights, *flags) == 143
    assert capsys.readouterr().err == "SIGTERM: nothing was trained\n"
    assert not Path("exp").exists()
