# SPDX-License-Identifier: Apache-2.0
"""What the ioctl table is made of: the shape of an entry and the arithmetic of request numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NamedTuple

from kvmpy.uapi.buffer_type import Buffer, Special
from kvmpy.uapi.commands import Command

FdKind = Literal["system", "vm", "vcpu", "device", "gmem", "stats", "sev", "uffd", "uffd_dev"]
ArgKind = Literal["none", "int", "in", "out", "inout"]

NONE = 0
WRITE = 1
READ = 2

SIZE_BITS = 14
SIZE_SHIFT = 16
DIRECTION_SHIFT = 30


class Request(NamedTuple):
    """The parts of a request number; *direction* READ means that the kernel writes; *size* is in bytes."""

    direction: int
    type: int
    number: int
    size: int


def encode(direction: int, kind: int, number: int, size: int) -> int:
    """Return the request number for its parts (asm-generic/ioctl.h); ValueError when one is out of range."""
    if not (0 <= direction <= 3 and 0 <= kind < 256 and 0 <= number < 256 and 0 <= size < 1 << SIZE_BITS):
        raise ValueError(
            f"no ioctl number has direction {direction}, type {kind:#x}, number {number:#x}, size {size}"
        )
    return direction << DIRECTION_SHIFT | size << SIZE_SHIFT | kind << 8 | number


def decode(nr: int) -> Request:
    """Return the parts of the request number *nr*."""
    return Request(
        nr >> DIRECTION_SHIFT & 3, nr >> 8 & 0xFF, nr & 0xFF, nr >> SIZE_SHIFT & (1 << SIZE_BITS) - 1
    )


class FdField(NamedTuple):
    """A field that holds a file descriptor where ``where & mask == value``, *where* being another field.

    *seen*: of a kind that a recorder sees being opened or made by KVM.
    """

    name: str
    where: str = "flags"
    mask: int = 0
    value: int = 0
    seen: bool = False


class Lasting(NamedTuple):
    """A setting that KVM keeps and cannot be asked about.

    Calls with the same *key* (names of fields) replace each other; one with the flag *undo* takes the setting
    back.  *late*: it refers to vCPUs, or would act while they are made.  *removes*: it is no setting, but
    takes back those of the ioctl of this name whose range contains the whole of its own.
    """

    key: tuple[str, ...] = ()
    undo: int = 0
    late: bool = False
    removes: str = ""


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One ioctl: the kernel's name, the request number, where it may be issued and what it takes.

    ``arg`` is what really happens to the argument: "int" is passed by value, "in" is read by the kernel,
    "out" is written, "inout" both.  The direction inside the number says something else for a few.
    ``struct`` is the struct that the argument points to, ``scalar`` the C type if that is a plain number.
    ``cap`` announces the ioctl on ``fd`` (None: every KVM has it), ``also`` holds further kinds of file
    descriptor, with the capability for each.

    ``names`` are the names of an argument passed by value, ``unit`` is its unit, or the result's where there
    is no argument.  ``pointers`` are what the struct's pointers lead to, ``addresses`` the other fields with
    host addresses.  ``fills``: of the struct the kernel reads no more than the count, and fills the entries.
    ``size`` is a size that the struct does not tell.  ``select`` is the field that holds the id of one of
    ``commands``.

    ``makes`` is the kind of the object that it makes, except where the field and bits of ``made_unless`` are
    set.  ``made_in`` is the field with its descriptor where that is not the result, ``made_name`` its name
    within the object that made it: {arg} is the argument, {count} how many were made before, else a field.
    ``fd_fields`` are those that hold descriptors of others.  ``memory`` says whether KVM reads
    guest memory ("in") or writes it, too ("inout").  ``asks``: without it KVM would be in the same state.
    ``volatile`` are the fields of the answer that no two runs share, ``""`` is all of it.  ``lasting`` is how
    a setting is kept.
    """

    name: str
    nr: int
    fd: FdKind
    struct: str | None
    arg: ArgKind
    cap: str | None
    doc: str
    scalar: str | None = None
    also: tuple[tuple[FdKind, str | None], ...] = ()
    names: type[IntEnum] | None = None
    unit: str = ""
    pointers: tuple[Buffer, ...] = field(default=(), compare=False, repr=False)
    addresses: tuple[str, ...] = ()
    fills: bool = False
    size: Special | None = None
    select: str = ""
    commands: tuple[Command, ...] = field(default=(), compare=False, repr=False)
    makes: FdKind | None = None
    made_unless: tuple[str, int] | None = None
    made_in: str = ""
    made_name: str = ""
    fd_fields: tuple[FdField, ...] = ()
    memory: Literal["none", "in", "inout"] = "none"
    asks: bool = False
    volatile: tuple[str, ...] = ()
    lasting: Lasting | None = None

    @property
    def fds(self) -> tuple[FdKind, ...]:
        """Every kind of file descriptor that takes it, the usual one first."""
        return (self.fd, *(kind for kind, _ in self.also))

    @property
    def request(self) -> Request:
        """The parts of the request number."""
        return decode(self.nr)

    def cap_on(self, fd: FdKind) -> str | None:
        """Return the capability that announces it on *fd*; KeyError when *fd* does not take it."""
        return {self.fd: self.cap, **dict(self.also)}[fd]

    def __str__(self) -> str:
        return self.name
