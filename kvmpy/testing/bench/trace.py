# SPDX-License-Identifier: Apache-2.0
"""What `kvmpy trace` costs: a program in single ioctls and in KVM_RUN sustained, the tracer in CPU."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kvmpy.owned import OwnedFolder
from kvmpy.testing.bench.bare import BareError
from kvmpy.testing.bench.samples import Figure, Samples

COUNT = 200_000
SOURCE = Path(__file__).with_name("trace_load.c")
_TIMEOUT_S = 600
MODES = {"-q -o": "a record, no lines", "-s": "counts alone", "-t": "decoded lines"}
JSON = "--json -t"
# JSON costs the most, and fewer tell as much of it.
_JSON_PART = 8


def _cpu_us() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1e6


def _run(command: list[str]) -> dict[str, list[float]]:
    """Run the program, alone or traced: what it prints in us, and ``tracer``, the CPU of all others."""
    before = _cpu_us()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BareError(f"{command[0]} did not end within {_TIMEOUT_S} s") from None
    if done.returncode:
        raise BareError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.strip()}")
    rows = (line.split() for line in done.stdout.splitlines())
    said = {name: [float(value) / 1000 for value in values] for name, *values in rows}
    return {**said, "tracer": [_cpu_us() - before - said["cpu"][0]]}


def measure(rounds: int, count: int = COUNT) -> Iterator[Figure]:
    """Measure the program plain and traced, in turn in each round; BareError where it does not run."""
    modes = (*MODES, JSON)
    pairs, sustained, cpu = (
        Samples(),
        {mode: Samples() for mode in MODES},
        {mode: Samples() for mode in modes},
    )
    with OwnedFolder("bench") as folder:
        program = folder / "trace_load"
        built = subprocess.run(
            ["gcc", "-O2", "-o", program, SOURCE], capture_output=True, text=True, check=False, timeout=120
        )
        if built.returncode:
            raise BareError(f"{SOURCE.name} does not compile:\n{built.stderr}")
        for _ in range(rounds):
            plain = _run([str(program), str(count)])["sustained"][0]
            for mode in modes:
                options = [*mode.split(), *([] if mode == "-s" else [str(folder / "out")])]
                command = [sys.executable, "-m", "kvmpy", "trace", *options, "--", str(program)]
                runs = max(1, count // _JSON_PART) if mode == JSON else count
                # What a tracer takes to begin and to end is no ioctl's.
                idle, traced = _run([*command, "0"]), _run([*command, str(runs)])
                cpu[mode].add((traced["tracer"][0] - idle["tracer"][0]) / runs, plain)
                if mode in sustained:
                    sustained[mode].add(traced["sustained"][0], plain)
                if mode == "-q -o":
                    pairs.add(traced["pairs"][1], traced["pairs"][0])
    yield pairs.figure("trace-pairs", "KVM_GET_XSAVE (4 KiB) recorded / bare, in turn in one process", "us")
    for mode, samples in sustained.items():
        text = f"KVM_RUN, {count} times, under `kvmpy trace {mode}` ({MODES[mode]}) / untraced"
        yield samples.figure(f"trace-sustained{mode.replace(' ', '')}", text, "us")
    for mode, samples in cpu.items():
        text = f"CPU of `kvmpy trace {mode}` itself for a KVM_RUN / what that takes untraced"
        yield samples.figure(f"trace-cpu{mode.replace(' ', '')}", text, "us")
