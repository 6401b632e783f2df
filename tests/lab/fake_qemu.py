#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stands for QEMU: writes console and journal as a lab kernel would, by the plan in $FAKE_QEMU_PLAN.

The plan is a list of boots; each is a list of steps: ["test", name, outcome], ["start", name],
["console", text], ["output", text], ["exit", status], ["end"], ["hang"], ["die", status].
"""

import json
import os
import re
import signal
import sys
from pathlib import Path

plan = Path(os.environ["FAKE_QEMU_PLAN"])
arguments = " ".join(sys.argv[1:])
folder = Path(re.findall(r"-serial file:(\S+)/console", arguments)[0])
boots = json.loads(plan.read_text())
number = len(list(plan.parent.glob("boot-*")))
(plan.parent / f"boot-{number}").write_text(json.dumps([os.getpid(), sys.argv[1:]]))
done = json.loads((folder / "job" / "done.json").read_text())
names = list(dict.fromkeys(step[1] for boot in boots for step in boot if step[0] in ("test", "start")))
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
    return f"selftests/area/test_a.py::{name}"


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


if boots[number][0] != ["silent"]:
    event(event="session", seed=1)
    event(event="host", summary=SUMMARY)
    event(event="collected", ids=[node(name) for name in names])
for step in boots[number]:
    if step[0] in ("test", "start"):
        assert node(step[1]) not in done, "a test that is done must not run again"
        location = ["selftests/area/test_a.py", 1, step[1]]
        event(event="start", nodeid=node(step[1]), limit=0.2, location=location)
    if step[0] == "test":
        for when in ("setup", "call", "teardown"):
            report(step[1], when, step[2] if when == "call" else "passed")
        event(event="finish", nodeid=node(step[1]))
    elif step[0] == "end":
        event(event="end")
    elif step[0] in ("console", "output"):
        write(step[0], step[1] + "\n")
    elif step[0] == "exit":
        event(event="exit", status=step[1])
    elif step[0] == "hang":
        signal.pause()
    elif step[0] == "die":
        sys.exit(step[1])
