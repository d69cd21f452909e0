"""bench/first_contact.py: its table survives processes that crash, hang or compute wrongly."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from bench.first_contact import DTYPES, OPERATORS, Probe, probe, run_probes

START = 'import os, time; print(\'{"case": "mse, tokens"}\', flush=True); '
RIGHT = 'print(\'{"errors": {"value": [1e-6, 1e-5]}}\'); '
ENDINGS = {
    "right": (RIGHT, "ok"),
    "wrong": ('print(\'{"errors": {"value": [2e-5, 1e-5]}}\')', "wrong: mse, tokens (2.0x"),
    "not_a_number": ('print(\'{"errors": {"value": [Infinity, 1e-5]}}\')', "wrong: mse, tokens"),
    "raises": ('print(\'{"failed": "ValueError: no"}\')', "failed: mse, tokens: ValueError: no"),
    "limited": ('print(\'{"refused": "it lifts 192 to 384"}\')', "ok, 1 refused: it lifts"),
    "switched_off": ('print(\'{"refused": "not built"}\')', "refused: mse, tokens: not built"),
    "crashes": ("os.abort()", "died by signal 6 in: mse, tokens"),
    "exits": ("os._exit(3)", "exit status 3 in: mse, tokens"),
    "crashes_later": (RIGHT + "os.sys.stdout.flush(); os.abort()", "died by signal 6"),
    "hangs": ("time.sleep(60)", "killed after 10 s in: mse, tokens"),
}


def process(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.slow
def test_every_process_gets_its_line_whatever_the_others_do(capsys):
    probes = [Probe(name, process(START + code)) for name, (code, _) in ENDINGS.items()]
    start = time.monotonic()
    run_probes(probes, jobs=5, seconds=50, each=10)
    assert time.monotonic() - start < 45
    lines = capsys.readouterr().out.splitlines()
    for one in probes:
        expected = ENDINGS[one.name][1]
        assert one.status.startswith(expected), one
        assert one.good == one.name.startswith(("right", "crashes_later"))
        assert any(line.startswith(one.name) and expected in line for line in lines)


def test_what_has_no_time_left_is_named():
    probes = [Probe(name, process(START + "time.sleep(60)")) for name in ("first", "second")]
    run_probes(probes, jobs=1, seconds=5, each=60)
    assert probes[0].status == "killed after 5 s in: mse, tokens"
    assert probes[1].status == "not started: out of time"


def test_a_process_that_dies_after_an_error_names_both():
    code = START + 'print(\'{"failed": "RuntimeError: illegal\\\\nmore"}\', flush=True); os.abort()'
    one = Probe("dies", process(code))
    run_probes([one], jobs=1, seconds=30, each=30)
    assert one.status == "died by signal 6; failed: mse, tokens: RuntimeError: illegal"


def test_the_output_of_a_process_that_died_is_kept():
    code = 'import os; print("CUDA error: an illegal memory access", flush=True); os.abort()'
    one = Probe("dies", process(code))
    run_probes([one], jobs=1, seconds=30, each=30)
    assert "illegal memory access" in one.output


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_is_right_on_the_torch_backend(operator, capfd):
    probe(operator, "torch", "float32", "cpu", batch=1)
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    cases, _ = OPERATORS[operator]
    assert len(said) == 2 * len(list(cases("torch", torch.float32, "cpu", 1)))
    for result in said[1::2]:
        assert all(error <= allowed for error, allowed in result["errors"].values()), result


def test_a_backend_that_cannot_run_is_refused_by_every_case(capfd):
    probe("spectrum", "cuda", "float32", "cpu", batch=1)
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert said and all("CUDA tensors" in result["refused"] for result in said[1::2])


def test_every_dtype_has_a_probe_of_every_backend():
    assert set(DTYPES) == {"float32", "float16", "bfloat16"}
    assert {name: backends for name, (_, backends) in OPERATORS.items()} == {
        "lift_kd": ("triton", "cuda", "torch"),
        "feature_kd": ("triton", "cuda", "torch"),
        "spectrum": ("cuda", "torch"),
        "second_moment": ("triton", "torch"),
    }
