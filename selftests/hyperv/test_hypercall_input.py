# SPDX-License-Identifier: Apache-2.0
"""Input of Hyper-V's hypercalls: the status of each kind that is wrong, and completed repetitions."""

from __future__ import annotations

import struct

import pytest

from kvmpy import PAGE_SIZE, Gpa, GuestVm
from kvmpy.x86.hyperv import HvCall, HvFlush, HvStatus, HvVpSet, control

from .conftest import Call, MakeHyperV, calls

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_SEND_IPI", "KVM_CAP_SYS_HYPERV_CPUID"),
    pytest.mark.protections("none", "cbit"),
]

OK = int(HvStatus.HV_STATUS_SUCCESS)
BAD, ALIGN = int(HvStatus.HV_STATUS_INVALID_HYPERCALL_INPUT), int(HvStatus.HV_STATUS_INVALID_ALIGNMENT)
PARAMETER = int(HvStatus.HV_STATUS_INVALID_PARAMETER)
ALL = int(HvFlush.HV_FLUSH_ALL_PROCESSORS)
SPARSE, EVERYBODY = int(HvVpSet.HV_GENERIC_SET_SPARSE_4K), int(HvVpSet.HV_GENERIC_SET_ALL)
NOWHERE = 1 << 38
VECTOR = 0x51


def done(count: int) -> int:
    """Return the result of a call that completed *count* repetitions."""
    return count << 32


