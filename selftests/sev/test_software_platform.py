# SPDX-License-Identifier: Apache-2.0
"""The lab's software AMD-SP: its reverse map table, and the keys that sign its reports."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from kvmpy import PAGE_SIZE, SnpPageType
from kvmpy.coco.rmp import Entry, PageState
from kvmpy.lab.softsev.log import KernelLog
from selftests.sev.conftest import MEMORY, BareMaker, start_snp
from selftests.sev.softrmp import FOLDER, needs_softsev, rmp
from selftests.sev.test_snp_launch import update

pytestmark = [pytest.mark.requires("protection:snp"), needs_softsev]


def guest_pages() -> list[Entry]:
    """Return the entries that belong to guests."""
    return [entry for entry in rmp().values() if entry.asid]


def test_launched_pages_are_the_guests_and_valid(bare: BareMaker) -> None:
    """Each page of SNP_LAUNCH_UPDATE has an entry: its address, one ASID, validated, not immutable."""
    before = rmp()
    guest = bare("snp")
    start_snp(guest)

    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, pages=3)) == (0, 0)

    new = [entry for pfn, entry in rmp().items() if pfn not in before and entry.asid]
    assert sorted(entry.gpa for entry in new) == [int(MEMORY) + page * PAGE_SIZE for page in range(3)]
    assert {entry.asid for entry in new} <= set(range(1, 33))
    assert len({entry.asid for entry in new}) == 1
    assert {(entry.large, entry.state) for entry in new} == {(False, PageState.GUEST_VALID)}


def test_a_refused_page_goes_back_to_the_hypervisor(bare: BareMaker) -> None:
    """A CPUID page with too many entries is refused, and its entry is gone."""
    guest_vm = bare("snp")
    start_snp(guest_vm)
    guest_vm.vm.memory.write(MEMORY, (65).to_bytes(4, "little"))
    before = len(guest_pages())

    kind = int(SnpPageType.KVM_SEV_SNP_PAGE_TYPE_CPUID)
    assert guest_vm.raw("SNP_LAUNCH_UPDATE", update(guest_vm, type=kind)) != (0, 0)

    assert len(guest_pages()) == before


def test_pages_of_a_guest_that_ended_are_the_hypervisors(bare: BareMaker) -> None:
    """The table has as many guest pages after a VM as before it."""
    before = len(guest_pages())
    guest = bare("snp")
    start_snp(guest)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, pages=2)) == (0, 0)
    assert len(guest_pages()) == before + 2

    guest.vm.close()

    assert len(guest_pages()) == before


def host_write(pfn: int) -> int:
    """Have the kernel write to a page, in its direct map, what is there already; return 0 or the errno."""
    try:
        fd = os.open(FOLDER / "host_write", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        pytest.skip("this kernel has no RMP checks of host writes: `kvmpy lab build --soft-sev` makes one")
    try:
        os.write(fd, b"%d" % pfn)
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(fd)
    return 0


@pytest.fixture
def log() -> Iterator[KernelLog]:
    """What the software AMD-SP logs during this test."""
    try:
        reader = KernelLog()
    except OSError as error:
        pytest.skip(f"/dev/kmsg cannot be read: {error.strerror}")
    with closing(reader):
        yield reader


def test_a_host_write_to_a_guests_page_is_a_violation(bare: BareMaker, log: KernelLog) -> None:
    """The kernel's write to a private page faults, and the log has the page's RMP entry."""
    before = rmp()
    guest = bare("snp")
    start_snp(guest)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest)) == (0, 0)
    [(pfn, entry)] = [one for one in rmp().items() if one[0] not in before and one[1].asid]
    log.lines()

    assert host_write(pfn) == errno.EFAULT

    first, *others = log.lines()
    assert first.startswith("softsev: RMP violation: the host writes to ")
    assert others == [
        f"softsev: RMP entry of PFN {pfn:#x}: assigned, GPA {entry.gpa:#x}, ASID {entry.asid}, 4K, validated"
    ]


def test_a_host_write_to_a_launch_context_is_a_violation(bare: BareMaker) -> None:
    """The page that SNP_LAUNCH_START gave to the firmware is closed to the kernel until the VM ends."""
    before = rmp()
    guest = bare("snp")
    start_snp(guest)
    now = rmp()
    [context] = [pfn for pfn in now.keys() - before.keys() if now[pfn].state is PageState.CONTEXT]

    assert host_write(context) == errno.EFAULT
    guest.vm.close()
    assert host_write(context) == 0


def test_a_page_that_came_back_is_the_hosts_to_write(bare: BareMaker, log: KernelLog) -> None:
    """When the VM has ended, the kernel writes to it, and nothing is logged."""
    before = rmp()
    guest = bare("snp")
    start_snp(guest)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest)) == (0, 0)
    [pfn] = [pfn for pfn, entry in rmp().items() if pfn not in before and entry.asid]
    guest.vm.close()
    log.lines()

    assert host_write(pfn) == 0

    assert log.lines() == []


@pytest.mark.parametrize("name", ["vcek", "vlek"])
def test_report_keys_say_that_they_are_no_amd_keys(name: str) -> None:
    """The certificates are those of P-384 keys, issued by the software's root, and named as software."""
    root = x509.load_der_x509_certificate((FOLDER / "root.der").read_bytes())
    leaf = x509.load_der_x509_certificate((FOLDER / f"{name}.der").read_bytes())

    leaf.verify_directly_issued_by(root)
    root.verify_directly_issued_by(root)
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp384r1"
    assert "software" in leaf.subject.rfc4514_string()
    assert "not AMD" in leaf.subject.rfc4514_string()
