# SPDX-License-Identifier: Apache-2.0
"""An observer that prints every ioctl of this process, decoded, as it returns: for a prompt or a script."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmpy.core import observe
from kvmpy.debug.decode.decoder import Decoder, Place
from kvmpy.debug.record.capture import Capture, Known
from kvmpy.debug.record.events import Ioctl
from kvmpy.debug.record.format import ObjectKind, object_kind
from kvmpy.debug.record.tracker import address_of
from kvmpy.uapi.ioctls import KVM_RUN

if TYPE_CHECKING:
    from kvmpy.core.observe import KvmFd
    from kvmpy.uapi.ioctls import Ioctl as Op
    from kvmpy.uapi.structs import Struct


class LivePrinter:
    """Prints ioctls with *write*, one line each: where it was issued, what was asked, what came back.

    KVM_RUN is a line, too; the post-mortem's own look at a VM is not shown.  A context manager.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._decoder = Decoder()
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

    def ioctl_enter(self, fd: KvmFd, op: Op, arg: Struct | int | None) -> None:
        """Copy what the kernel is about to read."""
        vm = getattr(fd, "vm", fd)
        # Slots are not followed here: a dirty bitmap, as long as its slot, is not shown.
        above = Known(0, ObjectKind.VM, vm_type=getattr(vm, "vm_type", 0))
        known = above if vm is fd else Known(0, object_kind(fd.kind), above)
        area = getattr(fd, "area", None) if op is KVM_RUN else None
        if area is not None:
            known.mapped(address_of(memoryview(area)), len(area))
        capture = Capture()
        capture.enter(known, -1, op.nr, arg)
        self._stack().append(capture)

    def _stack(self) -> list[Capture]:
        # A signal handler may issue an ioctl within another.
        stack: list[Capture] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack

    def ioctl_dropped(self, fd: KvmFd, op: Op) -> None:  # noqa: ARG002
        """Nothing is printed of what KVM was not asked."""
        if self._stack():
            self._stack().pop().end()

    def ioctl_exit(self, fd: KvmFd, op: Op, arg: Struct | int | None, result: int, errno: int) -> None:  # noqa: ARG002
        """Print the ioctl."""
        stack = self._stack()
        if not stack:
            return  # it was on its way when printing began
        capture = stack.pop()
        if not observe.is_inspecting():
            capture.exit(result)
            event = Ioctl.unpack(capture.payload(result, errno, 1))
            place = Place(fd.kind, int(getattr(getattr(fd, "vm", fd), "vm_type", 0)))
            self._write(f"{fd.name} {self._decoder.ioctl(event, place)}")
        capture.end()
