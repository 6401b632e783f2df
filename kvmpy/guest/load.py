# SPDX-License-Identifier: Apache-2.0
"""vCPUs that keep writing, reading and executing a region, while the host may ask what must be there.

Page *p* of the region belongs to vCPU *p* modulo the number of writers; nobody else writes it.  Each writer
visits its pages in an order of its own, over and over; round *g* is generation *g* of its pages.  A visit
checks that three words of the page hold generation *g* - 1, executes the page where asked to, and writes
generation *g*.  In between each vCPU reads a page of another one.  A word of generation *g* is
``g << 32 | page << 9 | word``, so that it tells where it belongs; one that was never written is 0.

A vCPU counts its visits where the host sees it.  Two looks at these counters bound what any word holds
between them: exactly one generation, but for the page that each writer is at.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from random import Random
from typing import TYPE_CHECKING, Any

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SIZE, Gva
from kvmpy.core.threads import STOP_SECONDS, StoppedAtExit, VcpuThread
from kvmpy.guest.agent import Fault
from kvmpy.guest.errors import GuestError, GuestTimeoutError
from kvmpy.guest.ucall import Ucall

if TYPE_CHECKING:
    from kvmpy.core.exits import Exit
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm

LOAD = """
#include <kvmpy/load.h>

void guest_main(u64 loads, u64 ring)
{
	guest_load((void *)(uintptr_t)loads, ring);
}
"""

MAX_VCPUS = 64
# Of a page of 512 words, those that carry a generation; the second is the operand of the page's code.
WORDS = (0, 257, 511)
LOSSES = ("none", "zero", "older")
_WORDS_OF_PAGE = PAGE_SIZE // 8
_GENERATION = 32
_IDENTITY = (1 << _GENERATION) - 1
# struct guest_load, of which the host writes the first ten words.
_SIZE = 256
_ORDER = struct.Struct("<10Q")
_STOP, _VISITS, _WRONG = 9, 10, 14
_FAILED = 1
_SHOWN = 8
_LOOK_SECONDS = 0.0002

Moment = tuple[int, ...]
"""How many visits each vCPU has made."""


class LoadError(GuestError):
    """Memory that does not hold what the load put there: ``.wrong``, each a :class:`Wrong`."""

    def __init__(self, wrong: Sequence[Wrong], postmortem: str = "") -> None:
        self.wrong = tuple(wrong)
        lines = [str(each) for each in wrong[:_SHOWN]]
        if len(wrong) > _SHOWN:
            lines.append(f"and {len(wrong) - _SHOWN} more")
        super().__init__("\n".join(lines), postmortem)


@dataclass(frozen=True)
class Wrong:
    """A word that is not as it must be: generation *low* to *high* of its page was expected.

    *who* found it.
    """

    who: str
    page: int
    word: int
    low: int
    high: int
    found: int

    def __str__(self) -> str:
        expected = f"generation {self.low}" + (f" to {self.high}" if self.high != self.low else "")
        page, word = self.found >> 9 & (1 << 23) - 1, self.found & 0x1FF
        if not self.found:
            found = "0"
        elif (page, word) == (self.page, self.word):
            found = f"generation {self.found >> _GENERATION}"
        else:
            found = f"{self.found:#x}, which would be generation {self.found >> _GENERATION} of page {page}, "
            found += f"word {word}"
        return f"{self.who} page {self.page}, word {self.word}: expected {expected}, found {found}"


@dataclass(frozen=True)
class Order:
    """The order in which a writer visits its pages: *first*, *first* + *step*, ... (*count* of them).

    Visit number *n* is of page *n* * *stride* modulo *count*.
    """

    first: int
    step: int
    count: int
    stride: int

    def page(self, visit: int) -> int:
        """Return the page of a visit."""
        return self.first + visit % self.count * self.stride % self.count * self.step

    def pages(self, start: int, end: int) -> BitMap:
        """Return the pages of the visits from *start* up to, but not including, *end*."""
        return BitMap(self.page(visit) for visit in range(start, min(end, start + self.count)))

    def generations(self, visits: int) -> Iterator[tuple[int, int]]:
        """Yield each page with the generation that it holds once *visits* are over."""
        full, rest = divmod(visits, self.count)
        for visit in range(self.count):
            yield self.page(visit), full + (visit < rest)


class Load(StoppedAtExit):
    """The load on *vm*, a VM that runs :data:`LOAD` and was not launched; *gva* is mapped for *ring*.

    *pages* from *gva* on are its region.  The last *readers* vCPUs write nothing.  *execute*: the pages are
    mapped executable, and are executed.  *loss* is what a page may lose beside the running vCPUs: nothing,
    its content (``"zero"``), or newer generations (``"older"``).  *pace* is how often a vCPU goes round
    an empty loop between two visits.  *rng* chooses the order of the visits.  *seconds* is how long
    :meth:`turns` goes on.

    *on_exit* is called in a vCPU's thread with an exit, and returns True if the vCPU may go on; without one
    each exit is a failure.  It must not wait beyond :attr:`stopping`.

    ``with load:`` runs every vCPU in a thread of its own and stops all at the end; :meth:`start` and
    :meth:`stop` do so as often as wanted.  What a vCPU found, or failed with, is raised by :meth:`stop`,
    :meth:`wait` and :meth:`turns`.
    """

    def __init__(
        self,
        vm: GuestVm,
        gva: Gva,
        pages: int,
        *,
        ring: int = 3,
        readers: int = 0,
        execute: bool = False,
        loss: str = "none",
        pace: int = 0,
        rng: Random | None = None,
        seconds: float = 1.0,
        on_exit: Callable[[GuestVcpu, Exit], bool] | None = None,
    ) -> None:
        vcpus = len(vm.vcpus)
        writers = vcpus - readers
        if not 0 < vcpus <= MAX_VCPUS or not 0 < writers <= pages:
            raise ValueError(
                f"{vcpus} vCPUs, {readers} of them readers, for {pages} pages: at most {MAX_VCPUS} vCPUs, "
                f"and one writer or more with a page or more each"
            )
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}: expected one of {', '.join(LOSSES)}")
        if execute and loss != "none":
            raise ValueError(f"loss={loss!r} of pages that are executed: there would be no code in them")
        self.vm = vm
        self.gva = gva
        self.pages = pages
        self.seconds = seconds
        self.on_exit = on_exit
        self.stopping = False
        self._loss = loss
        self._limit = 0.0
        self._ready = False
        self._threads: list[VcpuThread[tuple[int, ...]]] = []
        random = rng or Random(0)
        self.orders = [self._order(random, index, writers) for index in range(writers)]
        where = vm.alloc(vcpus * _SIZE, private=False, user=True)
        self._area = vm.view(where, vcpus * _SIZE)
        self._words = self._area.cast("B").cast("Q")
        for index, vcpu in enumerate(vm.vcpus):
            vcpu.set_entry("guest_main", int(where), ring)
            order = self.orders[index] if index < writers else Order(0, 0, 0, 0)
            peer = int(where) + (index + 1) % writers * _SIZE
            words = (int(gva), order.first, order.step, order.count, order.stride, peer)
            _ORDER.pack_into(self._area, index * _SIZE, *words, execute, LOSSES.index(loss), pace, 0)

    def _order(self, random: Random, index: int, writers: int) -> Order:
        count = (self.pages - index + writers - 1) // writers
        strides = [stride for stride in range(1, count + 1) if gcd(stride, count) == 1]
        return Order(index, writers, count, random.choice(strides) % count)

    # Running.

    def start(self) -> Load:
        """Launch the VM if it is not, and let every vCPU run in a thread of its own."""
        if self._threads:
            raise RuntimeError(f"the load of {self.vm.name} is running")
        if not self._ready:
            if not self.vm.launched:
                self.vm.launch()
            # One after another: QEMU's TCG lost the state of vCPUs that entered the guest at once.
            for vcpu in self.vm.vcpus:
                vcpu.sync()
            self._ready = True
        self._order_stop(False)
        self._limit = time.monotonic() + self.seconds + self.vm.deadline
        for vcpu in self.vm.vcpus:
            self._threads.append(VcpuThread(partial(self._run, vcpu), vcpu=vcpu))
        for thread in self._threads:
            thread.start()
        return self

    def _order_stop(self, stop: bool) -> None:
        self.stopping = stop
        for index in range(len(self.vm.vcpus)):
            self._word_put(index, _STOP, stop)

    def _word(self, index: int, word: int) -> int:
        return self._words[index * _SIZE // 8 + word]

    def _word_put(self, index: int, word: int, value: int) -> None:
        self._words[index * _SIZE // 8 + word] = value

    def _run(self, vcpu: GuestVcpu) -> tuple[int, ...]:
        while True:
            got = vcpu.next(max(0.001, self._limit - time.monotonic()))
            if isinstance(got, Ucall):
                return got.args
            if self.on_exit is None or not self.on_exit(vcpu, got):
                raise vcpu.unexpected(got, "the load to go on")

    def stop(self) -> None:
        """Let each vCPU end its visit and join its thread; raise what one of them found or failed with.

        A vCPU that does not come within the VM's deadline is kicked: GuestTimeoutError.  Harmless when
        nothing runs.
        """
        threads, self._threads = self._threads, []
        self._order_stop(True)
        limit = time.monotonic() + self.vm.deadline
        errors: list[BaseException] = []
        for vcpu, thread in zip(self.vm.vcpus, threads, strict=False):
            try:
                self._ended(vcpu, thread.join(max(0.001, limit - time.monotonic())), errors)
            except BaseException as error:  # noqa: BLE001 - all threads are joined before one is raised
                if thread.alive:
                    errors.append(self._stuck(vcpu, thread))
                else:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _stuck(self, vcpu: GuestVcpu, thread: VcpuThread[Any]) -> BaseException:
        try:
            thread.stop(STOP_SECONDS)
        except Exception as error:  # noqa: BLE001 - a thread that cannot be stopped is told with its stack
            return error
        message = f"{vcpu.name} did not end its visit: {self._word(vcpu.index, _VISITS)} are over"
        return GuestTimeoutError(message, self.vm.postmortem(vcpu, message))

    def _ended(self, vcpu: GuestVcpu, said: tuple[int, ...] | None, errors: list[BaseException]) -> None:
        if said is None:
            return
        returned, value, vector, error_code, rip, cr2 = said
        if not returned:
            fault = Fault(vector, error_code, cr2 if vector == 14 else 0, rip)
            message = f"{vcpu.name} got {fault} on the load"
            errors.append(GuestError(message, self.vm.postmortem(vcpu, message)))
        elif value == _FAILED:
            executed, *words = (self._word(vcpu.index, _WRONG + number) for number in range(6))
            wrong = Wrong(f"{vcpu.name} {'executed' if executed else 'read'}", *words)
            errors.append(LoadError([wrong], self.vm.postmortem(vcpu, str(wrong))))

    def __enter__(self) -> Load:
        return self.start()

    @property
    def running(self) -> bool:
        """Whether every vCPU runs: none has ended by itself."""
        return bool(self._threads) and all(thread.alive for thread in self._threads)

    def wait(self, visits: int = 1, *, vcpus: Sequence[int] | None = None) -> Moment:
        """Wait until each vCPU (of *vcpus*) has made as many more visits, and return how many are over.

        GuestTimeoutError at the VM's deadline; what a vCPU found or failed with is raised at once.
        """
        start = self.moment()
        limit = time.monotonic() + self.vm.deadline
        chosen = range(len(start)) if vcpus is None else vcpus
        while True:
            if not self.running:
                self.stop()
                raise RuntimeError(f"the load of {self.vm.name} does not run")
            now = self.moment()
            behind = [index for index in chosen if now[index] < start[index] + visits]
            if not behind:
                return now
            if time.monotonic() > limit:
                name = self.vm.vcpus[behind[0]].name
                self.stop()
                raise GuestTimeoutError(f"{name} made no {visits} visits in {self.vm.deadline:g} s")
            time.sleep(_LOOK_SECONDS)

    def turns(self, *, visits: int = 1) -> Iterator[int]:
        """Count turns from 0 until :attr:`seconds` have passed; before each one every vCPU makes *visits*."""
        end, turn = time.monotonic() + self.seconds, 0
        while not turn or time.monotonic() < end:
            self.wait(visits)
            yield turn
            turn += 1
        self.wait(visits)

    # What must be there.

    def moment(self) -> Moment:
        """Return how many visits each vCPU has made by now."""
        return tuple(self._word(index, _VISITS) for index in range(len(self.vm.vcpus)))

    def written(self, since: Moment, until: Moment) -> BitMap:
        """Return the pages that were certainly written after *since* and before *until*.

        A visit that was under way at *since* may have written before.
        """
        return self._between(since, until, 1, 0)

    def touched(self, since: Moment, until: Moment) -> BitMap:
        """Return the pages that may have been written after *since* and before *until*."""
        return self._between(since, until, 0, 1)

    def looked_at(self, since: Moment, until: Moment) -> BitMap:
        """Return the pages that a vCPU may have read after *since* and before *until*, other than its own."""
        orders = len(self.orders)
        bounds = enumerate(zip(since, until, strict=True))
        peers = ((self.orders[(index + 1) % orders], *bound) for index, bound in bounds)
        return BitMap.union(*(order.pages(max(0, start - 1), end + 1) for order, start, end in peers))

    def _between(self, since: Moment, until: Moment, late: int, more: int) -> BitMap:
        bounds = zip(self.orders, since, until, strict=False)
        return BitMap.union(*(order.pages(start + late, end + more) for order, start, end in bounds))

    def check(
        self,
        memory: memoryview | bytearray,
        since: Moment,
        until: Moment,
        who: str = "the host found",
    ) -> None:
        """Check that *memory*, the region or a copy, is as it was at some time from *since* to *until*.

        Each page may be of another time.  LoadError names the words that are not; ValueError for another
        size.
        """
        wrong = self.wrong(memory, since, until, who)
        if wrong:
            raise LoadError(wrong)

    def wrong(
        self, memory: memoryview | bytearray, since: Moment, until: Moment, who: str = ""
    ) -> list[Wrong]:
        """Return the words at which :meth:`check` fails."""
        if len(memory) != self.pages * PAGE_SIZE:
            raise ValueError(f"{len(memory)} bytes are not the {self.pages} pages of the load")
        low, high = [0] * self.pages, [0] * self.pages
        for order, start, end in zip(self.orders, since, until, strict=False):
            for page, generation in order.generations(start):
                low[page] = generation
            for page, generation in order.generations(end + 1):
                high[page] = generation
        if self._loss == "older":
            low = [0] * self.pages
        words = memoryview(memory).cast("B").cast("Q")
        found: list[Wrong] = []
        for word in WORDS:
            values = words[word::_WORDS_OF_PAGE].tolist()
            for page, (value, least, most) in enumerate(zip(values, low, high, strict=True)):
                if not value:
                    good = not least or self._loss != "none"
                else:
                    good = value & _IDENTITY == page << 9 | word
                    good = good and max(1, least) <= value >> _GENERATION <= most
                if not good:
                    found.append(Wrong(who, page, word, least, most, value))
        return found
