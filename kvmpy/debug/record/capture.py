# SPDX-License-Identifier: Apache-2.0
"""The engine in C (uapi/native/capture.c) that copies what an ioctl reads and writes, as Python calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvmpy.uapi import ffi, lib
from kvmpy.uapi.structs import Struct

# More than most ioctls take: what they copy before they are issued.
_SCRATCH = 8192
_THIS = -1
_room = ffi.new_allocator(should_clear_after_alloc=False)


class Source:
    """Where memory is read: through *mem*, a descriptor of /proc/PID/mem, or in this process.

    What pointers in arguments lead to in *held*, addresses and sizes, is not copied.
    """

    def __init__(self, mem: int = _THIS, held: Sequence[tuple[int, int]] = ()) -> None:
        self.mem = mem
        self._held = ffi.new("struct kvmpy_range[]", list(held))
        # lifetime: the struct holds the address of the ranges, this object both.
        self.native = ffi.new(
            "struct kvmpy_source *", {"fd": mem, "nr_held": len(self._held), "held": self._held}
        )

    def read(self, address: int, size: int) -> bytes:
        """Return up to *size* bytes at *address*; what cannot be read is left out."""
        data = _room("uint8_t[]", size)
        return bytes(ffi.buffer(data, lib.kvmpy_source_read(self.native, data, address, size)))

    def foreign_fds(self, nr: int, arg: int) -> list[int]:
        """Return the descriptors in an argument whose objects no recorder saw being opened or made."""
        fds = ffi.new("int32_t[4]")
        number = lib.kvmpy_foreign_fds(self.native, nr, arg, fds, len(fds))
        return list(fds)[:number]


THIS_PROCESS = Source()


class Known:
    """An object of KVM's, with what the engine remembers of it; *maker* is its VM, or what else made it.

    *fd* is its descriptor in this process, for whoever wants to keep it here.
    """

    __slots__ = ("fd", "ident", "maker", "native")

    def __init__(
        self,
        ident: int,
        kind: int,
        maker: Known | None = None,
        *,
        fd: int = -1,
        vm_type: int = 0,
        name: str = "",
    ) -> None:
        self.ident = ident
        self.fd = fd
        self.maker = maker
        # Its memory, the table of a VM's slots included, goes with the last who knows it.
        self.native = ffi.gc(ffi.new("struct kvmpy_object *"), lib.kvmpy_object_end)
        above = ffi.NULL if maker is None else maker.native
        lib.kvmpy_object_init(self.native, ident, kind, above, vm_type, name.encode())

    def mapped(self, address: int, size: int) -> None:
        """A vCPU's run area lies at *address*; 0 for nowhere."""
        self.native.run, self.native.run_length = address, size


class Made(NamedTuple):
    """An object that an ioctl made."""

    kind: int
    fd: int
    name: str


class Capture:
    """One ioctl's memory, from :meth:`enter` to :meth:`end`; it may be used again then."""

    def __init__(self, source: Source = THIS_PROCESS) -> None:
        # lifetime: the struct holds the addresses of these.
        self.source = source
        self.known: Known | None = None
        self._scratch = ffi.new("uint8_t[]", _SCRATCH)
        self.native = ffi.new(
            "struct kvmpy_capture *",
            {"source": source.native, "scratch": self._scratch, "scratch_size": _SCRATCH},
        )

    def read_from(self, source: Source) -> None:
        """Read what comes from *source*."""
        self.source = source
        self.native.source = source.native

    def enter(self, known: Known | None, fd: int, nr: int, arg: Struct | int | None) -> None:
        """Copy what the kernel is about to read."""
        self.known = known
        object_ = ffi.NULL if known is None else known.native
        if arg is None or isinstance(arg, int):
            lib.kvmpy_capture_enter(self.native, object_, fd, nr, ffi.NULL, (arg or 0) & (1 << 64) - 1)
        else:
            lib.kvmpy_capture_enter(self.native, object_, fd, nr, arg.cdata, arg.nbytes)

    def exit(self, result: int) -> None:
        """Learn what the kernel wrote."""
        lib.kvmpy_capture_exit(self.native, result)

    def payload(self, result: int = 0, errno: int = 0, end_order: int = 0, end_ns: int = 0) -> bytes:
        """Return the payload of the frame; without an end it is that of an ioctl in flight."""
        data = _room("uint8_t[]", lib.kvmpy_capture_size(self.native))
        size = lib.kvmpy_capture_fill(self.native, data, result, errno, end_order, end_ns)
        return bytes(ffi.buffer(data, size))

    def made(self, result: int, vms: object = ffi.NULL) -> Made | None:
        """Learn from an ioctl that succeeded; return the object that it made.

        *vms* is a ``uint32_t *`` that counts the VMs, for their names.
        """
        made = ffi.new("struct kvmpy_made *")
        if not lib.kvmpy_capture_made(self.native, result, vms, made):
            return None
        return Made(made.kind, made.fd, ffi.string(made.name).decode())

    def end(self) -> None:
        """Let go of the memory that this ioctl took."""
        lib.kvmpy_capture_end(self.native)
        self.known = None
