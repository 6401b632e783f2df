# SPDX-License-Identifier: Apache-2.0
"""An observer that prints every ioctl of this process, decoded, as it returns: for a prompt or a script."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmpy.core import observe
from kvmpy.debug.decode import Decoder, Place
from kvmpy.debug.record.arguments import Follower, content_of, plan_of, struct_chunk
from kvmpy.debug.record.events import CHUNK, Chunk, Ioctl
from kvmpy.debug.record.format import What, When
from kvmpy.uapi import ffi

if TYPE_CHECKING:
    from kvmpy.core.observe import KvmFd
    from kvmpy.uapi.ioctls import Ioctl as Op
    from kvmpy.uapi.structs import Struct

_RUN = "KVM_RUN"
# Bytes of kvm_run up to where the exit's own part ends.
_RUN_HEAD = 32 + 256


def _peek(address: int, size: int) -> bytes:
    # A read of a bad address fails here, where a copy of it would kill the process.
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), size, address)
    except (OSError, OverflowError):
        return b""


def _is_guests(address: int) -> bool:
    # What points into guest memory would be followed, too: it is readable like the rest.
    del address
    return False


def _no_bitmap(slot: int) -> int:
    # A dirty bitmap is as long as its slot, which is not known here: it is not shown.
    del slot
    return 0


class LivePrinter:
    """Prints ioctls with *write*, one line each: where it was issued, what was asked, what came back.

    KVM_RUN is a line, too; the post-mortem's own look at a VM is not shown.  A context manager.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._decoder = Decoder()
        self._follow = Follower(_peek, _is_guests)
        self._local = threading.local()
        self._attached = False

    @property
    def on(self) -> bool:
        """Whether ioctls are printed now."""
        return self._attached

    def switch(self, on: bool) -> None:
        """Begin or stop printing; harmless when it is so already."""
        if on and not self._attached:
            observe.add(self)
        elif self._attached and not on:
            observe.remove(self)
        self._attached = on

    def __enter__(self) -> LivePrinter:
        self.switch(True)
        return self

    def __exit__(self, *_: object) -> None:
        self.switch(False)

    def fd_opened(self, fd: KvmFd) -> None:
        """Nothing is printed of this: the ioctl that made it is."""

    def fd_closed(self, fd: KvmFd) -> None:
        """Say that it is closed: no ioctl tells that."""
        if not observe.is_inspecting():
            self._write(f"{fd.name} close()")

    def ioctl_enter(self, fd: KvmFd, op: Op, arg: Struct | int | None) -> None:  # noqa: ARG002
        """Copy what the kernel is about to read."""
        before: list[bytes] = []
        if arg is not None and not isinstance(arg, int):
            plan = plan_of(op.nr)
            if plan.before:
                before = [struct_chunk(arg, plan.when)]
                before += self._nested(op.nr, before[0], When.IN)
        self._stack().append(before)

    def _stack(self) -> list[list[bytes]]:
        # A signal handler may issue an ioctl within another.
        stack: list[list[bytes]] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack

    def _nested(self, nr: int, argument: bytes, when: When) -> list[bytes]:
        plan = plan_of(nr)
        if not plan.deep or plan.buffer is None:
            return []
        return list(self._follow.nested(plan.buffer, content_of(argument), int(when), _no_bitmap))

    def ioctl_dropped(self, fd: KvmFd, op: Op) -> None:  # noqa: ARG002
        """Nothing is printed of what KVM was not asked."""
        if self._stack():
            self._stack().pop()

    def ioctl_exit(self, fd: KvmFd, op: Op, arg: Struct | int | None, result: int, errno: int) -> None:
        """Print the ioctl."""
        stack = self._stack()
        if not stack:
            return  # it was on its way when printing began
        packed = stack.pop()
        if observe.is_inspecting():
            return
        value = arg if isinstance(arg, int) else 0
        if arg is not None and not isinstance(arg, int):
            value = int(ffi.cast("uintptr_t", arg.cdata))
            plan = plan_of(op.nr)
            if plan.after:
                packed.append(struct_chunk(arg, When.OUT))
                packed += self._nested(op.nr, packed[-1], When.OUT)
        chunks = _unpacked(packed)
        run: Any = getattr(fd, "_run", None)
        if op.name == _RUN and run is not None:
            chunks.append(Chunk(0, bytes(ffi.buffer(run, _RUN_HEAD)), When.OUT, What.RUN))
        event = Ioctl(0, -1, op.nr, value, result, errno, end_order=1, chunks=tuple(chunks))
        place = Place(fd.kind, int(getattr(getattr(fd, "vm", fd), "vm_type", 0)))
        self._write(f"{fd.name} {self._decoder.ioctl(event, place)}")


def _unpacked(packed: list[bytes]) -> list[Chunk]:
    results = []
    for each in packed:
        address, size, when, kind, flags = CHUNK.unpack_from(each)
        results.append(Chunk(address, each[CHUNK.size : CHUNK.size + size], when, kind, flags))
    return results
