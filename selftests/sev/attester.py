# SPDX-License-Identifier: Apache-2.0
"""A guest that seals messages to the firmware and opens its answers, and the host's side that asks it."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509

from kvmpy import PAGE_SIZE, Agent, GuestVm, Message, MessageType, Report
from kvmpy.coco.certificates import load
from kvmpy.coco.guest_message import MessageError, report_request
from kvmpy.coco.report import from_response

CERTIFICATES_VARIABLE = "KVMPY_SNP_CERTIFICATES"
_SOFTWARE_CERTIFICATES = Path("/sys/kernel/debug/softsev")
KEYS = 4

# What guests with an attester have in common; the keys stay in their secrets page.
ATTESTS = """
#include <kvmpy/gcm.h>
#include <kvmpy/guest.h>
#include <kvmpy/sev.h>

/* SEV SNP Firmware ABI, secrets page: four VMPCKs of 32 bytes from offset 0x20 on. */
static const u8 *attester_key(u64 number)
{
	return (const u8 *)(KVMPY_SNP_SECRETS_GVA + 0x20 + 32 * number);
}

u64 attester_distinct_keys(void)
{
	u64 distinct = 0;

	for (u64 one = 0, other; one < 4; one++) {
		for (other = 0; other < one && memcmp(attester_key(one), attester_key(other), 32); other++)
			;
		distinct += other == one;
	}
	return distinct;
}

/*
 * Header of 0x60 bytes: tag, 16 bytes of nothing, sequence number (the IV's low
 * half), then from 0x30 on what is authenticated, with the payload's size at 0x36.
 */
u64 attester_crypt(u8 *page, u64 key, u64 open)
{
	u8 iv[12] = { 0 };
	u16 size;

	memcpy(iv, page + 0x20, 8);
	memcpy(&size, page + 0x36, 2);
	if (size > 4096 - 0x60)
		return false;
	if (open)
		return gcm_open(attester_key(key), iv, page + 0x30, 0x30, page + 0x60, size, page);
	gcm_seal(attester_key(key), iv, page + 0x30, 0x30, page + 0x60, size, page);
	return true;
}
"""

GUEST = (
    ATTESTS
    + """
u64 attester_send(u64 request_gpa, u64 response_gpa)
{
	return snp_guest_request(request_gpa, response_gpa);
}

void guest_main(void)
{
	guest_agent();
}
"""
)


class Attester:
    """Asks the firmware through the guest, which seals and opens: no key leaves it."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm
        self.agent = Agent(vm.vcpus[0])
        self._pages = [vm.alloc(PAGE_SIZE, private=False) for _ in range(2)]
        self._request, self._response = (vm.gva_to_gpa(page) for page in self._pages)
        self.sequence = [1] * KEYS
        self.distinct_keys = 0

    def start(self) -> None:
        """Launch the guest, which tells how many different keys it has."""
        self.agent.begin_call("attester_distinct_keys")
        self.distinct_keys = self.agent.value()

    def send(self, sealed: bytes) -> int:
        """Send what is in *sealed* and return the error: 0, or the firmware's in the lower half."""
        self.put(sealed)
        self.begin("attester_send")
        return self.agent.value()

    def begin(self, function: str, *arguments: int) -> None:
        """Order a request by a function of the guest: its first arguments are request and response."""
        self.agent.begin_call(function, int(self._request), int(self._response), *arguments)

    def put(self, sealed: bytes) -> None:
        """Lay *sealed* before the guest, and clear the response."""
        self._vm.memory.write(self._request, sealed.ljust(PAGE_SIZE, b"\0"))
        self._vm.memory.write(self._response, bytes(PAGE_SIZE))

    def _crypt(self, page: int, key: int, *, opened: bool) -> bool:
        self.agent.begin_call("attester_crypt", int(self._pages[page]), key, opened)
        return bool(self.agent.value())

    def seal(self, message: Message, *, key: int = 0) -> bytes:
        """Let the guest seal *message* with VMPCK *key*, and return header and ciphertext."""
        clear = message.clear()
        self._vm.memory.write(self._request, clear)
        assert self._crypt(0, key, opened=False)
        return self._vm.memory.read(self._request, len(clear))

    def answer(self, *, key: int = 0) -> Message:
        """Let the guest open the response with VMPCK *key*; MessageError where that is not its key."""
        if not self._crypt(1, key, opened=True):
            raise MessageError("the response is not sealed with this key")
        return Message.read(self._vm.memory.read(self._response, PAGE_SIZE))

    def ask(self, kind: MessageType, payload: bytes, *, key: int = 0) -> Message:
        """Send one message with VMPCK *key* and return the answer."""
        code = self.send(self.seal(Message(kind, payload, self.sequence[key], vmpck=key), key=key))
        assert code == 0, f"the request failed with {code:#x}"
        answer = self.answer(key=key)
        assert answer.sequence == self.sequence[key] + 1
        self.sequence[key] += 2
        return answer

    def report(self, report_data: bytes, *, vmpl: int = 0, key: int = 0, key_select: int = 0) -> Report:
        """Return an attestation report with *report_data*."""
        answer = self.ask(
            MessageType.REPORT_REQ, report_request(report_data, vmpl=vmpl, key_select=key_select), key=key
        )
        assert answer.type == MessageType.REPORT_RSP
        return from_response(answer.payload)


def certificates() -> list[x509.Certificate]:
    """Return the VCEK's chain: files named by $KVMPY_SNP_CERTIFICATES, or those of the software AMD-SP."""
    named = os.environ.get(CERTIFICATES_VARIABLE)
    if named:
        return load([Path(name).read_bytes() for name in named.split(":")])
    result = [_SOFTWARE_CERTIFICATES / f"{name}.der" for name in ("vcek", "root")]
    return load([path.read_bytes() for path in result]) if all(path.exists() for path in result) else []
