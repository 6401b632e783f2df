# SPDX-License-Identifier: Apache-2.0
"""Guests that end themselves, or whose GHCB the hypervisor does not take: a clear error, nothing left."""

from __future__ import annotations

import pytest

from kvmpy import KVM_SYSTEM_EVENT_SEV_TERM, MakeVm, SystemEventExit, UnexpectedExitError
from kvmpy.coco import ladder
from selftests.sev.asids import Asids

with_ghcb = pytest.mark.protections("all", has_ghcb=True)
with_snp = pytest.mark.protections("all", must_validate=True)


def ended(asids: Asids, make_vm: MakeVm, source: str) -> UnexpectedExitError:
    """Run a guest that ends itself; the platform takes as many VMs afterwards as before. Return the error."""
    vm_type = ladder.get(make_vm.protection).vm_type
    before = asids.left(vm_type)
    assert before > 0
    vm = make_vm.start(source)
    with pytest.raises(UnexpectedExitError) as caught:
        vm.vcpus[0].run_to_done()
    vm.close()
    assert asids.left(vm_type) == before
    return caught.value


def reason_of(error: UnexpectedExitError) -> tuple[int, int]:
    """Return set and reason of the termination request that an error is about."""
    got = error.got
    assert isinstance(got, SystemEventExit)
    assert got.type == KVM_SYSTEM_EVENT_SEV_TERM
    (value,) = got.data
    assert value & 0xFFF == 0x100
    return value >> 12 & 0xF, value >> 16 & 0xFF


IN_THE_HANDLER = """
#include <kvmpy/guest.h>

static void on_vc(struct exception_frame *frame)
{
	struct ghcb_use use;

	ghcb_begin(&use);
	ghcb_put(use.ghcb, GHCB_RAX, frame->error_code);
	ghcb_terminate(7, 0x42);
}

void guest_main(void)
{
	const void *from = "x";

	guest_exception_install(VC_VECTOR, on_vc);
	/* With a segment prefix it is none of the instructions that the runtime carries out. */
	asm volatile("fs outsb" : "+S"(from) : "d"(0x42) : "memory");
}
"""


@with_ghcb
def test_in_the_middle_of_the_handler(asids: Asids, make_vm: MakeVm) -> None:
    """A guest that ends itself in its #VC handler, with its GHCB half filled, is an error with its reason."""
    error = ended(asids, make_vm, IN_THE_HANDLER)
    assert reason_of(error) == (7, 0x42)
    assert "the guest ended itself: reason 0x42 of set 0x7" in str(error)


PRETEND = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	/* What the runtime's set-up leaves behind, without what it does. */
	guest_cpu()->ghcb_msr = %s;
	GUEST_SYNC();
}
"""


@with_snp
def test_a_ghcb_never_registered(asids: Asids, make_vm: MakeVm) -> None:
    """SNP: a guest that uses its GHCB without registering it is refused, ends itself and says why."""
    error = ended(asids, make_vm, PRETEND % "1")
    assert reason_of(error) == (5, 1)
    assert "does not know this GHCB's GPA as the registered one" in str(error)


@with_ghcb
def test_a_ghcb_never_named(asids: Asids, make_vm: MakeVm) -> None:
    """A guest that leaves without a GPA in its GHCB MSR comes back with nothing done, and ends itself."""
    error = ended(asids, make_vm, PRETEND % "guest_cpu()->ghcb_gpa")
    assert reason_of(error) == (5, 2)
    assert "did not take the request out of the GHCB" in str(error)
