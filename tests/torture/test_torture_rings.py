# SPDX-License-Identifier: Apache-2.0
"""What a traced process may do to the memory that it shares with its tracer: anything."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

from kvmpy.debug.decode.decoder import Decoder
from kvmpy.debug.preload import shared
from kvmpy.debug.preload.shared import Shared
from kvmpy.debug.record.events import Ioctl
from kvmpy.debug.record.format import FRAME_HEADER, FRAME_MAGIC, FrameType
from kvmpy.debug.record.writer import RecordWriter
from kvmpy.debug.watch.trace import Sink
from kvmpy.debug.watch.trace_events import Event, Stream
from kvmpy.debug.watch.uevents import DEVPATH, KvmUevent, variables
from kvmpy.uapi.ioctls import KVM_RUN, KVM_SET_MSRS
from tests.debug.tracing import compile_program, kvmpy_command, need_kvm
from tests.torture.conftest import Torture

SIZE = 1 << 14
LATEST_S = 20.0
PROGRAM_S = 120
"""Beyond this a program hangs, even beside a dozen busy ones."""


def frame(dice: random.Random, offset: int) -> bytes:
    kind = dice.choice([*FrameType, shared.RING_DUMP, dice.getrandbits(16)])
    ioctl = Ioctl(1, 5, dice.choice([KVM_RUN.nr, KVM_SET_MSRS.nr]), 0x1000, 0, 0, 9, 9).pack()
    payload = dice.choice([ioctl, ioctl[: dice.randrange(60)], dice.randbytes(dice.randrange(400))])
    head = FRAME_HEADER.pack(FRAME_MAGIC, 0, len(payload), kind, 0, 7, 8, offset, 9)
    return head + payload + bytes(-len(payload) % 8)


def damage(dice: random.Random, ring: bytearray) -> None:
    """Change some words of the ring: its head, its positions, frames."""
    for _ in range(dice.randrange(1, 9)):
        least = shared.HEAD_AT if dice.random() < 0.3 else shared.RING_HEADER
        most = 256 if least == shared.HEAD_AT else len(ring)
        where = dice.randrange(least, most - 8) & ~7
        value = dice.choice([0, 1, FRAME_MAGIC, dice.getrandbits(64), dice.getrandbits(16)])
        ring[where : where + 8] = value.to_bytes(8, "little")


def test_rings_of_random_content(torture: Torture, tmp_path: Path) -> None:
    """No exception, no hang, and what could not be read is counted; the ring goes on behind it."""
    dice, slowest, lost, rounds = torture.random, 0.0, 0, 0
    for rounds in torture.rounds(20):
        folder = tmp_path / str(rounds)
        folder.mkdir()
        area = Shared(folder, ring_size=SIZE)
        ring = bytearray(shared.RING_HEADER + SIZE)
        ring[: shared.RING.size] = shared.RING.pack(
            shared.RING_MAGIC, SIZE, 1, 1, dice.randbytes(40), 0, 0, 0
        )
        body = b"".join(frame(dice, number) for number in range(dice.randrange(1, 20)))[:SIZE]
        ring[shared.RING_HEADER : shared.RING_HEADER + len(body)] = body
        ring[shared.HEAD_AT : shared.HEAD_AT + 8] = len(body).to_bytes(8, "little")
        if dice.random() < 0.9:
            damage(dice, ring)
        path = folder / "ring.1.0"
        path.write_bytes(ring)
        with (folder / "control").open("r+b") as file:
            file.seek(shared.RINGS_AT)
            file.write(b"\1")
        # As long as somebody has it mapped, it is a living process's.
        with path.open("r+b"):
            events: list[Event] = []
            record = RecordWriter(folder / "record")
            sink = Sink(Stream(Decoder()), events.append, record)
            began = time.monotonic()
            for _ in range(3):
                sink.take(area.poll())
            for event in events:
                event.line(0.0)
                json.dumps(event.json(0.0))
                assert event.failed in (True, False)
            slowest = max(slowest, time.monotonic() - began)
            (left,) = area.rings.values()
            # It stands at the head, or before a frame that is not complete yet.
            assert not left.pending or left.take()[0] == []
        area.poll()
        assert not area.rings
        lost += area.lost > 0
        sink.finish(min(area.order, 1 << 63))
        area.close()
    torture.figure("rings", rounds + 1)
    torture.figure("slowest ring", slowest * 1000, "ms")
    assert slowest < LATEST_S
    assert lost > 0


def test_programs_that_write_into_their_rings(torture: Torture, tmp_path: Path) -> None:
    """`kvmpy trace` ends with the program, without a traceback, and says that something is missing."""
    need_kvm()
    program = compile_program(tmp_path)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for _ in torture.rounds():
        seed, hung = torture.random.randrange(1 << 30), False
        files = ["-t", str(tmp_path / "lines"), "-o", str(tmp_path / "record")]
        command = [*kvmpy_command(), "trace", "--json", *files]
        child = subprocess.Popen(
            [*command, "--", str(program), "scribble", str(seed), "3000"], stderr=subprocess.PIPE, text=True
        )
        try:
            _, errors = child.communicate(timeout=PROGRAM_S)
        except subprocess.TimeoutExpired:
            child.terminate()
            _, errors = child.communicate()
            hung = True
        told = child.returncode == 125 and "incomplete: " in errors.splitlines()[-1]
        found = {"hung": hung, "tracebacks": "Traceback" in errors, "losses not told": not told}
        counts.update(found)
        if any(found.values()):
            wrong.append(f"seed {seed}: status {child.returncode}: {errors}")
        counts["programs"] += 1
    for name in ("programs", "hung", "tracebacks", "losses not told"):
        torture.figure(name, counts[name])
    assert wrong == []


def test_uevents_of_random_content(torture: Torture) -> None:
    """Whoever may send netlink messages sends what he likes: an event or None, and no exception."""
    dice, good = torture.random, 0
    right = {"EVENT": "create", "PID": "7", "CREATED": "9", "COUNT": "2", "SEQNUM": "11"}
    right["STATS_PATH"] = "/kvm/7-3"
    values = ["create", "destroy", "1", "-1", "", "x", "٣", "9" * 5000, "/kvm/12-³", "/kvm/12-7", "\0", "1_0"]
    for _ in torture.rounds(1000):
        fields = {"DEVPATH": DEVPATH, "ACTION": "change"}
        for key, value in right.items():
            if dice.random() < 0.95:
                fields[key] = value if dice.random() < 0.8 else dice.choice(values)
        raw = bytearray(b"\0".join(f"{key}={value}".encode() for key, value in fields.items()))
        if dice.random() < 0.3:
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        event = KvmUevent.parse(variables(bytes(raw)))
        if event is not None:
            good += 1
            assert event.vm_fd is None or event.vm_fd >= 0
            assert min(event.pid, event.count, event.created, event.seqnum) >= 0
    assert good > 0
    torture.figure("uevents understood", good)
