# SPDX-License-Identifier: Apache-2.0
"""The guest that seals messages with its VMPCKs: as OpenSSL does, and no key leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.coco.guest_message import Message, MessageError, MessageType, report_request
from kvmpy.core.address import PAGE_SIZE, Gva
from kvmpy.debug.record.events import Memory
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.recorder import Recorder
from kvmpy.testing.fixtures import MakeVm
from selftests.sev import attester
from selftests.sev.attester import KEYS, Attester

SECRETS_GVA = Gva(0x07FF3000)
# The firmware fills the secrets page; here the guest does, so that no host has written the keys.
FILLS = """
	for (int i = 0; i < 128; i++)
		((u8 *)KVMPY_SNP_SECRETS_GVA)[0x20 + i] = 0xa5 ^ i * 7;
	guest_agent();
"""
SECRETS = bytes(0xA5 ^ i * 7 & 0xFF for i in range(128))
VMPCKS = [SECRETS[at : at + 32] for at in range(0, 128, 32)]
MESSAGE = Message(MessageType.REPORT_REQ, report_request(bytes(range(64))), 0x0123_4567_89AB)


def started(make_vm: MakeVm) -> Attester:
    """Return an attester of a plain VM with a secrets page."""
    vm = make_vm(attester.GUEST.replace("\tguest_agent();\n", FILLS))
    vm.alloc(PAGE_SIZE, gva=SECRETS_GVA)
    environment = Attester(vm)
    environment.start()
    return environment


pytestmark = [pytest.mark.requires("kvm"), pytest.mark.protections("none")]


def test_the_guest_seals_as_the_firmware_expects(make_vm: MakeVm) -> None:
    asker = started(make_vm)
    assert asker.distinct_keys == KEYS
    for number, key in enumerate(VMPCKS):
        assert asker.seal(MESSAGE, key=number) == MESSAGE.seal(key)


def test_the_guest_opens_what_is_sealed_with_its_key_alone(make_vm: MakeVm) -> None:
    asker = started(make_vm)
    answer = Message(MessageType.REPORT_RSP, bytes(range(200)), 2)
    asker._vm.memory.write(asker._response, answer.seal(VMPCKS[1]))
    with pytest.raises(MessageError, match="not sealed with this key"):
        asker.answer(key=0)
    assert asker.answer(key=1) == answer


def test_no_key_is_in_shared_memory_or_in_a_record(make_vm: MakeVm, tmp_path: Path) -> None:
    with Recorder(tmp_path / "a.rec"):
        asker = started(make_vm)
        asker.seal(MESSAGE, key=3)
        vm = asker._vm
        shared = vm.gva_to_gpa(Gva(vm.symbol("guest_agent_orders").gva & ~(PAGE_SIZE - 1)))
        pages = [vm.memory.read(gpa, PAGE_SIZE) for gpa in (asker._request, asker._response, shared)]
        own = vm.memory.read(vm.gva_to_gpa(SECRETS_GVA), PAGE_SIZE)
    assert own[0x20:0xA0] == SECRETS  # they are where this test looks for them
    record = Record.load(tmp_path / "a.rec")
    kept = b"".join(entry.what.pack() for entry in record.entries)
    for entry in record.entries:
        if isinstance(entry.what, Memory):
            kept += b"".join(record.page(ident) for ident in entry.what.ids)
    assert MESSAGE.payload in kept
    for key in VMPCKS:
        assert key not in kept
        assert not any(key in page for page in pages)
