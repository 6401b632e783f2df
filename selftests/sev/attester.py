# SPDX-License-Identifier: Apache-2.0
"""A guest that seals messages to the firmware and opens its answers, and the host's side that asks it."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509

from kvmpy import PAGE_SIZE, GuestVm, Message, MessageType, Report
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

enum { SEND, SEAL, OPEN };
GUEST_SHARED u64 asked, vmpck;

/* SEV SNP Firmware ABI, secrets page: four VMPCKs of 32 bytes from offset 0x20 on. */
static const u8 *attester_key(u64 number)
{
	return (const u8 *)(KVMPY_SNP_SECRETS_GVA + 0x20 + 32 * number);
}

static u64 attester_distinct_keys(void)
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
static bool attester_crypt(u8 *page)
{
	u8 iv[12] = { 0 };
	u16 size;

	memcpy(iv, page + 0x20, 8);
	memcpy(&size, page + 0x36, 2);
	if (size > 4096 - 0x60)
		return false;
	if (asked == OPEN)
		return gcm_open(attester_key(vmpck), iv, page + 0x30, 0x30, page + 0x60, size, page);
	gcm_seal(attester_key(vmpck), iv, page + 0x30, 0x30, page + 0x60, size, page);
	return true;
}

/* Do what is asked until that is to send. */
static void attester_serve(u8 *request, u8 *response)
{
	while (asked != SEND)
		GUEST_SYNC(attester_crypt(asked == SEAL ? request : response));
}
"""

GUEST = (
    ATTESTS
    + """
void guest_main(u64 request_gpa, u64 response_gpa, u8 *request, u8 *response)
{
	GUEST_SYNC(attester_distinct_keys());
	for (;;) {
		attester_serve(request, response);
		GUEST_SYNC(snp_guest_request(request_gpa, response_gpa));
	}
}
"""
)
_SEND, _SEAL, _OPEN = range(3)


class Attester:
    """Asks the firmware through the guest, which seals and opens: no key leaves it."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm
        pages = [vm.alloc(PAGE_SIZE, private=False) for _ in range(2)]
        self._request, self._response = (vm.gva_to_gpa(page) for page in pages)
        vm.vcpus[0].set_entry("guest_main", int(self._request), int(self._response), *map(int, pages))
        self.sequence = [1] * KEYS
        self.distinct_keys = 0

    def start(self) -> None:
        """Launch the guest, which tells how many different keys it has."""
        self._vm.launch()
        self.distinct_keys = int(self._vm.vcpus[0].sync().args[0])

    def send(self, sealed: bytes) -> int:
        """Send what is in *sealed* and return the error: 0, or the firmware's in the lower half."""
        self.put(sealed)
        code = self._vm.vcpus[0].sync().args[0]
        return int(code)

    def put(self, sealed: bytes) -> None:
        """Lay *sealed* before the guest, and clear the response."""
        self._vm.memory.write(self._request, sealed.ljust(PAGE_SIZE, b"\0"))
        self._vm.memory.write(self._response, bytes(PAGE_SIZE))

    def _crypt(self, what: int, key: int) -> bool:
        self._vm.symbol("asked").u64, self._vm.symbol("vmpck").u64 = what, key
        done = self._vm.vcpus[0].sync().args[0]
        self._vm.symbol("asked").u64 = _SEND
        return bool(done)

    def seal(self, message: Message, *, key: int = 0) -> bytes:
        """Let the guest seal *message* with VMPCK *key*, and return header and ciphertext."""
        clear = message.clear()
        self._vm.memory.write(self._request, clear)
        assert self._crypt(_SEAL, key)
        return self._vm.memory.read(self._request, len(clear))

    def answer(self, *, key: int = 0) -> Message:
        """Let the guest open the response with VMPCK *key*; MessageError where that is not its key."""
        if not self._crypt(_OPEN, key):
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
    found = [_SOFTWARE_CERTIFICATES / f"{name}.der" for name in ("vcek", "root")]
    return load([path.read_bytes() for path in found]) if all(path.exists() for path in found) else []
