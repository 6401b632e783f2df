# SPDX-License-Identifier: Apache-2.0
"""What `kvmpy trace` costs the traced program: single ioctls in pairs, and KVM_RUN sustained."""

from __future__ import annotations

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


def _run(command: list[str]) -> dict[str, list[float]]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BareError(f"{command[0]} did not end within {_TIMEOUT_S} s") from None
    if done.returncode:
        raise BareError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.strip()}")
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: [float(value) / 1000 for value in values] for name, *values in rows}


def measure(rounds: int, count: int = COUNT) -> Iterator[Figure]:
    """Measure the program plain and traced, in turn in each round; BareError where it does not run."""
    pairs, sustained = Samples(), {mode: Samples() for mode in MODES}
    with OwnedFolder("bench") as folder:
        program = folder / "trace_load"
        built = subprocess.run(
            ["gcc", "-O2", "-o", program, SOURCE], capture_output=True, text=True, check=False, timeout=120
        )
        if built.returncode:
            raise BareError(f"{SOURCE.name} does not compile:\n{built.stderr}")
        load = [str(program), str(count)]
        for _ in range(rounds):
            plain = _run(load)
            for mode, samples in sustained.items():
                options = [*mode.split(), *([] if mode == "-s" else [str(folder / "out")])]
                traced = _run([sys.executable, "-m", "kvmpy", "trace", *options, "--", *load])
                samples.add(traced["sustained"][0], plain["sustained"][0])
                if mode == "-q -o":
                    pairs.add(traced["pairs"][1], traced["pairs"][0])
    yield pairs.figure("trace-pairs", "KVM_GET_XSAVE (4 KiB) recorded / bare, in turn in one process", "us")
    for mode, samples in sustained.items():
        text = f"KVM_RUN, {count} times, under `kvmpy trace {mode}` ({MODES[mode]}) / untraced"
        yield samples.figure(f"trace-sustained{mode.replace(' ', '')}", text, "us")
