# SPDX-License-Identifier: Apache-2.0
"""A VM with a guest program in it: memory map, page tables, per-CPU areas, ucall slots, launch."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, cast

from kvmpy.core.address import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, EncryptionBit, Gpa, Gva, RawGpa
from kvmpy.core.backing import Backing
from kvmpy.core.errors import PrivateMemoryError
from kvmpy.core.exits import Exit, HypercallExit
from kvmpy.core.memory import PageAllocator
from kvmpy.core.slots import MemorySlot
from kvmpy.core.topic import topic
from kvmpy.core.vcpu import Vcpu
from kvmpy.core.vm import Vm
from kvmpy.guest import layout
from kvmpy.guest.boot import guest_cpuid, initial_regs, initial_sregs, system_tables, tss_page
from kvmpy.guest.defaults import DEFAULT_DEADLINE, DEFAULT_MEMORY
from kvmpy.guest.errors import LaunchError
from kvmpy.guest.options import SlotOptions, VmOptions, check_known
from kvmpy.guest.postmortem import postmortem
from kvmpy.guest.private import Private
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.protection import Protection
from kvmpy.guest.ucall import Ucall
from kvmpy.guest.variable import GuestVariable
from kvmpy.guest.vcpu import GuestVcpu
from kvmpy.uapi.constants import KVM_CAP_SPLIT_IRQCHIP
from kvmpy.uapi.structs import kvm_cpuid2
from kvmpy.x86 import segments
from kvmpy.x86.nopaging import NoPaging
from kvmpy.x86.paging import PageTables

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvmpy.core.kvm import Kvm
    from kvmpy.core.threads import VcpuThread

# A post-mortem is made within this time, too.
CALLBACK_GRACE = 30.0
HALT_SECONDS = 1.0
_LONG_MODE_LEVELS = 4
# Below 1 MiB nothing is placed: tests that want real mode find it free.
ALLOCATION_START = 1 << 20
# Guest memory leaves the gigabyte below 4 GiB to the APICs and to what KVM keeps there.
LOW_MEMORY_END = 3 * SIZE_1G
HIGH_MEMORY_START = 4 * SIZE_1G
APIC_DEFAULT_GPA = Gpa(0xFEE0_0000)


def _policy(protection: Protection, wanted: str | None) -> str | None:
    offered = protection.traits.policies
    if wanted is None:
        return offered[0] if offered else None
    if wanted not in offered:
        known = " or ".join(repr(name) for name in offered) or "nothing: it has no private memory"
        raise ValueError(f"private={wanted!r}: protection {protection.name} offers {known}")
    return wanted


class GuestVm(Vm):
    """A VM that runs a :class:`~kvmpy.guest.program.GuestProgram` under a protection.

    Life: created (memory, tables and vCPUs exist, the host prepares) -> :meth:`launch` -> vCPUs run ->
    :meth:`close`.

    :attr:`policy` is what of it is private (the option *private*), None without private memory.
    """

    private = topic(Private)
    # Takes hypercalls before the harness does; returns True for those it answered.
    on_hypercall: Callable[[GuestVcpu, HypercallExit], bool] | None = None

    def __init__(
        self,
        kvm: Kvm,
        program: GuestProgram,
        protection: Protection,
        options: VmOptions,
    ) -> None:
        check_known(options, VmOptions)
        policy = _policy(protection, options.get("private"))
        super().__init__(kvm, kvm.create_vm_fd(protection.vm_type), protection.vm_type)
        self.program = program
        self.protection = protection
        self.deadline = options.get("deadline", DEFAULT_DEADLINE)
        self.policy = policy
        self._strict_private = options.get("strict_private", False)
        self.launched = False
        # What the protection's launch has come to: a state of its own, for those that have some.
        self.launch_state: object = None
        self.encryption: EncryptionBit | None = protection.encryption_bit(kvm)
        self._console: list[str] = []
        self._known: list[tuple[int, int, int]] = []
        self._heap = layout.HEAP_BASE
        self._lock = threading.Lock()
        self._together: dict[GuestVcpu, VcpuThread[None]] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            self._irqchip(options.get("irqchip", "split"))
            protection.created(self)
            if protection.traits.has_private_memory:
                self.private.enable_conversions()
            memory = options.get("memory")
            self._add_ram(DEFAULT_MEMORY if memory is None else memory, options.get("backing"))
            self.allocator = PageAllocator(
                self.memory, private=protection.traits.has_private_memory, start=ALLOCATION_START
            )
            levels = options.get("levels", 4)
            self._check_levels(levels)
            tables = PageTables if levels else NoPaging
            self.pages = tables(
                self.memory,
                self.allocator,
                levels=levels,
                encryption=self.encryption,
                private_tables=policy != "data",
            )
            self._load_program()
            if (before_vcpus := options.get("before_vcpus")) is not None:
                before_vcpus(self)
            ids = options.get("vcpu_ids")
            self._add_vcpus(range(options.get("vcpus", 1)) if ids is None else ids, options.get("cpuid"))
            undo.pop_all()

    # Building.

    def _irqchip(self, kind: str | None) -> None:
        # The devices of a full irqchip cost a grace period of the VM's SRCU: 7 ms on an idle host, twenty
        # times the rest of a VM's life.  So the local APICs alone are the default.
        if kind == "full":
            self.irq.create_chip()
        elif kind == "split":
            self.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        elif kind is not None:
            raise ValueError(f"irqchip={kind!r}: expected 'full', 'split' or None")

    def _check_levels(self, levels: int) -> None:
        bits = 32 if levels < _LONG_MODE_LEVELS else 64
        if self.program.bits != bits:
            raise ValueError(
                f"levels={levels} runs {bits}-bit programs, {self.program.name} is one of "
                f"{self.program.bits} bits (cflags=['-m32'] makes 32)"
            )
        if levels < 3 and self.encryption is not None:
            raise ValueError(f"levels={levels}: nothing there has room for the {self.encryption.name}")

    def _room(self, gva: Gva, pages: int, *, private: bool | None = None) -> Gpa:
        """Return guest-physical memory for what has its place at *gva*: without paging, the same address."""
        if self.pages.levels:
            return self.allocator.alloc(pages, private=private)
        gpa, size = Gpa(int(gva)), pages << PAGE_SHIFT
        if any(int(s.gpa) <= int(gpa) < int(s.gpa) + s.size for s in self.memory.segments()):
            self.allocator.reserve(gpa, size)
        else:
            self.add_memory(gpa, size)
        return gpa

    def _add_ram(self, size: int, backing: Backing | None) -> None:
        if size % PAGE_SIZE or size < 4 << 20:
            raise ValueError(f"memory={size:#x}: whole pages, and at least 4 MiB")
        low = min(size, LOW_MEMORY_END)
        self.add_memory(Gpa(0), low, backing=backing)
        if size > low:
            self.add_memory(Gpa(HIGH_MEMORY_START), size - low, backing=backing)

    def add_memory(
        self, gpa: Gpa, size: int, *, private: bool = True, **options: Unpack[SlotOptions]
    ) -> MemorySlot:
        """Give the VM *size* more bytes of memory at *gpa*, in the way of its protection; map it with
        :meth:`map`.

        Its pages are shared until they are made private.  Without *private* they stay so, in a plain slot
        that takes every flag: one with a guest_memfd refuses KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY.
        """
        check_known(options, SlotOptions)
        if self.encryption is not None:
            self.encryption.check(gpa)
        if private:
            return self.protection.add_memory(self, gpa, size, **options)
        always_shared = self.protection.traits.has_private_memory
        return self.add_slot(gpa, size, always_shared=always_shared, **options)

    def _make_vcpu(self, fd: int, vcpu_id: int) -> Vcpu:
        """Wrap a new vCPU as one that runs the guest program."""
        return GuestVcpu(self, fd, vcpu_id, len(self.vcpus))

    @property
    def vcpus(self) -> Sequence[GuestVcpu]:
        """The vCPUs in the order of their creation."""
        return cast("list[GuestVcpu]", self._vcpus)

    def _place(
        self, gva: Gva, gpa: Gpa, size: int, *, writable: bool = True, nx: bool = True, user: bool = False
    ) -> None:
        nx = nx and self.pages.levels > 2  # others have no such bit
        self.pages.map(gva, gpa, size, page_size=PAGE_SIZE, writable=writable, nx=nx, user=user)
        self._remember(gva, gpa, size)

    def _remember(self, gva: Gva, gpa: Gpa, size: int) -> None:
        # Host's own record of mappings: under some protections the page tables cannot be read back.
        entry = (int(gva), int(gpa), size)
        with self._lock:
            self._known.insert(bisect_right(self._known, entry), entry)

    def _load_program(self) -> None:
        for segment in self.program.segments:
            first = segment.gva.align_down(PAGE_SIZE)
            skip = segment.gva - first
            pages = (skip + segment.memsize + PAGE_SIZE - 1) >> PAGE_SHIFT
            code = segment.executable and self.policy == "data"
            if segment.low:
                gpa = Gpa(int(first))
            else:
                gpa = self._room(first, pages, private=False if segment.shared or code else None)
            if segment.data:
                self.memory.write(gpa + skip, segment.data)
            self._place(
                first,
                gpa,
                pages << PAGE_SHIFT,
                writable=segment.writable,
                nx=not segment.executable,
                user=segment.user,
            )
        gpa = self._room(Gva(layout.GDT_GVA), 2, private=False if self.policy == "data" else None)
        gdt, idt = system_tables(self.program, nested_nmis=self.protection.traits.has_ghcb)
        self.memory.write(gpa, gdt)
        self.memory.write(gpa + PAGE_SIZE, idt)
        self._place(Gva(layout.GDT_GVA), gpa, 2 * PAGE_SIZE)
        if not self.pages.levels:
            return
        self.pages.map(
            Gva(layout.XAPIC_GVA),
            APIC_DEFAULT_GPA,
            PAGE_SIZE,
            page_size=PAGE_SIZE,
            nx=self.pages.levels > 2,
            private=False,
        )

    def _add_vcpus(self, ids: Sequence[int], cpuid: Callable[[kvm_cpuid2], kvm_cpuid2] | None) -> None:
        count = len(ids)
        if not 0 <= count <= layout.MAX_VCPUS:
            raise ValueError(f"{count} vCPUs: 0 to {layout.MAX_VCPUS}")
        if count == 0:
            return
        # Many vCPUs share the default memory only with small stacks.
        stack = layout.STACK_SIZE - layout.STACK_GUARD if count <= 64 else 4 * PAGE_SIZE
        percpu = layout.PERCPU_SIZE
        if self.pages.levels:
            areas = self.allocator.alloc(count * (percpu + stack) >> PAGE_SHIFT)
            stacks = areas + count * percpu
        else:
            areas = self._room(Gva(layout.PERCPU_BASE), count * percpu >> PAGE_SHIFT)
            stacks = self._room(Gva(layout.STACK_BASE), count * layout.STACK_SIZE >> PAGE_SHIFT)
        ucalls = self._room(Gva(layout.UCALL_BASE), count, private=False)
        self._place(Gva(layout.PERCPU_BASE), areas, count * percpu)
        self._place(Gva(layout.UCALL_BASE), ucalls, count * PAGE_SIZE)
        ghcbs = self._add_ghcbs(count) if self.protection.traits.has_ghcb else None
        for index, vcpu_id in enumerate(ids):
            vcpu = cast(GuestVcpu, self.create_vcpu(vcpu_id))
            vcpu.stack_top = Gva(layout.STACK_BASE + (index + 1) * layout.STACK_SIZE)
            bottom = vcpu.stack_top - stack
            self._place(bottom, stacks + index * stack if self.pages.levels else Gpa(int(bottom)), stack)
            vcpu.percpu = Gva(layout.PERCPU_BASE + index * percpu)
            vcpu.percpu_gpa = areas + index * percpu
            ucall_gpa = ucalls + index * PAGE_SIZE
            page = self.memory.shared_look(ucall_gpa, PAGE_SIZE)
            layout.fill_ucall_page(
                page, index, int(ucall_gpa), layout.UCALL_BASE + index * layout.UCALL_PAGE_SIZE
            )
            vcpu.attach_ucalls(ucall_gpa, page)
            if ghcbs is not None:
                vcpu.ghcb_gpa = ghcbs + index * PAGE_SIZE
            table = guest_cpuid(self.kvm, vcpu_id)
            vcpu.cpuid.set(cpuid(table.copy()) if cpuid is not None else table)
            tss = tss_page(vcpu.percpu) if self.program.bits == 64 else segments.tss32()
            self.memory.write(vcpu.percpu_gpa + layout.PERCPU_TSS, tss)

    def _add_ghcbs(self, count: int) -> Gpa:
        ghcbs = self.allocator.alloc(count, private=False)
        self._place(Gva(layout.GHCB_BASE), ghcbs, count * PAGE_SIZE)
        # The #VC handler looks up the address of an MMIO access in the tables: they map themselves.
        root = self.pages.root
        self.memory.write(root + layout.SELF_MAP_SLOT * 8, layout.self_map_entry(int(self.pages.cr3)))
        return ghcbs

    # Launch.

    def launch(self) -> None:
        """Freeze the initial state, let the protection bring it in, and make the vCPUs ready to run; once
        only.
        """
        if self.launched:
            raise LaunchError(f"{self.name} was launched before")
        main = self.program.symbols.get("guest_main")
        for vcpu in self.vcpus:
            entry = vcpu.entry if vcpu.entry is not None else (main.gva if main is not None else None)
            if entry is None:
                raise LaunchError(
                    f"{vcpu.name} has no entry: the program has no guest_main and set_entry() was not called"
                )
            self.memory.write(
                vcpu.percpu_gpa,
                layout.pack_guest_cpu(
                    index=vcpu.index,
                    apic_id=vcpu.vcpu_id,
                    percpu=int(vcpu.percpu),
                    ucall_slot=layout.UCALL_BASE + vcpu.index * layout.UCALL_PAGE_SIZE,
                    stack_top=int(vcpu.stack_top),
                    entry=int(entry),
                    args=vcpu.args,
                    ghcb=0 if vcpu.ghcb_gpa is None else layout.GHCB_BASE + vcpu.index * PAGE_SIZE,
                    ghcb_gpa=0 if vcpu.ghcb_gpa is None else int(vcpu.ghcb_gpa),
                    sev=self.protection.guest_sev,
                    encryption_mask=self.encryption.mask if self.encryption is not None else 0,
                    l2=int(vcpu.l2_gva),
                ),
            )
            initial_sregs(vcpu, self.pages)
            initial_regs(vcpu, self.program)
        self.protection.launch(self)
        self.launched = True
        if self.protection.traits.private_is_fd_backed:
            self.memory.convert = partial(self.protection.convert, self)
        if self._strict_private:
            self.memory.seal = "strict_private keeps it from the host, as SEV-SNP would"
        elif not self.protection.traits.host_sees_private:
            self.memory.seal = f"protection {self.protection.name} keeps it from the host after launch"

    # Addresses.

    def to_raw(self, gpa: Gpa, private: bool | None = None) -> RawGpa:
        """Return *gpa* as a page-table entry holds it, private or shared as the page is now unless
        *private* says.
        """
        if self.encryption is None:
            return RawGpa(int(gpa))
        return self.encryption.to_raw(gpa, self.memory.is_private(gpa) if private is None else private)

    def from_raw(self, raw: RawGpa) -> tuple[Gpa, bool]:
        """Split what a page-table entry holds into the address and whether it names the private page."""
        if self.encryption is None:
            return Gpa(int(raw)), False
        return self.encryption.from_raw(raw)

    def gpa_to_hva(self, gpa: Gpa) -> int:
        """Return the host address of *gpa*; ValueError when it carries the encryption bit or is outside
        guest memory.
        """
        if not isinstance(gpa, Gpa):
            raise TypeError(
                f"gpa_to_hva() takes a Gpa, this is of type {type(gpa).__name__}; from_raw() splits a RawGpa"
            )
        if self.encryption is not None:
            self.encryption.check(gpa)
        return self.memory.hva(gpa)

    def gva_to_gpa(self, gva: Gva) -> Gpa:
        """Return the guest-physical address behind *gva*, by the page tables; ValueError when it is not
        mapped.
        """
        if self.memory.seal is None or not self.memory.is_private(Gpa(self.from_raw(self.pages.cr3)[0])):
            return self.pages.translate(gva)
        place = bisect_right(self._known, (int(gva), 1 << 64, 0)) - 1
        if place >= 0:
            start, gpa, size = self._known[place]
            if int(gva) < start + size:
                return Gpa(gpa + int(gva) - start)
        raise PrivateMemoryError(
            f"gva {gva} is in none of the mappings made before launch, and {self.memory.seal}"
        )

    # Memory by guest-virtual address.

    def _stretches(self, gva: Gva, size: int) -> list[tuple[Gpa, int]]:
        results: list[tuple[Gpa, int]] = []
        position, end = int(gva), int(gva) + size
        while position < end:
            part = min(end - position, PAGE_SIZE - position % PAGE_SIZE)
            gpa = self.gva_to_gpa(Gva(position))
            if results and int(results[-1][0]) + results[-1][1] == int(gpa):
                results[-1] = (results[-1][0], results[-1][1] + part)
            else:
                results.append((gpa, part))
            position += part
        return results

    def read(self, gva: Gva, size: int) -> bytes:
        """Return a copy of *size* bytes at *gva* as the guest sees them."""
        return b"".join(self.memory.read(gpa, part) for gpa, part in self._stretches(gva, size))

    def write(self, gva: Gva, data: bytes | bytearray | memoryview) -> None:
        """Write *data* at *gva* so that the guest sees it."""
        source = memoryview(data).cast("B")
        done = 0
        for gpa, part in self._stretches(gva, len(source)):
            self.memory.write(gpa, source[done : done + part])
            done += part

    def view(self, gva: Gva, size: int) -> memoryview:
        """Return *size* bytes at *gva* as a view of the memory itself; ValueError where it is not
        contiguous in guest-physical space.
        """
        stretches = self._stretches(gva, size)
        if len(stretches) != 1:
            raise ValueError(f"gva {gva}, {size:#x} bytes, is not contiguous in guest-physical memory")
        return self.memory.view(stretches[0][0], size)

    def symbol(self, name: str) -> GuestVariable:
        """Return the guest global *name*, to read and write; GuestSymbolError with the closest names when
        there is none.
        """
        function = self.program.symbol(name)
        return GuestVariable(self, name, function.gva, function.size)

    def variable(self, gva: Gva, size: int) -> GuestVariable:
        """Return *size* bytes at *gva* as a variable without a name."""
        return GuestVariable(self, f"*{gva}", gva, size)

    def alloc(
        self,
        size: int,
        *,
        gva: Gva | None = None,
        private: bool | None = None,
        page_size: int = PAGE_SIZE,
        writable: bool = True,
        user: bool = False,
        nx: bool = True,
    ) -> Gva:
        """Allocate *size* bytes (rounded up to pages) of zeroed guest memory, map it, and return its address.

        *private* None: private where the protection has private memory (with policy ``"data"`` not for code,
        that is without *nx*).  An unmapped page lies between two allocations.  Any thread may call it.
        After launch, private memory that is encrypted is not zero.
        """
        if private is None and not nx and self.policy == "data":
            private = False
        size = -(-size // page_size) * page_size
        gpa = self.allocator.alloc(size >> PAGE_SHIFT, private=private, align=page_size)
        if gva is None:
            where = self.reserve(size, page_size) if self.pages.levels else Gva(int(gpa))
        else:
            where = gva
        nx = nx and self.pages.levels > 2
        self.pages.map(where, gpa, size, page_size=page_size, writable=writable, user=user, nx=nx)
        self._remember(where, gpa, size)
        return where

    def reserve(self, size: int, align: int = PAGE_SIZE) -> Gva:
        """Return free guest-virtual addresses for *size* bytes, to be mapped; the page behind stays free."""
        with self._lock:
            where = -(-self._heap // align) * align
            self._heap = where + size + PAGE_SIZE
        return Gva(where)

    def map(self, gva: Gva, gpa: Gpa, size: int, **keywords: bool | int | None) -> None:
        """Map guest-physical memory; keywords as :meth:`kvmpy.x86.paging.PageTables.map`.

        Any thread may call it.
        """
        self.pages.map(gva, gpa, size, **keywords)  # type: ignore[arg-type]
        self._remember(gva, gpa, size)

    # Console and post-mortem.

    @property
    def console(self) -> str:
        """All that the guest printed so far."""
        return "".join(self._console)

    def postmortem(self, vcpu: GuestVcpu, cause: str, call: Ucall | None = None) -> str:
        """Return the state of the VM as text, seen from *vcpu*."""
        return postmortem(self, vcpu, cause, call)

    # All vCPUs at once.

    def run_all(
        self,
        timeout: float | None = None,
        *,
        on_exit: Callable[[GuestVcpu, Exit], bool] | None = None,
        on_sync: Callable[[GuestVcpu, Ucall], None] | None = None,
    ) -> None:
        """Run every vCPU in a thread of its own until DONE; the first failure ends the others' runs and is
        raised.

        *timeout* in seconds, by default the VM's deadline.  A time-out says where every vCPU stood.  A
        callback that has not come back CALLBACK_GRACE seconds later is a ThreadTimeoutError, with its Python
        stack: its thread goes on, but its vCPU runs no more.
        """
        from kvmpy.core.threads import VcpuThread, run_threads

        limit = self.deadline if timeout is None else timeout

        def body(vcpu: GuestVcpu) -> None:
            vcpu.run_to_done(
                limit,
                on_exit=None if on_exit is None else lambda got: on_exit(vcpu, got),
                on_sync=None if on_sync is None else lambda got: on_sync(vcpu, got),
            )

        self._together = {
            vcpu: VcpuThread(partial(body, vcpu), vcpu=vcpu, name=vcpu.name) for vcpu in self.vcpus
        }
        try:
            run_threads(list(self._together.values()), limit + CALLBACK_GRACE)
        finally:
            for vcpu, thread in self._together.items():
                if thread.alive:
                    vcpu.stop()
            self._together = {}

    def _halt_others(self, vcpu: GuestVcpu) -> None:
        """End the runs of the vCPUs beside *vcpu* within run_all(), so that they can be looked at."""
        together = {other: thread for other, thread in self._together.items() if other is not vcpu}
        for other, thread in together.items():
            thread.stopping = True
            if thread.alive and not other.done:
                other.kick()
        end = time.monotonic() + HALT_SECONDS
        while any(other.running for other in together) and time.monotonic() < end:
            time.sleep(0.001)  # whoever runs one needs the interpreter to find out
