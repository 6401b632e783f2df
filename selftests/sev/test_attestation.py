# SPDX-License-Identifier: Apache-2.0
"""Attestation: a report fetched through the guest proves what was launched, and by whom."""

from __future__ import annotations

import struct

import pytest

from kvmpy import GuestVm, IdBlock, MakeVm, Message, MessageType, SevRet, Snp, SnpPolicy
from kvmpy.coco import idblock
from kvmpy.coco.certificates import Chain
from kvmpy.coco.guest_message import report_request
from kvmpy.coco.report import ReportError, SigningKey, from_response
from kvmpy.coco.snp import SnpPlan, running
from kvmpy.coco.snp_launch import IdBlockPair
from kvmpy.coco.snp_prediction import predict_digest, process_key
from selftests.sev.attester import CERTIFICATES_VARIABLE, GUEST, KEYS, Attester, certificates

pytestmark = pytest.mark.protections("snp")

QUESTION = bytes(range(64))
HOST_DATA = bytes(range(32, 64))


def attester(make_vm: MakeVm, protection: Snp | None = None) -> Attester:
    attester_vm = Attester(make_vm(GUEST, protection=protection))
    attester_vm.start()
    return attester_vm


def test_the_report_says_what_was_launched(make_vm: MakeVm) -> None:
    """Measurement, policy, host data, report data and VMPL of a report are those of this launch and request.

    SNP Firmware ABI, 7.3 (ATTESTATION_REPORT).
    """
    vm = make_vm(GUEST, protection=Snp(policy=SnpPolicy(debug=True), host_data=HOST_DATA))
    asker = Attester(vm)
    asker.start()
    block = running(vm).id_block
    assert block is not None
    asker.report(QUESTION).expect(
        {
            "measurement": IdBlock.from_bytes(block.block).launch_digest,
            "policy": int(SnpPolicy(debug=True)),
            "host_data": HOST_DATA,
            "report_data": QUESTION,
            "vmpl": 0,
        }
    )


def test_the_report_says_who_signed_the_id_block(make_vm: MakeVm) -> None:
    """Identity, version and the digests of both keys are those of the ID block.

    SNP Firmware ABI, 8.18 and 7.3.
    """
    author = idblock.generate_key()

    def signed(vm: GuestVm, plan: SnpPlan) -> IdBlockPair:
        block = IdBlock(predict_digest(vm, plan).value, plan.policy, b"F" * 16, b"I" * 16, guest_svn=7)
        auth = block.sign(process_key(), author)
        return IdBlockPair(block.to_bytes(), auth.to_bytes(), auth.author_key_enabled)

    report = attester(make_vm, Snp(id_block=signed)).report(QUESTION)
    report.expect(
        {
            "family_id": b"F" * 16,
            "image_id": b"I" * 16,
            "guest_svn": 7,
            "id_key_digest": idblock.key_digest(idblock.encode_public_key(process_key().public_key())),
            "author_key_digest": idblock.key_digest(idblock.encode_public_key(author.public_key())),
        }
    )
    assert report.author_key_enabled


def test_without_an_id_block_nobody_is_named(make_vm: MakeVm) -> None:
    """A launch without an ID block has zeros for its identity and for the keys.

    SNP Firmware ABI, 7.3.
    """
    report = attester(make_vm, Snp(id_block=None)).report(QUESTION)
    report.expect({"family_id": bytes(16), "id_key_digest": bytes(48), "author_key_digest": bytes(48)})
    assert not report.author_key_enabled


def test_the_signature_is_that_of_the_platform(make_vm: MakeVm) -> None:
    """The report verifies with the platform's certificates up to their root, and a changed one does not.

    SNP Firmware ABI, 7.3 (SIGNATURE); VCEK certificate and KDS interface specification.
    """
    given = certificates()
    if not given:
        pytest.skip(f"no certificates of this platform: name VCEK, ASK and ARK in {CERTIFICATES_VARIABLE}")
    chain = Chain.of(given)
    report = attester(make_vm).report(QUESTION, key_select=1)
    assert report.signing_key is SigningKey.VCEK
    chain.verify_report(report)
    changed = bytearray(report.data)
    changed[0x50] ^= 1
    with pytest.raises(ReportError, match="the signature is not that of this report"):
        chain.verify_report(type(report)(bytes(changed)))


