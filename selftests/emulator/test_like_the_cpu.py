# SPDX-License-Identifier: Apache-2.0
"""KVM's emulator against the CPU: the same instruction, registers and memory must end the same.

The instructions are those of kvmpy/x86/instructions.py, with random operands; each run does as many pairs as
fit into its time.  A pair that differs is made simpler while it still does.
"""

from __future__ import annotations

import time

import pytest

from kvmpy import Cpuid, Kvm
from kvmpy.x86.instructions import Form, groups
from kvmpy.x86.operands import Instruction, choose
from selftests.emulator.conftest import LOSE_FLAGS, WAYS, MakePairs, Pairs, Way, Ways, forms_of

pytestmark = pytest.mark.protections("none")

# As many instructions at a time, each with as many operands.
AT_A_TIME, OPERANDS = 32, 8
LOCKLESS = ("arithmetic", "shifts", "products", "bits", "moves", "conditions", "flags", "strings", "stack")


def encode(pairs: Pairs, form: Form) -> Instruction:
    """Return the form with random operands, in memory where that makes the difference."""
    while True:
        made = pairs.encoder.encode(form, pairs.site())
        if pairs.way is not Way.MMIO or (made.window and not pairs.loses_flags(made)):
            return made


def compare(pairs: Pairs, forms: list[Form], seconds: float) -> None:
    """Run pairs of these forms for as long, or until some differ."""
    if pairs.way is Way.MMIO and pairs.reads_first:
        forms = [form for form in forms if form.name not in LOSE_FLAGS]
    until, reports = time.monotonic() + seconds, list[str]()
    while not reports:
        made = [encode(pairs, form) for form in choose(pairs.rng, forms, AT_A_TIME)]
        reports = pairs.check(made, OPERANDS)
        if time.monotonic() >= until:
            break
    print(f"{pairs.done:,} pairs, {pairs.undelivered} left out")
    assert pairs.done > pairs.undelivered
    # The first line is all that a table of verdicts shows.
    first = " ".join(reports[0].split()) if reports else ""
    title = f"{len(reports)} of {pairs.done:,} pairs did not end as on the CPU, the first: {first}"
    assert not reports, "\n".join([title, *reports])


@pytest.mark.parametrize("group", groups())
@pytest.mark.parametrize("ways", WAYS)
def test_like_the_cpu(make_pairs: MakePairs, kvm: Kvm, load_seconds: float, ways: Ways, group: str) -> None:
    """An instruction that KVM emulates leaves registers, flags and memory as on the CPU, or the same fault.

    AMD APM volume 3; what it calls undefined is not compared.
    """
    forms = forms_of(group, ways)
    if not forms:
        pytest.skip("nothing of it is in this mode, or does the same in both runs")
    avx = group.startswith("avx")
    if avx and not Cpuid.from_struct(kvm.supported_cpuid).has("avx"):
        pytest.skip("no AVX")
    way, ring, bits = ways
    compare(make_pairs(way, ring=ring, bits=bits, avx=avx), forms, load_seconds)


@pytest.mark.parametrize("ways", WAYS)
def test_lock_where_it_may_not_be(make_pairs: MakePairs, load_seconds: float, ways: Ways) -> None:
    """LOCK before an instruction that must not have it is #UD, before any other fault.

    AMD APM volume 3, 1.2.5.
    """
    # What names memory without reaching it, as NOP does, is left alone by some processors.
    forms = [form for group in LOCKLESS for form in forms_of(group, ways) if form.access]
    way, ring, bits = ways
    pairs = make_pairs(way, ring=ring, bits=bits)
    if pairs.reads_first:
        pytest.skip("a CPU that knows where LOCK may be: TCG executes it anywhere, or ends QEMU")
    pairs.encoder.locks = 1
    compare(pairs, forms, load_seconds)
