# SPDX-License-Identifier: Apache-2.0
"""Extended guest requests: certificates that the host puts beside an attestation report."""

from __future__ import annotations

import errno

import pytest

from kvmpy import PAGE_SIZE, Gpa, GuestError, GuestVm, MakeVm, Message, MessageType, Snp, SnpReqCertsExit
from kvmpy.coco import cert_table
from kvmpy.coco.guest_message import report_request
from kvmpy.coco.report import from_response
from selftests.sev.attester import ATTESTS, Attester

pytestmark = pytest.mark.protections("snp")
with_exit = pytest.mark.requires("sev-attr:KVM_X86_SEV_SNP_REQ_CERTS")

GUEST = (
    ATTESTS
    + """
GUEST_SHARED u64 table_pages;

u64 ask(u64 request_gpa, u64 response_gpa, u64 table_gpa, u64 offered)
{
	u64 pages = offered;
	u64 code = snp_extended_request(request_gpa, response_gpa, table_gpa, &pages);

	table_pages = pages;
	return code;
}

void guest_main(void)
{
	guest_agent();
}
"""
)

QUESTION = bytes(range(64))
PAGES = 3
FILL = 0x5A
# Two pages, whichever way the table is laid out: the second certificate crosses into the second page.
CERTIFICATES = {
    cert_table.VCEK: bytes(range(256)) * 13,
    cert_table.ASK: b"ask" * 400,
    cert_table.ARK: b"root",
}

# SW_EXITINFO2: the hypervisor's error is in the upper half (GHCB specification, SNP Guest Request).
INVALID_LENGTH = 1 << 32
BUSY = 2 << 32
GENERIC = 0xFFFF_FFFF << 32
# As the guest's runtime returns it: SW_EXITINFO1 2 (malformed input), reason 5 (invalid input).
MALFORMED = 2 << 56 | 5


class Asker:
    """A guest that asks for reports with certificates."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.attester = Attester(vm)
        self.table = vm.allocator.alloc(PAGES, private=False)
        vm.memory.write(self.table, bytes([FILL]) * (PAGES * PAGE_SIZE))
        self.offer(self.table, PAGES)
        self.attester.start()

    def offer(self, table: Gpa | int, pages: int) -> None:
        """Set the room that the guest's next request offers."""
        self.offered = int(table), pages

    def put(self, kind: MessageType = MessageType.REPORT_REQ, payload: bytes = b"") -> None:
        """Seal the next message, lay it before the guest and order it to ask."""
        message = Message(kind, payload or report_request(QUESTION), self.attester.sequence[0])
        self.attester.put(self.attester.seal(message))
        self.attester.begin("ask", *self.offered)

    def request(self) -> tuple[int, int]:
        """Ask for a report; return the error and the number of pages that the guest found."""
        self.put()
        return self.sent()

    def sent(self) -> tuple[int, int]:
        """Run the guest until it says how its request went."""
        return self.attester.agent.value(), self.vm.symbol("table_pages").u64

    def check_report(self) -> None:
        """Check that the response is the report that was asked for, and go on in the sequence."""
        answer = self.attester.answer()
        assert answer.sequence == self.attester.sequence[0] + 1
        assert from_response(answer.payload).report_data == QUESTION
        self.attester.sequence[0] += 2

    def found(self) -> bytes:
        """What lies in the room for the table."""
        return self.vm.memory.read(self.table, PAGES * PAGE_SIZE)


@with_exit
def test_certificates_come_with_the_report(make_vm: MakeVm) -> None:
    """The guest finds report and certificates; beyond the table its pages are as they were.

    GHCB specification, SNP Extended Guest Request; KVM_EXIT_SNP_REQ_CERTS.
    """
    table = cert_table.pack(CERTIFICATES)
    asker = Asker(make_vm(GUEST, protection=Snp(certificates=table)))
    assert asker.request() == (0, PAGES)
    asker.check_report()
    certificates = asker.found()
    assert cert_table.unpack(certificates) == CERTIFICATES
    assert certificates[len(table) :] == bytes([FILL]) * (PAGES * PAGE_SIZE - len(table))


@with_exit
@pytest.mark.parametrize("offered", [0, 1])
def test_too_few_pages(make_vm: MakeVm, offered: int) -> None:
    """The guest is told how many pages the table takes, and nothing was written or asked of the firmware."""
    asker = Asker(make_vm(GUEST, protection=Snp(certificates=cert_table.pack(CERTIFICATES))))
    asker.offer(asker.table, offered)
    assert asker.request() == (INVALID_LENGTH, 2)
    assert asker.found() == bytes([FILL]) * (PAGES * PAGE_SIZE)
    # The same sequence number is still the next one.
    asker.offer(asker.table, 2)
    assert asker.request() == (0, 2)
    asker.check_report()


