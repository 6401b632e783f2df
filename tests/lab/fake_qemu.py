#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stands for QEMU: writes console and journal as a lab kernel would, by the plan in $FAKE_QEMU_PLAN.

The plan is a list of boots; each is a list of steps: ["test", name, outcome], ["start", name],
["console", text], ["output", text], ["exit", status], ["end"], ["hang"], ["die", status]; ["test", name,
outcome, texts] leaves a record in so many pieces, too, and ["say", text] puts a line into the journal. A test
that is not among those which the host handed out does not run; ["silent"] at the start: the kernel does not
come up; ["machine", values, console] at the start: what it says of itself that is not as asked for, and what
the kernel had said before. ["refuse"] at the start: its monitor cannot move the machine's state.

A machine with a monitor becomes a snapshot, or is resumed from one where it waits for its state.
"""

import base64
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
import zlib
from pathlib import Path
from typing import Any

plan = Path(os.environ["FAKE_QEMU_PLAN"])
arguments = " ".join(sys.argv[1:])
folder = Path(re.findall(r"id=console,path=(\S+)/console", arguments)[0])
boots = json.loads(plan.read_text())
number = len(list(plan.parent.glob("boot-*")))
(plan.parent / f"boot-{number}").write_text(json.dumps([os.getpid(), sys.argv[1:]]))
SUMMARY = {
    "kernel": "9.9.9 x86_64",
    "cpu": "fake",
    "vendor_modules": ["kvm_amd"],
    "platform": "lab",
    "kvm": True,
    "kvm_missing": "",
    "vm_types": [],
    "protections": {},
    "labels": {},
    "accelerator": "tcg",
}


def node(name: str) -> str:
    return f"{os.environ.get('FAKE_QEMU_FOLDER', 'selftests/area')}/test_a.py::{name}"


def write(name: str, text: str) -> None:
    with open(folder / name, "a", encoding="utf-8") as stream:
        stream.write(text)


def event(**values: object) -> None:
    write("journal", json.dumps(values) + "\n")


def report(name: str, when: str, outcome: str) -> None:
    data: dict[str, object] = {
        "nodeid": node(name),
        "location": ["selftests/area/test_a.py", 1, name],
        "keywords": {},
    }
    data |= {"outcome": outcome, "longrepr": "boom" if outcome == "failed" else None, "when": when}
    data |= {"sections": [], "duration": 0.1, "start": 0, "stop": 0, "user_properties": []}
    event(event="report", nodeid=node(name), data=data | {"$report_type": "TestReport"})


def machine() -> dict[str, Any]:
    """Return the machine as it was asked for."""
    env = shlex.split((folder / "job" / "job.env").read_text())
    asked = json.loads(next(word.partition("=")[2] for word in env if word.startswith("KVMPY_LAB_ASKED=")))
    pairs = (word.partition("=") for word in asked["parameters"])
    return {
        "cpus": int(re.findall(r"-smp (\d+)", arguments)[0]),
        "memory": int(re.findall(r"-m (\d+)M", arguments)[0]),
        "nodes": arguments.count("nodeid=") or 1,
        "parameters": {name: value for name, _, value in pairs if "." in name},
        "flags": {flag[1:]: flag[0] == "+" for flag in asked["cpu"]},
    }


def share(want: int) -> dict[str, Any]:
    """Ask for tests, and return the answer."""
    event(event="ready", number=want)
    file = folder / "job" / "work" / str(want)
    while not file.exists():
        time.sleep(0.01)
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def serve(stream: socket.socket, *, refuse: bool) -> None:
    """Answer the monitor's commands, until the machine is to run."""
    stream.sendall(b'{"QMP": {"version": {"qemu": {"major": 7}, "package": ""}, "capabilities": []}}\n')
    text = ""
    while data := stream.recv(1 << 16):
        text += data.decode()  # whose commands have no end but their own
        try:
            command = json.loads(text)
        except ValueError:
            continue
        text = ""
        status = {"status": "failed" if refuse else "completed"}
        answer = status if command["execute"] == "query-migrate" else {}
        name = {"id": command["id"]} if "id" in command else {}
        stream.sendall(json.dumps({"return": answer, **name}).encode() + b"\n")
        if command["execute"] == "migrate":
            (Path(command["arguments"]["uri"].split()[-1])).write_text("state")
        if command["execute"] == "cont":
            return
    signal.pause()


monitor = re.findall(r"socket,id=monitor,fd=(\d+)", arguments)
if monitor:
    refusing = boots[number][0] == ["refuse"]
    if "-incoming" not in sys.argv:
        event(event="frozen")
    elif boots[number][0][0] == "die":
        sys.exit(boots[number][0][1])
    stream = socket.socket(fileno=int(monitor[0]))
    serve(stream, refuse=refusing)

steps = [step for boot in boots for step in boot]
planned = {node(step[1]) for step in steps if step[0] in ("test", "start")}
planned |= {json.loads(step[1]).get("nodeid") for step in steps if step[0] == "say"}
mine: set[str] = set()
plan_of_this_boot = boots[number]
if plan_of_this_boot[0] != ["silent"]:
    event(event="session", seed=1)
    differing, said = plan_of_this_boot[0][1:] if plan_of_this_boot[0][0] == "machine" else ({}, "")
    write("console", said)
    event(event="host", summary=SUMMARY, **{**machine(), **differing})
    given = share(1)
    listed = [node(f"test_{letter}") for letter in "abcdefgh"[: int(os.environ.get("FAKE_QEMU_TESTS", "3"))]]
    mine = planned & (set(given["only"]) if "only" in given else set(listed) - set(given["skip"]))
    event(event="collected", number=1, ids=[nodeid for nodeid in listed if nodeid in mine])
for step in plan_of_this_boot:
    if step[0] in ("test", "start"):
        assert node(step[1]) in mine, "a test that is done must not run again"
        location = ["selftests/area/test_a.py", 1, step[1]]
        event(event="start", nodeid=node(step[1]), limit=0.2, location=location)
    if step[0] == "test":
        for when in ("setup", "call", "teardown"):
            report(step[1], when, step[2] if when == "call" else "passed")
        event(event="finish", nodeid=node(step[1]))
        for at, text in enumerate(pieces := step[3] if len(step) > 3 else []):
            data = base64.b64encode(zlib.compress(text.encode())).decode()
            ends = {"first": at == 0, "last": at == len(pieces) - 1}
            event(event="record", name=f"{step[1]}.rec", data=data, **ends)
        event(event="over")
    elif step[0] == "end":
        event(event="done", number=1)
        assert share(2) == {"end": True}
        event(event="end")
    elif step[0] == "say":
        write("journal", step[1] + "\n")
    elif step[0] in ("console", "output"):
        write(step[0], step[1] + "\n")
    elif step[0] == "exit":
        event(event="exit", status=step[1])
    elif step[0] == "hang":
        signal.pause()
    elif step[0] == "die":
        sys.exit(step[1])