def test_two_questions_of_one_guest_have_one_report_id(make_vm: MakeVm) -> None:
    """A guest keeps its report ID, and another guest has another one.

    SNP Firmware ABI, 7.3 (REPORT_ID).
    """
    asker = attester(make_vm)
    first, second = asker.report(b"one"), asker.report(b"two")
    assert first.field("report_id") == second.field("report_id")
    assert first.report_data != second.report_data
    assert attester(make_vm).report(b"one").field("report_id") != first.field("report_id")


def test_every_key_seals(make_vm: MakeVm) -> None:
    """Each of the four VMPCKs has a sequence of its own and asks for its VMPL.

    SNP Firmware ABI, 8.26 (SNP_GUEST_REQUEST) and 7.1 (message sequence numbers).
    """
    asker = attester(make_vm)
    assert asker.distinct_keys == KEYS
    for key in range(KEYS):
        assert asker.report(QUESTION, vmpl=key, key=key).vmpl == key
    assert asker.report(QUESTION, vmpl=3, key=0).vmpl == 3


@pytest.mark.parametrize("vmpl", [4, 0xFFFFFFFF])
def test_a_vmpl_that_does_not_exist_is_taken(make_vm: MakeVm, vmpl: int) -> None:
    """The report names the VMPL that was asked for, above 3 as well: the firmware compares it with the key's.

    snp_mcmd_guest_request() of AMD's firmware: the VMPL must not be below the number of the VMPCK, no more.
    """
    assert attester(make_vm).report(QUESTION, vmpl=vmpl).vmpl == vmpl


@pytest.mark.parametrize("vmpl", [4, 0xFFFFFFFF])
def test_a_key_for_a_vmpl_that_does_not_exist(make_vm: MakeVm, vmpl: int) -> None:
    """MSG_KEY_REQ takes such a VMPL, too, and the key is another one than that of VMPL 3.

    snp_mcmd_guest_request() of AMD's firmware.
    """
    asker = attester(make_vm)
    keys = set()
    for number in (3, vmpl):
        answer = asker.ask(MessageType.KEY_REQ, struct.pack("<IIQIIQ", 0, 0, 0, number, 0, 0))
        assert int.from_bytes(answer.payload[:4], "little") == 0
        keys.add(answer.payload[32:64])
    assert len(keys) == 2


def test_a_less_privileged_key_cannot_speak_for_more(make_vm: MakeVm) -> None:
    """VMPCK1 gets no report for VMPL0.

    SNP Firmware ABI, 7.3: the VMPL must be at least the number of the VMPCK.
    """
    asker = attester(make_vm)
    answer = asker.ask(MessageType.REPORT_REQ, report_request(QUESTION, vmpl=0), key=1)
    with pytest.raises(ReportError, match="status 0x16"):
        from_response(answer.payload)


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ("key", SevRet.SEV_RET_BAD_MEASUREMENT),
        ("sequence", SevRet.SEV_RET_AEAD_OFLOW),
        ("tag", SevRet.SEV_RET_BAD_MEASUREMENT),
        ("size", SevRet.SEV_RET_INVALID_PARAM),
    ],
)
def test_a_message_that_is_not_the_guests_next_one_is_refused(
    make_vm: MakeVm, wrong: str, status: SevRet
) -> None:
    """A wrong key, a repeated number, a changed message or half a block fails; the next right one succeeds.

    SNP Firmware ABI, 8.26; GHCB specification, 4.1.7 (the firmware's error is in SW_EXITINFO2);
    snp_mcmd_guest_request() of AMD's firmware.
    """
    asker = attester(make_vm)
    asker.report(QUESTION)
    sequence = asker.sequence[0] - (2 if wrong == "sequence" else 0)
    question = report_request(QUESTION) + (b"\0" if wrong == "size" else b"")
    message = Message(MessageType.REPORT_REQ, question, sequence)
    sealed = bytearray(message.seal(bytes(32)) if wrong == "key" else asker.seal(message))
    if wrong == "tag":
        sealed[0] ^= 1
    assert asker.send(bytes(sealed)) & 0xFFFFFFFF == status
    asker.report(QUESTION)
