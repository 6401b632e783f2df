# SPDX-License-Identifier: Apache-2.0
"""Any sequence of runs, intercepts, events, saves and changes of memory, against a plain model of L2.

L2's code is a list of single instructions on R12, R13 and one word of memory.  The model knows where L2
stands, these three values, what L1 intercepts, and which vectors L2's handlers have seen.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvmpy import PAGE_SIZE, Event, EventType, Gva, IoExit, SvmExit, Vector
from kvmpy.x86.vmcb import IntCtl
from selftests import sequences
from selftests.nested.conftest import Notes

PORT = 0x42
WHERE = Gva(0x7700_0000_0000)
# Each instruction, and the exit that L1 may have instead; R12 is not 0 in the upper half.
INSTRUCTIONS = {
    "inc %r12": (b"\x49\xff\xc4", None),
    "mov (%rsi), %r13": (b"\x4c\x8b\x2e", None),
    "mov %r12, (%rsi)": (b"\x4c\x89\x26", None),
    "cpuid": (b"\x0f\xa2", SvmExit.CPUID),
    "rdtsc": (b"\x0f\x31", SvmExit.RDTSC),
    "pause": (b"\xf3\x90", SvmExit.PAUSE),
    "wbinvd": (b"\x0f\x09", SvmExit.WBINVD),
    "mov %cr3, %rax": (b"\x0f\x20\xd8", SvmExit.READ_CR3),
    "out %al, $0x42": (b"\xe6\x42", SvmExit.IOIO),
}
_NAMES = sorted(INSTRUCTIONS)
_EXITS = sorted({int(exit_) for _, exit_ in INSTRUCTIONS.values() if exit_ is not None})
_EVENTS = [
    Event(EventType.EXCEPTION, Vector.UD),
    Event(EventType.EXCEPTION, Vector.GP, 0x18),
    Event(EventType.INTR, 0x71),
    Event(EventType.SOFT, 0x72),
]
V_VECTOR = 0x73
_UINT64 = (1 << 64) - 1


class Sequences(RuleBasedStateMachine):
    """Steps on :attr:`notes`, an L2 whose handlers note what arrives; the page at WHERE is mapped in it."""

    notes: Notes
    pages: tuple[Gva, Gva]

    def __init__(self) -> None:
        super().__init__()
        self.l2 = self.notes.l2
        self.l2.reset()
        self.notes.take()
        self.intercepts: set[int] = set()
        self.r12 = self.r13 = 0
        self.words = [0, 0]
        self.page = 0
        self.expected: Counter[int] = Counter()
        self.injected: Event | None = None
        self.virtual = False
        for page in (0, 1):
            self.host_writes(page, 0)
        self._map()
        self.program(["inc %r12"], 1)

    # What the host and L1 do while L2 stands.

    @rule(names=st.lists(st.sampled_from(_NAMES), min_size=1, max_size=12), start=st.integers(1, 1 << 40))
    def program(self, names: list[str], start: int) -> None:
        """Give L2 other code, and registers."""
        self.names, self.at, self.r12, self.r13 = names, 0, start, 0
        code = b"".join(INSTRUCTIONS[name][0] for name in names)
        self.l2.load(code, r12=start, rsi=int(WHERE))

    @rule(exit_=st.sampled_from(_EXITS), on=st.booleans())
    def intercept(self, exit_: int, on: bool) -> None:
        """Set or clear an intercept."""
        if exit_ == SvmExit.IOIO:
            self.l2.intercept_port(PORT, on=on)
        else:
            self.l2.intercept(exit_, on=on)
        (self.intercepts.add if on else self.intercepts.discard)(exit_)

    @rule(event=st.sampled_from(_EVENTS))
    def inject(self, event: Event) -> None:
        """Let the next run deliver an event."""
        self.l2.vmcb.inject(event)
        self.injected = event

    @precondition(lambda self: not self.virtual)
    @rule()
    def virtual_interrupt(self) -> None:
        """Make a virtual interrupt pending: L2 has interrupts off, so it stays so."""
        self.l2.vmcb["int_ctl"] |= IntCtl.V_IRQ | IntCtl.V_INTR_MASKING | 6 << 16
        self.l2.vmcb["int_vector"] = V_VECTOR
        self.virtual = True

    @rule()
    def open(self) -> None:
        """Set L2's interrupt flag for its next run."""
        self.l2.vmcb["rflags"] |= 1 << 9
        if self.virtual:
            self.expected[V_VECTOR] += 1
        self._run()
        self.virtual = False
        self.l2.vmcb["rflags"] &= ~(1 << 9)

    @rule(page=st.integers(0, 1), value=st.integers(0, _UINT64))
    def host_writes(self, page: int, value: int) -> None:
        """Write a word from the host."""
        self.l2.vm.write(self.pages[page], value.to_bytes(8, "little"))
        self.words[page] = value

    @rule(page=st.integers(0, 1), value=st.integers(0, _UINT64))
    def l1_writes(self, page: int, value: int) -> None:
        """Write a word from L1."""
        assert self.l2.agent.write(self.pages[page], value) is None
        self.words[page] = value

    @rule(control=st.sampled_from([1, 3, 7]))
    def other_page(self, control: int) -> None:
        """Let L2's address lead to the other page; the next VMRUN flushes."""
        self.page ^= 1
        self._map()
        self.l2.vmcb["tlb_ctl"] = control

    def _map(self) -> None:
        vm = self.l2.vm
        step = vm.pages.walk(WHERE).steps[-1]
        entry = (
            int(vm.to_raw(vm.gva_to_gpa(self.pages[self.page]))) | step.value & 0xFFF | step.value & 1 << 63
        )
        window = Gva(int(WHERE) + PAGE_SIZE)
        # A KVM without nested paging of its own notices the guest's writes only.
        assert self.l2.agent.write(window + 8 * step.index, entry) is None
        self.l2.agent.flush_tlb()

    @rule()
    def save_in_l1(self) -> None:
        """Save and restore the vCPU while L1 runs."""
        vcpu = self.l2.vcpu
        vcpu.restore(vcpu.save())

    # Runs.

    @rule()
    def skip(self) -> None:
        """Let L1 step over the instruction that L2 stands at."""
        if self.at < len(self.names):
            self.l2.vmcb["rip"] += len(INSTRUCTIONS[self.names[self.at]][0])
            self.at += 1

    @rule(saves=st.booleans())
    def run(self, saves: bool) -> None:
        """Run L2 to its next exit; *saves* saves and restores at every exit to the host."""
        self._run(saves)

    def _run(self, saves: bool = False) -> None:
        outs, code = self._model()
        if self.injected is not None:
            self.expected[self.injected.vector] += 1
            self.injected = None
        vcpu = self.l2.vcpu
        self.l2.begin()
        for _ in range(outs):
            assert vcpu.expect(IoExit).port == PORT
            if saves:
                vcpu.restore(vcpu.save())
        got = self.l2.end()
        offset = sum(len(INSTRUCTIONS[name][0]) for name in self.names[: self.at])
        seen = (got.code, self.l2.offset, self.l2.register("r12"), self.l2.register("r13"))
        assert seen == (code, offset, self.r12, self.r13)
        arrived = {vector: note.times for vector, note in self.notes.take().items()}
        assert arrived == dict(self.expected)
        self.expected.clear()
        pending = bool(self.l2.vmcb["int_ctl"] & IntCtl.V_IRQ)
        assert pending == (self.virtual and not arrived.get(V_VECTOR))
        assert self._word(self.page) == self.words[self.page]
        self.l2.vmcb["tlb_ctl"] = 0

    def _word(self, page: int) -> int:
        return int.from_bytes(self.l2.vm.read(self.pages[page], 8), "little")

    def _model(self) -> tuple[int, int]:
        """Go on to the next exit; return how many exits to the host come before, and the exit's code."""
        outs = 0
        while self.at < len(self.names):
            name = self.names[self.at]
            exit_ = INSTRUCTIONS[name][1]
            if exit_ is not None and exit_ in self.intercepts:
                return outs, int(exit_)
            if name == "inc %r12":
                self.r12 = self.r12 + 1 & _UINT64
            elif name == "mov (%rsi), %r13":
                self.r13 = self.words[self.page]
            elif name == "mov %r12, (%rsi)":
                self.words[self.page] = self.r12
            outs += exit_ == SvmExit.IOIO
            self.at += 1
        return outs, int(SvmExit.VMMCALL)


def run(notes: Notes, pages: tuple[Gva, Gva], seed: int, *, examples: int, steps: int) -> None:
    """Run sequences; the shortest one that fails is told, and raised."""
    bound = type("Sequences", (Sequences,), {"notes": notes, "pages": pages})
    sequences.run(bound, seed, examples=examples, steps=steps)
