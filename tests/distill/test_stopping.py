"""Signals, sent to small processes that load distill/stopping.py by itself."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.stopping import EXIT_CODE, Interrupted, StopRequest

SOURCE = Path(__file__).parents[2] / "distill" / "stopping.py"
SCRIPT = f"""
import importlib.util, signal, sys, time
spec = importlib.util.spec_from_file_location("stopping", {str(SOURCE)!r})
stopping = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stopping)

def work(request, seconds):
    print("ready", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
    print(request.name, flush=True)

with stopping.StopRequest(raising=True) as outer:
    try:
        {{body}}
    except stopping.Interrupted as error:
        print(error, flush=True)
        time.sleep(float(sys.argv[1]))  # what is left to do at the end
        sys.exit(stopping.EXIT_CODE)
"""
AT_ONCE = "work(outer, 30)"
LATER = """
        with stopping.StopRequest() as inner:
            work(inner, float(sys.argv[1]))
        raise stopping.Interrupted(f"{outer.name}, all saved")
"""


def start(body, seconds):
    script = SCRIPT.replace("{body}", body.strip())
    process = subprocess.Popen([sys.executable, "-c", script, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_at_once(number):
    process = start(AT_ONCE, 0)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert output == f"stopped by {number.name}\n"
    assert process.returncode == EXIT_CODE == 75


@pytest.mark.parametrize("body", [AT_ONCE, LATER])
def test_the_launchers_three_signals_count_as_one(body):
    process = start(body, 0.8)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    process.communicate(timeout=10)
    assert process.returncode == EXIT_CODE


def test_a_noted_signal_lets_the_work_finish():
    process = start(LATER, 0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == "SIGTERM\nSIGTERM, all saved\n"


@pytest.mark.parametrize("body", [AT_ONCE, LATER])
def test_a_second_signal_kills(body):
    process = start(body, 30)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(1.2)  # on a busy machine the first of these may still count as a repetition
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGINT


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        signal.raise_signal(signal.SIGTERM)
        assert request.name == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_interrupt_is_not_mistaken_for_an_error():
    assert issubclass(Interrupted, KeyboardInterrupt) and not issubclass(Interrupted, Exception)