@with_exit
def test_pages_that_the_host_cannot_write(make_vm: MakeVm) -> None:
    """A table in private memory or outside of memory is the hypervisor's error, and no report is made."""
    vm = make_vm(GUEST, protection=Snp(certificates=cert_table.pack(CERTIFICATES)))
    private = vm.allocator.alloc(PAGES)
    asker = Asker(vm)
    for table in (private, Gpa(1 << 38)):
        asker.offer(table, PAGES)
        assert asker.request() == (GENERIC, PAGES)
    asker.offer(asker.table, PAGES)
    assert asker.request() == (0, PAGES)
    asker.check_report()


@with_exit
@pytest.mark.parametrize(
    ("result", "answer"),
    [
        pytest.param(errno.ENOSPC, (INVALID_LENGTH, 77), id="ENOSPC"),
        pytest.param(errno.EAGAIN, (BUSY, PAGES), id="EAGAIN"),
        pytest.param(errno.EIO, (GENERIC, PAGES), id="EIO"),
    ],
)
def test_the_exit_and_its_errors(make_vm: MakeVm, result: int, answer: tuple[int, int]) -> None:
    """KVM_EXIT_SNP_REQ_CERTS has the guest's address and pages, and each result becomes its error.

    Documentation/virt/kvm/api.rst, KVM_EXIT_SNP_REQ_CERTS.
    """
    vm = make_vm(GUEST, protection=Snp(req_certs=True))
    asker = Asker(vm)
    asker.put()
    exit_ = vm.vcpus[0].run()
    assert isinstance(exit_, SnpReqCertsExit)
    assert (exit_.gpa, exit_.npages) == (int(asker.table), PAGES)
    assert exit_.run.snp_req_certs.ret == 0
    exit_.respond(result, 77)
    assert asker.sent() == answer
    # Nothing was asked of the firmware: the sequence number is still the next one.
    asker.put()
    assert isinstance(vm.vcpus[0].run(), SnpReqCertsExit)
    assert asker.sent() == (0, PAGES)
    asker.check_report()


@with_exit
@pytest.mark.parametrize("result", [errno.ENOMEM, 0xFFFF_FFFF_FFFF_FFFB])
def test_a_result_that_is_none(make_vm: MakeVm, result: int) -> None:
    """KVM_RUN fails with EINVAL after a result that KVM does not know."""
    vm = make_vm(GUEST, protection=Snp(req_certs=True))
    asker = Asker(vm)
    asker.put()
    exit_ = vm.vcpus[0].run()
    assert isinstance(exit_, SnpReqCertsExit)
    exit_.respond(result)
    with pytest.raises(GuestError) as caught:
        asker.sent()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EINVAL


@with_exit
def test_other_messages_do_not_exit(make_vm: MakeVm) -> None:
    """Certificates belong to reports: a key request goes to the firmware at once.

    GHCB specification, SNP Extended Guest Request.
    """
    asker = Asker(make_vm(GUEST, protection=Snp(req_certs=True)))
    asker.put(MessageType.KEY_REQ, bytes(32))
    assert asker.sent() == (0, PAGES)
    assert asker.attester.answer().type == MessageType.KEY_RSP
    assert asker.found() == bytes([FILL]) * (PAGES * PAGE_SIZE)


@pytest.mark.parametrize("pages", [0, 1, PAGES])
def test_without_certificates_the_table_is_empty(make_vm: MakeVm, pages: int) -> None:
    """Unless user space wants the exit, KVM writes the end of a table: 24 bytes of zeros, no more.

    GHCB specification, SNP Extended Guest Request.
    """
    asker = Asker(make_vm(GUEST, protection=Snp()))
    asker.offer(asker.table, pages)
    assert asker.request() == (0, pages)
    asker.check_report()
    zeros = 24 if pages else 0
    assert asker.found() == bytes(zeros) + bytes([FILL]) * (PAGES * PAGE_SIZE - zeros)


def test_a_table_that_is_not_aligned(make_vm: MakeVm) -> None:
    """An address within a page is malformed input, and no report is made."""
    asker = Asker(make_vm(GUEST, protection=Snp()))
    asker.offer(asker.table + 8, PAGES - 1)
    assert asker.request() == (MALFORMED, PAGES - 1)
    asker.offer(asker.table, PAGES)
    assert asker.request() == (0, PAGES)
    asker.check_report()
