# SPDX-License-Identifier: Apache-2.0
"""The launch of SEV and SEV-ES guests: INIT2, LAUNCH_START, UPDATE_DATA, UPDATE_VMSA, MEASURE, FINISH.

Documentation/virt/kvm/x86/amd-memory-encryption.rst in Linux; SEV API, chapters 6 and 7.  Firmware states:
LUPDATE (:class:`SevLaunching`), LSECRET (:class:`SevMeasured`), RUNNING (:class:`SevRunning`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum

from kvmpy.coco.launch_state import LaunchState
from kvmpy.coco.policy import SevPolicy
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.backing import Anonymous, Mapping
from kvmpy.core.vm import Vm
from kvmpy.uapi import ffi
from kvmpy.uapi.constants import SevRet
from kvmpy.uapi.structs import (
    kvm_sev_attestation_report,
    kvm_sev_dbg,
    kvm_sev_guest_status,
    kvm_sev_init,
    kvm_sev_launch_measure,
    kvm_sev_launch_secret,
    kvm_sev_launch_start,
    kvm_sev_launch_update_data,
)

UPDATE_ALIGNMENT = 16
DBG_BLOCK = 16
MEASUREMENT_SIZE = 48


class GuestState(IntEnum):
    """``state`` of GUEST_STATUS (SEV API, table 43)."""

    UNINIT = 0
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3
    SUPDATE = 4
    RUPDATE = 5
    SENT = 6


@dataclass(frozen=True)
class Measurement:
    """What LAUNCH_MEASURE returns: the HMAC-SHA256 *mac* and the *nonce* (``mnonce``) that went into it."""

    mac: bytes
    nonce: bytes


def _address(buffer: object) -> int:
    return int(ffi.cast("uintptr_t", buffer))


def _in_pages(gpa: Gpa, size: int) -> Iterator[tuple[Gpa, int]]:
    while size > 0:
        part = min(size, PAGE_SIZE - int(gpa) % PAGE_SIZE)
        yield gpa, part
        gpa, size = gpa + part, size - part


class SevGuest(LaunchState):
    """What every state of an SEV or SEV-ES guest can do."""

    def status(self) -> kvm_sev_guest_status:
        """Return handle, policy and firmware state (KVM_SEV_GUEST_STATUS)."""
        arg = kvm_sev_guest_status()
        self.vm.sev.command("GUEST_STATUS", arg)
        return arg

    @property
    def state(self) -> GuestState:
        """The firmware's state of the guest."""
        return GuestState(self.status().state)

    def dbg_decrypt(self, gpa: Gpa, size: int) -> bytes:
        """Return *size* bytes of private memory at *gpa* in clear (KVM_SEV_DBG_DECRYPT).

        Firmware status POLICY_FAILURE where the policy forbids debugging.
        """
        with closing(Anonymous().map(PAGE_SIZE)) as page:
            return b"".join(
                bytes(self._dbg("DBG_DECRYPT", page, offset, part)) for offset, part in _in_pages(gpa, size)
            )

    def dbg_encrypt(self, gpa: Gpa, data: bytes) -> None:
        """Write *data* into private memory at *gpa* (KVM_SEV_DBG_ENCRYPT).

        What stands beside it in a block of 16 bytes is read first and written back.
        """
        done = 0
        with closing(Anonymous().map(PAGE_SIZE)) as page:
            for position, part in _in_pages(gpa, len(data)):
                if int(position) % DBG_BLOCK or part % DBG_BLOCK:
                    self._dbg("DBG_DECRYPT", page, position, part)
                page.look(int(position) % PAGE_SIZE, part)[:] = data[done : done + part]
                self._dbg("DBG_ENCRYPT", page, position, part)
                done += part

    def _dbg(self, command: str, page: Mapping, gpa: Gpa, size: int) -> memoryview:
        # Before Linux 7.2 (78ee2d50185a) sev_dbg_crypt() ends a step where the source's page ends, whatever
        # is left of the target's: so the host's bytes lie in their page as the guest's do, a command is of
        # one page, and of whole blocks, which KVM hands on as they are.
        start = int(gpa) // DBG_BLOCK * DBG_BLOCK
        length = -(-(int(gpa) + size) // DBG_BLOCK) * DBG_BLOCK - start
        guest = self.vm.memory.hva(Gpa(start), private=False)
        host = page.hva + start % PAGE_SIZE
        source, target = (guest, host) if command == "DBG_DECRYPT" else (host, guest)
        # lifetime: `page` is the caller's, and guest memory the VM's, until the command is done.
        self.vm.sev.command(
            command, kvm_sev_dbg(src_uaddr=source, dst_uaddr=target, len=length), gpa=int(gpa)
        )
        return page.look(int(gpa) % PAGE_SIZE, size)

    def attestation_report(self, nonce: bytes) -> bytes:
        """Return the firmware's report of the guest, made with a *nonce* of 16 bytes.

        KVM_SEV_GET_ATTESTATION_REPORT.
        """
        if len(nonce) != 16:
            raise ValueError(f"the nonce has 16 bytes, not {len(nonce)}")
        arg = kvm_sev_attestation_report(mnonce=list(nonce))
        asked = self.vm.sev.command_raw("GET_ATTESTATION_REPORT", arg)
        if asked.firmware not in (0, SevRet.SEV_RET_INVALID_LEN) or not arg.len:
            raise self.vm.sev.error("GET_ATTESTATION_REPORT", asked, arg)
        place = ffi.new("uint8_t[]", int(arg.len))
        # lifetime: `place` lives until the bytes are copied out.
        arg.uaddr = _address(place)
        self.vm.sev.command("GET_ATTESTATION_REPORT", arg)
        return bytes(ffi.buffer(place, int(arg.len)))


class SevInitialised(SevGuest):
    """KVM_SEV_INIT2 (or INIT, ES_INIT) is done: the VM has an ASID and no vCPU yet, or none launched."""

    def __init__(self, vm: Vm, *, es: bool) -> None:
        super().__init__(vm)
        self.es = es

    @classmethod
    def init2(
        cls, vm: Vm, *, es: bool, vmsa_features: int = 0, ghcb_version: int = 0, flags: int = 0
    ) -> SevInitialised:
        """Prepare a VM of type SEV or SEV-ES; before its vCPUs (KVM_SEV_INIT2).

        *vmsa_features*: those that KVM_X86_SEV_VMSA_FEATURES offers.  *ghcb_version* 0 leaves it to KVM.
        """
        arg = kvm_sev_init(vmsa_features=vmsa_features, ghcb_version=ghcb_version, flags=flags)
        vm.sev.command("INIT2", arg)
        return cls(vm, es=es)

    @classmethod
    def legacy_init(cls, vm: Vm, *, es: bool) -> SevInitialised:
        """Make a default VM (type 0) an SEV or SEV-ES guest (KVM_SEV_INIT, KVM_SEV_ES_INIT)."""
        vm.sev.command("ES_INIT" if es else "INIT")
        return cls(vm, es=es)

    def start(
        self,
        policy: SevPolicy | int,
        *,
        dh_certificate: bytes = b"",
        session: bytes = b"",
        handle: int = 0,
    ) -> SevLaunching:
        """Begin the launch (KVM_SEV_LAUNCH_START).

        *dh_certificate* and *session* are the guest owner's, made against the platform's PDH key; without
        them nobody outside the firmware knows the key of the measurement.
        """
        self._check("start()")
        # lifetime: both buffers live until the command is done.
        dh, blob = bytearray(dh_certificate), bytearray(session)
        arg = kvm_sev_launch_start(handle=handle, policy=int(policy))
        if dh:
            arg.dh_uaddr, arg.dh_len = _address(ffi.from_buffer(dh)), len(dh)
        if blob:
            arg.session_uaddr, arg.session_len = _address(ffi.from_buffer(blob)), len(blob)
        self.vm.sev.command("LAUNCH_START", arg)
        self._leave("start()")
        return SevLaunching(self.vm, es=self.es, handle=int(arg.handle))


class SevLaunching(SevGuest):
    """LAUNCH_START is done: memory and, for SEV-ES, vCPUs go in."""

    def __init__(self, vm: Vm, *, es: bool, handle: int) -> None:
        super().__init__(vm)
        self.es = es
        self.handle = handle

    def update_data(self, gpa: Gpa, size: int) -> SevLaunching:
        """Encrypt and measure *size* bytes of guest memory in place (KVM_SEV_LAUNCH_UPDATE_DATA).

        Both multiples of 16.  The pages must not move from now on: register the region first.
        """
        self._check("update_data()")
        if int(gpa) % UPDATE_ALIGNMENT or size % UPDATE_ALIGNMENT:
            raise ValueError(f"gpa {int(gpa):#x}, size {size:#x}: both are multiples of {UPDATE_ALIGNMENT}")
        hva = self.vm.memory.hva(gpa, private=False)
        self.vm.sev.command(
            "LAUNCH_UPDATE_DATA", kvm_sev_launch_update_data(uaddr=hva, len=size), gpa=int(gpa)
        )
        return self

    def update_vmsa(self) -> SevLaunching:
        """Encrypt and measure the state of all vCPUs (KVM_SEV_LAUNCH_UPDATE_VMSA; SEV-ES).

        KVM refuses registers to the host from now on.
        """
        self._check("update_vmsa()")
        self.vm.sev.command("LAUNCH_UPDATE_VMSA")
        return self

    def measure(self) -> SevMeasured:
        """Read the measurement, which ends the updates (KVM_SEV_LAUNCH_MEASURE)."""
        self._check("measure()")
        # lifetime: `place` lives until the bytes are copied out.
        place = ffi.new("uint8_t[]", MEASUREMENT_SIZE)
        arg = kvm_sev_launch_measure(uaddr=_address(place), len=MEASUREMENT_SIZE)
        self.vm.sev.command("LAUNCH_MEASURE", arg)
        raw = bytes(ffi.buffer(place, MEASUREMENT_SIZE))
        self._leave("measure()")
        return SevMeasured(self.vm, es=self.es, measurement=Measurement(raw[:32], raw[32:]))

    def measurement_size(self) -> int:
        """Return how many bytes a measurement takes, without taking one."""
        arg = kvm_sev_launch_measure()
        result = self.vm.sev.command_raw("LAUNCH_MEASURE", arg)
        if result.firmware != SevRet.SEV_RET_INVALID_LEN:
            raise self.vm.sev.error("LAUNCH_MEASURE", result, arg)
        return int(arg.len)


class SevMeasured(SevGuest):
    """LAUNCH_MEASURE is done: the owner may compare, inject secrets, and let the guest run."""

    def __init__(self, vm: Vm, *, es: bool, measurement: Measurement) -> None:
        super().__init__(vm)
        self.es = es
        self.measurement = measurement

    def secret(self, gpa: Gpa, header: bytes, data: bytes) -> SevMeasured:
        """Inject a secret of the guest owner at *gpa* (KVM_SEV_LAUNCH_SECRET).

        *data* is encrypted with the TEK, *header* authenticates it with the TIK (SEV API, section 6.6).
        """
        self._check("secret()")
        # lifetime: both buffers live until the command is done.
        head, body = bytearray(header), bytearray(data)
        arg = kvm_sev_launch_secret(
            hdr_uaddr=_address(ffi.from_buffer(head)),
            hdr_len=len(head),
            guest_uaddr=self.vm.memory.hva(gpa, private=False),
            guest_len=len(body),
            trans_uaddr=_address(ffi.from_buffer(body)),
            trans_len=len(body),
        )
        self.vm.sev.command("LAUNCH_SECRET", arg, gpa=int(gpa))
        return self

    def finish(self) -> SevRunning:
        """End the launch: the guest may run (KVM_SEV_LAUNCH_FINISH)."""
        self._check("finish()")
        self.vm.sev.command("LAUNCH_FINISH")
        self._leave("finish()")
        return SevRunning(self.vm, es=self.es, measurement=self.measurement)


class SevRunning(SevGuest):
    """The guest may run."""

    def __init__(self, vm: Vm, *, es: bool, measurement: Measurement) -> None:
        super().__init__(vm)
        self.es = es
        self.measurement = measurement


__all__ = [
    "GuestState",
    "Measurement",
    "SevInitialised",
    "SevLaunching",
    "SevMeasured",
    "SevRunning",
]
