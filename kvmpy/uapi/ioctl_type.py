# SPDX-License-Identifier: Apache-2.0
"""What the ioctl table is made of: the shape of an entry and the arithmetic of request numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

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


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One ioctl: the kernel's name, the request number, where it may be issued and what it takes.

    ``arg`` is what really happens to the argument: "int" is passed by value, "in" is read by the kernel,
    "out" is written, "inout" both.  The direction inside the number says something else for a few.
    ``struct`` is the struct that the argument points to, ``scalar`` the C type if that is a plain number.
    ``cap`` announces the ioctl on ``fd`` (None: every KVM has it), ``also`` holds further kinds of file
    descriptor, with the capability for each.
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
