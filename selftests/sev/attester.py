# SPDX-License-Identifier: Apache-2.0
"""A guest that carries sealed messages to the firmware, and the host's side that seals and opens them."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509

from kvmpy import PAGE_SIZE, GuestVm, Message, MessageType, Report
from kvmpy.coco.certificates import load
from kvmpy.coco.guest_message import report_request
from kvmpy.coco.report import from_response

CERTIFICATES_VARIABLE = "KVMPY_SNP_CERTIFICATES"
_SOFTWARE_CERTIFICATES = Path("/sys/kernel/debug/softsev")
KEYS = 4
_KEY_SIZE = 32

GUEST = """
#include <kvmpy/guest.h>
#include <kvmpy/sev.h>

/* SEV SNP Firmware ABI, secrets page: four VMPCKs of 32 bytes from offset 0x20 on. */
GUEST_SHARED u8 keys[4][32];

void guest_main(u64 request_gpa, u64 response_gpa)
{
	memcpy(keys, (void *)(KVMPY_SNP_SECRETS_GVA + 0x20), sizeof(keys));
	GUEST_SYNC(0);
	for (;;)
		GUEST_SYNC(snp_guest_request(request_gpa, response_gpa));
}
"""


class Attester:
    """Asks the firmware through the guest; the guest sees sealed bytes alone."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm
        request, response = (vm.alloc(PAGE_SIZE, private=False) for _ in range(2))
        self._request, self._response = vm.gva_to_gpa(request), vm.gva_to_gpa(response)
        vm.vcpus[0].set_entry("guest_main", int(self._request), int(self._response))
        self.sequence = [1] * KEYS
        self.keys: list[bytes] = []

    def start(self) -> None:
        """Launch the guest and take the keys that it hands out."""
        self._vm.launch()
        self._vm.vcpus[0].sync()
        raw = self._vm.symbol("keys").bytes
        self.keys = [raw[at : at + _KEY_SIZE] for at in range(0, KEYS * _KEY_SIZE, _KEY_SIZE)]

    def send(self, sealed: bytes) -> int:
        """Send what is in *sealed* and return the error: 0, or the firmware's in the lower half."""
        self.put(sealed)
        code = self._vm.vcpus[0].sync().args[0]
        return int(code)

    def put(self, sealed: bytes) -> None:
        """Lay *sealed* before the guest, and clear the response."""
        self._vm.memory.write(self._request, sealed.ljust(PAGE_SIZE, b"\0"))
        self._vm.memory.write(self._response, bytes(PAGE_SIZE))

    def answer(self, *, key: int = 0) -> Message:
        """Open the response."""
        return Message.open(self._vm.memory.read(self._response, PAGE_SIZE), self.keys[key])

    def ask(self, kind: MessageType, payload: bytes, *, key: int = 0) -> Message:
        """Send one message with VMPCK *key* and return the answer."""
        message = Message(kind, payload, self.sequence[key], vmpck=key)
        code = self.send(message.seal(self.keys[key]))
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