class Memory:
    """Shared memory for inputs: each gets words at an address of its own."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm
        self._next = vm.alloc(4 * PAGE_SIZE, private=False)

    def put(self, *words: int) -> int:
        """Write 8-byte words and return their guest-physical address."""
        gva, self._next = self._next, self._next + 8 * max(len(words), 1)
        self._vm.write(gva, struct.pack(f"<{len(words)}Q", *words))
        return int(self._vm.gva_to_gpa(gva))


def check(vm: GuestVm, table: dict[str, tuple[Call, int]]) -> None:
    """Let the guest make the calls; all results must be those of the table."""
    got: dict[str, int] = {}
    rows = list(table)
    for begin in range(0, len(rows), 90):
        part = rows[begin : begin + 90]
        got |= calls(vm, {name: table[name][0] for name in part})
    assert got == {name: status for name, (_, status) in table.items()}


def test_reserved_bits(make_hyperv: MakeHyperV) -> None:
    """A set reserved bit of the control word is invalid input, whatever the call.

    TLFS, hypercall inputs: bits 31:27, 47:44 and 63:60 are reserved.
    """
    table = {}
    for bit in (*range(27, 32), *range(44, 48), *range(60, 64)):
        for code in (HvCall.HVCALL_SEND_IPI, HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0xBEEF):
            table[f"{code:#x} bit {bit}"] = (Call(control(code, fast=True) | 1 << bit, VECTOR, 1), BAD)
    check(make_hyperv(), table)


def test_forms(make_hyperv: MakeHyperV) -> None:
    """Repetitions and a variable header are invalid input for calls without them, as none for one with them.

    TLFS, hypercall inputs: simple and rep hypercalls, variable-sized input headers.
    """
    plain = {
        HvCall.HVCALL_NOTIFY_LONG_SPIN_WAIT,
        HvCall.HVCALL_SEND_IPI,
        HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE,
        HvCall.HVCALL_SIGNAL_EVENT,
        HvCall.HVCALL_POST_MESSAGE,
    }
    table = {}
    for code in sorted(plain):
        for name, word in {
            "variable header": control(code, fast=True, variable=1),
            "repetitions": control(code, fast=True, reps=1),
            "start": control(code, fast=True, start=1),
        }.items():
            table[f"{code.name} with {name}"] = (Call(word, VECTOR, 1), BAD)
    lists = (HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX)
    for code in lists:
        table[f"{code.name} without repetitions"] = (Call(control(code, fast=True), 0, ALL, (0,) * 12), BAD)
        table[f"{code.name} from 1"] = (
            Call(control(code, fast=True, reps=2, start=1), 0, ALL, (0,) * 12),
            BAD,
        )
    for code in (HvCall.HVCALL_SEND_IPI_EX, HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX):
        table[f"{code.name} with repetitions"] = (
            Call(control(code, fast=True, reps=1), 0, 1, (0,) * 12),
            BAD,
        )
    check(make_hyperv(), table)


def test_vectors(make_hyperv: MakeHyperV) -> None:
    """An IPI has a vector of 16 to 255; the upper half of its first word is reserved.

    TLFS, hypercall inputs, HvCallSendSyntheticClusterIpi.
    """
    vm = make_hyperv()
    memory = Memory(vm)
    send, send_ex = HvCall.HVCALL_SEND_IPI, HvCall.HVCALL_SEND_IPI_EX
    table = {}
    for vector in (0, 15, 16, 0xFF, 0x100, 0xFFFF_FFFF):
        status = OK if 16 <= vector <= 255 else BAD
        nobody = 1 << 63
        table[f"fast {vector:#x}"] = (Call(control(send, fast=True), vector, nobody), status)
        table[f"slow {vector:#x}"] = (Call(control(send), memory.put(vector, nobody)), status)
        ex = memory.put(vector, SPARSE, 1, nobody)
        table[f"ex slow {vector:#x}"] = (Call(control(send_ex, variable=1), ex), status)
        xmm = (1, nobody)
        table[f"ex fast {vector:#x}"] = (
            Call(control(send_ex, fast=True, variable=1), vector, SPARSE, xmm),
            status,
        )
    table["reserved half"] = (Call(control(send, fast=True), VECTOR | 1 << 32, 1), BAD)
    check(vm, table)


def test_sets(make_hyperv: MakeHyperV) -> None:
    """A sparse set has as many banks as its mask has bits, and as many as its place holds.

    TLFS, hypercall inputs; a fast call holds what six XMM registers hold.
    """
    vm = make_hyperv()
    memory = Memory(vm)
    send, flush = HvCall.HVCALL_SEND_IPI_EX, HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX
    table = {}
    for banks in range(13):
        mask = (1 << banks) - 1
        for count in {max(banks - 1, 0), banks, banks + 1}:
            fits = count == banks
            # The mask is in the first half of XMM0.
            word = control(send, fast=True, variable=count)
            status = OK if fits and banks <= 11 else BAD
            xmm = (mask, *(0,) * 11)
            table[f"fast IPI, {count} words for {banks} banks"] = (Call(word, VECTOR, SPARSE, xmm), status)
            # Format and mask fill XMM0.
            word = control(flush, fast=True, variable=count)
            status = OK if fits and banks <= 10 else BAD
            xmm = (SPARSE, mask, *(0,) * 10)
            table[f"fast flush, {count} words for {banks} banks"] = (Call(word, 0, 0, xmm), status)
    full = (1 << 64) - 1
    sent = memory.put(VECTOR, SPARSE, full, *(0,) * 64)
    flushed = memory.put(0, 0, SPARSE, full, *(0,) * 64)
    table["64 banks, IPI"] = (Call(control(send, variable=64), sent), OK)
    table["64 banks, flush"] = (Call(control(flush, variable=64), flushed), OK)
    table["63 words for 64 banks"] = (Call(control(send, variable=63), sent), BAD)
    table["65 words for 64 banks"] = (Call(control(send, variable=65), sent), BAD)
    empty = memory.put(VECTOR, SPARSE, 0)
    table["no bank, IPI"] = (Call(control(send), empty), OK)
    table["no bank, flush"] = (Call(control(flush), memory.put(0, 0, SPARSE, 0)), OK)
    table["all, IPI"] = (Call(control(send), memory.put(VECTOR, EVERYBODY, 0)), OK)
    table["all, bad vector"] = (Call(control(send), memory.put(3, EVERYBODY, 0)), BAD)
    check(vm, table)


def test_no_memory(make_hyperv: MakeHyperV) -> None:
    """Input where there is no memory, or only for its beginning, is invalid.

    TLFS, hypercall inputs: parameters lie in the guest's memory.
    """
    vm = make_hyperv()
    codes = {
        HvCall.HVCALL_SEND_IPI: control(HvCall.HVCALL_SEND_IPI),
        HvCall.HVCALL_SEND_IPI_EX: control(HvCall.HVCALL_SEND_IPI_EX, variable=1),
        HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE: control(HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE),
        HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST: control(HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, reps=1),
        HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX: control(
            HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, variable=1
        ),
        HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX: control(
            HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX, variable=1, reps=1
        ),
    }
    table = {code.name: (Call(word, NOWHERE), BAD) for code, word in codes.items()}
    table["HVCALL_SIGNAL_EVENT"] = (Call(control(HvCall.HVCALL_SIGNAL_EVENT), NOWHERE), ALIGN)
    # The header is there, the banks and the list are not.
    end = vm.add_memory(Gpa(0x8000_0000), PAGE_SIZE, private=False)
    header = struct.pack("<3Q", VECTOR, SPARSE, 1)
    vm.memory.write(Gpa(end.gpa + PAGE_SIZE - len(header)), header)
    table["banks of an IPI"] = (
        Call(codes[HvCall.HVCALL_SEND_IPI_EX], int(end.gpa) + PAGE_SIZE - len(header)),
        BAD,
    )
    check(vm, table)


def test_signal_alignment(make_hyperv: MakeHyperV) -> None:
    """The input of HvCallSignalEvent is aligned to 8 bytes.

    TLFS, hypercall inputs: parameter lists are 8-byte aligned and do not span pages.
    """
    vm = make_hyperv()
    gpa = Memory(vm).put(0, 0)
    signal = control(HvCall.HVCALL_SIGNAL_EVENT)
    # Aligned, it gets as far as to find nobody who listens.
    table = {f"at {at}": (Call(signal, gpa + at), ALIGN if at else BAD) for at in range(8)}
    check(vm, table)


def test_completed_repetitions(make_hyperv: MakeHyperV) -> None:
    """A list call tells how many of its elements it did: all, also of a list that KVM keeps no place for.

    TLFS, hypercall inputs: bits 43:32 are the repetitions completed.
    """
    vm = make_hyperv()
    memory = Memory(vm)
    flush, flush_ex = HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX
    table = {}
    for count in (1, 2, 15, 16, 17, 64):
        entries = [0x7000_0000_0000 + n * PAGE_SIZE for n in range(count)]
        gpa = memory.put(0, ALL, 0, *entries)
        table[f"list of {count}"] = (Call(control(flush, reps=count), gpa), done(count))
        gpa = memory.put(0, 0, SPARSE, 1, 1, *entries)
        table[f"ex list of {count}"] = (Call(control(flush_ex, reps=count, variable=1), gpa), done(count))
    for count in (1, 11, 12):
        xmm = (0, *(n * PAGE_SIZE for n in range(11)))
        status = done(count) if count <= 11 else BAD
        table[f"fast list of {count}"] = (Call(control(flush, fast=True, reps=count), 0, ALL, xmm), status)
    for count in (1, 9, 10):
        xmm = (SPARSE, 1, 1, *(n * PAGE_SIZE for n in range(9)))
        status = done(count) if count <= 9 else BAD
        word = control(flush_ex, fast=True, variable=1, reps=count)
        table[f"fast ex list of {count}"] = (Call(word, 0, 0, xmm), status)
    table["4095"] = (Call(control(flush, reps=4095), memory.put(0, ALL, 0)), done(4095))
    check(vm, table)


def test_debugger_is_slow(make_hyperv: MakeHyperV) -> None:
    """Calls of the debugger have input in memory: fast ones are refused; the extended calls likewise.

    TLFS, hypercall inputs: fast hypercalls are those that are documented as such.
    """
    table = {
        code.name: (Call(control(code, fast=True)), PARAMETER)
        for code in (
            HvCall.HVCALL_POST_DEBUG_DATA,
            HvCall.HVCALL_RETRIEVE_DEBUG_DATA,
            HvCall.HV_EXT_CALL_QUERY_CAPABILITIES,
        )
    }
    check(make_hyperv(), table)
