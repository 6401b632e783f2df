# SPDX-License-Identifier: Apache-2.0
"""A record with a frame of every kind, and changes to what its frames say that no checksum tells."""

from __future__ import annotations

import random
from collections.abc import Callable

from kvmpy.debug.decode.decoder import Decoder
from kvmpy.debug.record.events import (
    Chunk,
    Close,
    Deadline,
    End,
    Enter,
    Event,
    FileCall,
    Ioctl,
    Kick,
    Lines,
    Lost,
    Map,
    Memory,
    Note,
    Object,
    Pages,
    Payload,
    Thread,
    Unmap,
    Write,
)
from kvmpy.debug.record.format import FILE_HEADER, FileHeader, Frame, FrameReader, ObjectKind, What, When
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.prune import prune, target_of
from kvmpy.debug.record.repro import write_c
from kvmpy.debug.record.script import build
from kvmpy.debug.watch.trace_events import Stream
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import ExitReason, SevCmd
from kvmpy.uapi.structs import (
    kvm_msr_entry,
    kvm_msrs,
    kvm_regs,
    kvm_run,
    kvm_sev_cmd,
    kvm_sev_snp_launch_start,
    kvm_userspace_memory_region2,
)

MEMORY, AREA, ARGUMENT, NESTED = 0x7000_0000_0000, 0x7100_0000_0000, 0x7200_0000_0000, 0x7200_0000_1000
KVM, VM, VCPU, GMEM, EVENTFD = range(1, 6)


def _call(op: ioctls.Ioctl, target: int, *chunks: Chunk, arg: int = ARGUMENT, result: int = 0) -> Ioctl:
    return Ioctl(target, target + 2, op.nr, arg, result, 22 if result < 0 else 0, 0, 5, chunks)


def _run(reason: ExitReason) -> tuple[Chunk, ...]:
    before, after = kvm_run(), kvm_run(exit_reason=reason)
    after.io.size, after.io.port, after.io.count, after.io.data_offset = 1, 0x10, 1, 0x1000
    return (
        Chunk(AREA, before.to_bytes()[:288], When.IN, What.RUN),
        Chunk(AREA, after.to_bytes()[:288], When.OUT, What.RUN),
        Chunk(AREA + 0x1000, b"\x42", When.OUT, What.RUN),
    )


def _payloads() -> list[Payload]:
    region = kvm_userspace_memory_region2(slot=0, memory_size=0x4000, userspace_addr=MEMORY)
    msrs = kvm_msrs.of([kvm_msr_entry(index=0x10, data=5), kvm_msr_entry(index=0xC000_0080, data=1)])
    command = kvm_sev_cmd(id=SevCmd.KVM_SEV_SNP_LAUNCH_START, data=NESTED, sev_fd=9)
    start = kvm_sev_snp_launch_start(policy=0x30000)
    return [
        Lines({"kvmpy": "0", "machine": "x86_64", "recorder": "api"}),
        Thread(1, 1, 0, "main"),
        Object(KVM, 0, KVM + 2, ObjectKind.SYSTEM, 0, "kvm"),
        _call(ioctls.KVM_CREATE_VM, KVM, arg=0, result=VM + 2),
        Object(VM, KVM, VM + 2, ObjectKind.VM, 4, "vm0"),
        _call(ioctls.KVM_CREATE_VCPU, VM, arg=0, result=VCPU + 2),
        Object(VCPU, VM, VCPU + 2, ObjectKind.VCPU, 6, "vm0/vcpu0"),
        Object(GMEM, VM, GMEM + 2, ObjectKind.GMEM, 0, "vm0/gmem0"),
        Object(EVENTFD, 0, EVENTFD + 2, ObjectKind.EVENTFD, 0, "eventfd"),
        Map(MEMORY, 0x4000),
        Map(AREA, 0x3000, 0, VCPU),
        Pages(1, (b"\xf4" * 4096, bytes(range(256)) * 16)),
        Memory(MEMORY, (1, 0, 2, 0), 1),
        _call(ioctls.KVM_SET_USER_MEMORY_REGION2, VM, Chunk(ARGUMENT, region.to_bytes())),
        _call(ioctls.KVM_SET_REGS, VCPU, Chunk(ARGUMENT, kvm_regs(rip=0x1000, rflags=2).to_bytes())),
        _call(ioctls.KVM_SET_MSRS, VCPU, Chunk(ARGUMENT, msrs.to_bytes()), result=2),
        Write(MEMORY + 0x1000, b"what the host wrote"),
        Deadline(VCPU, 1_000_000),
        _call(ioctls.KVM_RUN, VCPU, *_run(ExitReason.KVM_EXIT_IO), arg=0),
        Kick(VCPU, 3, 16, 1),
        Memory(MEMORY + 0x1000, (2,)),
        _call(ioctls.KVM_RUN, VCPU, *_run(ExitReason.KVM_EXIT_HLT), arg=0),
        FileCall(GMEM, 1, 3, 0, 0x1000),
        Event(EVENTFD, 1, 1),
        _call(
            ioctls.KVM_MEMORY_ENCRYPT_OP,
            VM,
            Chunk(ARGUMENT, command.to_bytes()),
            Chunk(NESTED, start.to_bytes(), When.IN, What.NESTED),
            result=-1,
        ),
        _call(ioctls.KVM_GET_REGS, VCPU, Chunk(ARGUMENT, kvm_regs(rax=1).to_bytes(), When.OUT)),
        Note({"remark": "something"}),
        Lost(0),
        Unmap(AREA, 0x3000),
        Close(VCPU),
        Enter(VM, VM + 2, ioctls.KVM_CHECK_EXTENSION.nr, 1),
        End(31),
    ]


