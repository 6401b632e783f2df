# SPDX-License-Identifier: Apache-2.0
"""userfaultfd(2): demand paging of guest memory by a handler of one's own."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from kvmpy.core.address import PAGE_SIZE
from kvmpy.core.closing import Closing
from kvmpy.core.errors import MissingError
from kvmpy.core.eventfd import EventFd
from kvmpy.uapi import ffi, lib
from kvmpy.uapi.constants import UffdEvent, UffdFeature, UffdPagefaultFlag, UffdRegisterMode

DEVICE = "/dev/userfaultfd"
_EVENT_PAGEFAULT = int(UffdEvent.UFFD_EVENT_PAGEFAULT)
_WRITE = int(UffdPagefaultFlag.UFFD_PAGEFAULT_FLAG_WRITE)
_WP = int(UffdPagefaultFlag.UFFD_PAGEFAULT_FLAG_WP)
_MINOR = int(UffdPagefaultFlag.UFFD_PAGEFAULT_FLAG_MINOR)
_BATCH = 16


@dataclass(frozen=True)
class PageFault:
    """A fault that waits at host address *address*; *thread_id* is 0 unless UFFD_FEATURE_THREAD_ID is on."""

    address: int
    write: bool
    wp: bool
    minor: bool
    thread_id: int = 0


def explain_open_failure(number: int) -> Exception:
    """Return what to tell when userfaultfd(2) fails with errno *number*."""
    if number in (errno.EPERM, errno.EACCES):
        return MissingError(
            "userfaultfd may not handle faults of the kernel, as KVM's are",
            f"sysctl -w vm.unprivileged_userfaultfd=1, or access to {DEVICE}, or CAP_SYS_PTRACE",
        )
    if number in (errno.ENOSYS, errno.ENOENT):
        return MissingError("userfaultfd is not in this kernel", "build it with CONFIG_USERFAULTFD=y")
    return OSError(number, f"userfaultfd: {os.strerror(number)}")


class Userfaultfd(Closing):
    """A userfaultfd that also takes faults of the kernel, which KVM needs.

    MissingError where this process may not. ``.features`` is what the kernel offers. Ranges are host
    addresses, whole pages of the memory's own size. All methods raise OSError with the kernel's errno.
    """

    def __init__(self, features: UffdFeature | int = 0) -> None:
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        self._fd = int(lib.kvmpy_uffd_open(flags))
        if self._fd < 0:
            number = ffi.errno
            if number == errno.EPERM:
                self._fd = int(lib.kvmpy_uffd_open_dev(DEVICE.encode(), flags))
            if self._fd < 0:
                raise explain_open_failure(number)
        offered = ffi.new("uint64_t *")
        if lib.kvmpy_uffd_api(self._fd, int(features), offered) < 0:
            number = ffi.errno
            self.close()
            raise OSError(number, f"UFFDIO_API with features {int(features):#x}: {os.strerror(number)}")
        self.features = UffdFeature(int(offered[0]) & sum(UffdFeature))

    @property
    def fd(self) -> int:
        """The number of the file descriptor; ValueError once closed."""
        if self._fd < 0:
            raise ValueError("the userfaultfd is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether the file descriptor was closed."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return :attr:`fd`, for select() and friends."""
        return self.fd

    @staticmethod
    def _failed(action: str, start: int, size: int, number: int) -> OSError:
        return OSError(number, f"{action} at {start:#x}, {size:#x} bytes: {os.strerror(number)}")

    def register(self, start: int, size: int, mode: UffdRegisterMode) -> int:
        """Report the faults of *mode* in a range.

        Return a mask of the ioctls that it supports (UFFDIO_REGISTER).
        """
        ioctls = ffi.new("uint64_t *")
        if lib.kvmpy_uffd_register(self.fd, start, size, int(mode), ioctls) < 0:
            raise self._failed(f"UFFDIO_REGISTER {mode!r}", start, size, ffi.errno)
        return int(ioctls[0])

    def unregister(self, start: int, size: int) -> None:
        """Stop reporting; threads that wait go on with ordinary pages (UFFDIO_UNREGISTER)."""
        if lib.kvmpy_uffd_unregister(self.fd, start, size) < 0:
            raise self._failed("UFFDIO_UNREGISTER", start, size, ffi.errno)

    def wake(self, start: int, size: int) -> None:
        """Let threads that wait try again (UFFDIO_WAKE)."""
        if lib.kvmpy_uffd_wake(self.fd, start, size) < 0:
            raise self._failed("UFFDIO_WAKE", start, size, ffi.errno)

    def copy(
        self, start: int, data: bytes | bytearray | memoryview, *, wp: bool = False, wake: bool = True
    ) -> int:
        """Put *data* (whole pages) into missing pages; return the bytes done (UFFDIO_COPY).

        EEXIST where a page is there already. *wp* leaves the pages write-protected.
        """
        size = len(data)
        mode = (0 if wake else 1) | (2 if wp else 0)
        done = lib.kvmpy_uffd_copy(self.fd, start, ffi.from_buffer(data), size, mode)
        return self._done("UFFDIO_COPY", start, size, int(done))

    def _done(self, label: str, start: int, size: int, done: int) -> int:
        if done < 0:
            raise self._failed(label, start, size, ffi.errno)
        return done

    def zeropage(self, start: int, size: int, *, wake: bool = True) -> int:
        """Put zeroes into missing pages; return the bytes done (UFFDIO_ZEROPAGE)."""
        done = int(lib.kvmpy_uffd_zeropage(self.fd, start, size, 0 if wake else 1))
        return self._done("UFFDIO_ZEROPAGE", start, size, done)

    def continue_(self, start: int, size: int, *, wake: bool = True) -> int:
        """Map pages that the file behind a shared mapping has already.

        Return the bytes done (UFFDIO_CONTINUE).
        """
        done = int(lib.kvmpy_uffd_continue(self.fd, start, size, 0 if wake else 1))
        return self._done("UFFDIO_CONTINUE", start, size, done)

    def poison(self, start: int, size: int, *, wake: bool = True) -> int:
        """Make accesses to the pages end in SIGBUS; return the bytes done (UFFDIO_POISON)."""
        done = int(lib.kvmpy_uffd_poison(self.fd, start, size, 0 if wake else 1))
        return self._done("UFFDIO_POISON", start, size, done)

    def writeprotect(self, start: int, size: int, protect: bool, *, wake: bool = True) -> None:
        """Write-protect pages, or allow writes again and wake who waits (UFFDIO_WRITEPROTECT)."""
        mode = 1 if protect else (0 if wake else 2)
        if lib.kvmpy_uffd_writeprotect(self.fd, start, size, mode) < 0:
            raise self._failed("UFFDIO_WRITEPROTECT", start, size, ffi.errno)

    def read(self) -> list[PageFault]:
        """Return the faults that wait now, oldest first, at most 16; none is an empty list."""
        events = ffi.new(f"struct kvmpy_uffd_event[{_BATCH}]")
        count = int(lib.kvmpy_uffd_read(self.fd, events, _BATCH))
        if count < 0:
            number = ffi.errno
            if number in (errno.EAGAIN, errno.EINTR):
                return []
            raise OSError(number, f"read of userfaultfd: {os.strerror(number)}")
        return [
            PageFault(
                e.address, bool(e.flags & _WRITE), bool(e.flags & _WP), bool(e.flags & _MINOR), e.thread_id
            )
            for e in (events[n] for n in range(count))
            if e.event == _EVENT_PAGEFAULT
        ]

    def close(self) -> None:
        """Close it: all ranges are unregistered and all waiting threads woken."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class PagerStuckError(RuntimeError):
    """A fault was not answered in time: the pager let the waiting threads go on with ordinary pages."""


class DemandPager:
    """Answers the faults of registered ranges from a thread of its own, until it is stopped.

    *handler* gets each :class:`PageFault`. For a missing page it returns the page's bytes, or None for
    zeroes; after a minor fault the page is mapped and after a write-protection fault the protection is
    lifted, whatever it returns. A handler that answered the fault itself through ``.uffd`` returns
    ``DemandPager.DONE``.

    The handler needs Python's interpreter lock, so do not touch the memory through Python's own views
    meanwhile: use :meth:`touch`, or let a vCPU do it. Should it happen, the pager gives up after *patience*
    seconds (PagerStuckError at :meth:`stop`) instead of hanging. An exception in the
    handler stops the pager and is raised by :meth:`stop`.
    """

    DONE = object()

    def __init__(
        self,
        handler: Callable[[PageFault], bytes | bytearray | memoryview | object | None],
        *,
        page_size: int = PAGE_SIZE,
        features: UffdFeature | int = 0,
        patience: float = 10.0,
    ) -> None:
        if patience <= 0:
            raise ValueError(f"patience {patience} is not positive")
        self.handler = handler
        self.page_size = page_size
        self.faults: list[PageFault] = []
        self.patience = patience
        self._error: BaseException | None = None
        self._ranges: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self.uffd = Userfaultfd(features)
        self._stop = EventFd()
        self._watch = lib.kvmpy_uffd_watch_new(self.uffd.fd, int(patience * 1e9))
        if self._watch == ffi.NULL:
            number = ffi.errno
            self._stop.close()
            self.uffd.close()
            raise OSError(number, f"no thread for the demand pager: {os.strerror(number)}")
        self._thread = threading.Thread(target=self._serve, name="kvmpy-pager", daemon=True)
        self._thread.start()

    def register(
        self, start: int, size: int, mode: UffdRegisterMode = UffdRegisterMode.UFFDIO_REGISTER_MODE_MISSING
    ) -> None:
        """Answer the faults of *mode* in *size* bytes at host address *start* (whole pages)."""
        if self._watch is None:
            raise ValueError("the pager is stopped")
        if start % self.page_size or size % self.page_size or size <= 0:
            raise ValueError(
                f"{start:#x}, {size:#x} bytes is not made of whole pages of {self.page_size:#x} bytes"
            )
        self.uffd.register(start, size, mode)
        if lib.kvmpy_uffd_watch_add(self._watch, start, size):
            self.uffd.unregister(start, size)
            raise ValueError("a pager serves at most 64 ranges")
        self._ranges.append((start, size))

    def touch(self, start: int, size: int, *, write: bool = False) -> None:
        """Access one byte in each page of a range without holding the interpreter lock."""
        lib.kvmpy_touch(start, size, self.page_size, int(write))

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self.uffd.fd, select.POLLIN)
        poller.register(self._stop.fd, select.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._stop.fd in ready:
                    return
                for fault in self.uffd.read():
                    self.faults.append(fault)
                    self._answer(fault)
                with self._lock:
                    if self._watch is not None:
                        lib.kvmpy_uffd_watch_beat(self._watch)
        except BaseException as error:  # noqa: BLE001 - whatever it is, stop() raises it
            self._error = error
            self._release()

    def _answer(self, fault: PageFault) -> None:
        reply = self.handler(fault)
        if reply is DemandPager.DONE:
            return
        page = fault.address & -self.page_size
        try:
            if fault.wp:
                self.uffd.writeprotect(page, self.page_size, False)
            elif fault.minor:
                self.uffd.continue_(page, self.page_size)
            elif reply is None:
                self.uffd.zeropage(page, self.page_size)
            elif isinstance(reply, (bytes, bytearray, memoryview)):
                if len(reply) != self.page_size:
                    raise ValueError(
                        f"the handler returned {len(reply)} bytes for a page of {self.page_size}"
                    )
                self.uffd.copy(page, reply)
            else:
                raise TypeError(f"the handler returned {reply!r}: expected a page of bytes, None or DONE")
        except FileExistsError:
            # Two threads met at one page; the first answer filled it.
            self.uffd.wake(page, self.page_size)

    def _release(self) -> None:
        for start, size in self._ranges:
            try:
                self.uffd.unregister(start, size)
            except OSError as error:
                # The range was unmapped meanwhile, so nobody waits in it.
                if error.errno not in (errno.EINVAL, errno.ENOMEM):
                    raise

    def stop(self, timeout: float = 10.0) -> None:
        """Stop answering, let waiting threads go on, close; raise the handler's error or PagerStuckError.

        TimeoutError when the handler does not return within *timeout* seconds; the pager is out of service
        all the same.
        """
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is None:
            return
        self._stop.signal()
        self._thread.join(timeout)
        hangs = self._thread.is_alive()
        self._release()
        fired = bool(lib.kvmpy_uffd_watch_stop(watch))
        self._ranges.clear()
        if hangs:
            # Its file descriptors stay open: the handler may still use them.
            raise TimeoutError(f"the fault handler did not return within {timeout} s") from self._error
        self.uffd.close()
        self._stop.close()
        error, self._error = self._error, None
        if error is not None:
            raise error
        if fired:
            raise PagerStuckError(
                f"a fault was not answered within {self.patience} s: does Python code touch the memory?"
            )

    def __enter__(self) -> DemandPager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