def record() -> bytes:
    """Return a record of a VM's life that reads and can be written as C."""
    content = FileHeader().pack()
    for order, payload in enumerate(_payloads(), 1):
        if isinstance(payload, Ioctl) and not isinstance(payload, Enter):
            payload = Ioctl(**{**vars(payload), "end_order": order})
        content += Frame(payload.TYPE, payload.pack(), 1, 1, order, order * 1000).pack()
    return content


def _number(payload: bytes, numbers: random.Random) -> bytes:
    """Return a payload of the same length in which one aligned number is another."""
    size = numbers.choice([4, 4, 8]) if len(payload) >= 8 else 4
    offset = numbers.randrange(len(payload) // size) * size
    value = numbers.choice([0, 1, 2, 3, 7, 0x1000, MEMORY, AREA, ARGUMENT, NESTED, -1, 1 << 31, 1 << 63])
    content = bytearray(payload)
    content[offset : offset + size] = (value % (1 << size * 8)).to_bytes(size, "little")
    return bytes(content)


def repack(data: bytes, mutate: Callable[[bytes, random.Random], bytes], numbers: random.Random) -> bytes:
    """Return the record *data* with one to three frames that say something else, and right checksums."""
    frames = list(FrameReader(data))
    for _ in range(numbers.randint(1, 3)):
        place = numbers.randrange(len(frames))
        frame, kind = frames[place], numbers.randrange(9)
        if kind == 0:
            del frames[place]
        elif kind == 1:
            frames.insert(numbers.randrange(len(frames) + 1), frame)
        elif kind == 2:
            field, most = numbers.choice(
                [("tid", 32), ("pid", 32), ("order", 64), ("time_ns", 64), ("flags", 16)]
            )
            value = numbers.choice([0, 1, 2, 7, (1 << most) - 1, numbers.randrange(1 << most)])
            frames[place] = Frame(**{**vars(frame), field: value})
        elif kind == 3:
            frames[place] = Frame(**{**vars(frame), "type": numbers.randrange(20)})
        elif kind == 4:
            frames[place] = Frame(**{**vars(frame), "payload": mutate(frame.payload, numbers)})
        elif len(frame.payload) >= 4:
            frames[place] = Frame(**{**vars(frame), "payload": _number(frame.payload, numbers)})
        if not frames:
            break
    return data[: FILE_HEADER.size] + b"".join(frame.pack() for frame in frames)


def use(data: bytes) -> str:
    """Do with a record what replay, shrink, repro and ``trace --read`` begin with; return its C."""
    stream = Stream(Decoder())
    for frame in FrameReader(data):
        for event in stream.feed(frame):
            event.line(0)
            event.json(0)
    loaded = Record.from_bytes(data)
    loaded.describe()
    if not loaded.ioctls:
        return ""
    script = build(loaded)
    target = target_of(script)
    chosen = prune(script, target)
    write_c(chosen, next(step for step in chosen.steps if step.entry is target.entry))
    return write_c(script, target)
