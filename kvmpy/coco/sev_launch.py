# SPDX-License-Identifier: Apache-2.0
"""The launch of SEV and SEV-ES guests: INIT2, LAUNCH_START, UPDATE_DATA, UPDATE_VMSA, MEASURE, FINISH.

Documentation/virt/kvm/x86/amd-memory-encryption.rst in Linux; SEV API, chapters 6 and 7.  Firmware states:
LUPDATE (:class:`SevLaunching`), LSECRET (:class:`SevMeasured`), RUNNING (:class:`SevRunning`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kvmpy.coco.launch_state import LaunchState
from kvmpy.coco.policy import SevPolicy
from kvmpy.core.address import Gpa
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


class SevGuest(LaunchState):
    """What every state of an SEV or SEV-ES guest can do."""

    def status(self) -> kvm_sev_guest_status:
        """Return handle, policy and firmware state (KVM_SEV_GUEST_STATUS)."""
        arg = kvm_sev_guest_status()
        self.vm.sev_command("GUEST_STATUS", arg)
        return arg

    @property
    def state(self) -> GuestState:
        """The firmware's state of the guest."""
        return GuestState(self.status().state)

    def dbg_decrypt(self, gpa: Gpa, size: int) -> bytes:
        """Return *size* bytes of private memory at *gpa* in clear (KVM_SEV_DBG_DECRYPT).

        Firmware status POLICY_FAILURE where the policy forbids debugging.
        """
        place = ffi.new("uint8_t[]", size)
        # lifetime: `place` lives until the bytes are copied out; guest memory belongs to the VM.
        arg = kvm_sev_dbg(
            src_uaddr=self.vm.memory.hva(gpa, private=False), dst_uaddr=_address(place), len=size
        )
        self.vm.sev_command("DBG_DECRYPT", arg, gpa=int(gpa))
        return bytes(ffi.buffer(place, size))

    def dbg_encrypt(self, gpa: Gpa, data: bytes) -> None:
        """Write *data* into private memory at *gpa* (KVM_SEV_DBG_ENCRYPT)."""
        # lifetime: `place` lives until the command is done.
        place = ffi.from_buffer("uint8_t[]", bytearray(data), require_writable=True)
        arg = kvm_sev_dbg(
            src_uaddr=_address(place), dst_uaddr=self.vm.memory.hva(gpa, private=False), len=len(data)
        )
        self.vm.sev_command("DBG_ENCRYPT", arg, gpa=int(gpa))

    def attestation_report(self, nonce: bytes) -> bytes:
        """Return the firmware's report of the guest, made with a *nonce* of 16 bytes.

        KVM_SEV_GET_ATTESTATION_REPORT.
        """
        if len(nonce) != 16:
            raise ValueError(f"the nonce has 16 bytes, not {len(nonce)}")
        arg = kvm_sev_attestation_report(mnonce=list(nonce))
        asked = self.vm.sev_command_raw("GET_ATTESTATION_REPORT", arg)
        if asked.firmware not in (0, SevRet.SEV_RET_INVALID_LEN) or not arg.len:
            raise self.vm.sev_error("GET_ATTESTATION_REPORT", asked, arg)
        place = ffi.new("uint8_t[]", int(arg.len))
        # lifetime: `place` lives until the bytes are copied out.
        arg.uaddr = _address(place)
        self.vm.sev_command("GET_ATTESTATION_REPORT", arg)
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
        vm.sev_command("INIT2", arg)
        return cls(vm, es=es)

    @classmethod
    def legacy_init(cls, vm: Vm, *, es: bool) -> SevInitialised:
        """Make a default VM (type 0) an SEV or SEV-ES guest (KVM_SEV_INIT, KVM_SEV_ES_INIT)."""
        vm.sev_command("ES_INIT" if es else "INIT")
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
        self.vm.sev_command("LAUNCH_START", arg)
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
        self.vm.sev_command(
            "LAUNCH_UPDATE_DATA", kvm_sev_launch_update_data(uaddr=hva, len=size), gpa=int(gpa)
        )
        return self

    def update_vmsa(self) -> SevLaunching:
        """Encrypt and measure the state of all vCPUs (KVM_SEV_LAUNCH_UPDATE_VMSA; SEV-ES).

        KVM refuses registers to the host from now on.
        """
        self._check("update_vmsa()")
        self.vm.sev_command("LAUNCH_UPDATE_VMSA")
        return self

    def measure(self) -> SevMeasured:
        """Read the measurement, which ends the updates (KVM_SEV_LAUNCH_MEASURE)."""
        self._check("measure()")
        # lifetime: `place` lives until the bytes are copied out.
        place = ffi.new("uint8_t[]", MEASUREMENT_SIZE)
        arg = kvm_sev_launch_measure(uaddr=_address(place), len=MEASUREMENT_SIZE)
        self.vm.sev_command("LAUNCH_MEASURE", arg)
        raw = bytes(ffi.buffer(place, MEASUREMENT_SIZE))
        self._leave("measure()")
        return SevMeasured(self.vm, es=self.es, measurement=Measurement(raw[:32], raw[32:]))

    def measurement_size(self) -> int:
        """Return how many bytes a measurement takes, without taking one."""
        arg = kvm_sev_launch_measure()
        result = self.vm.sev_command_raw("LAUNCH_MEASURE", arg)
        if result.firmware != SevRet.SEV_RET_INVALID_LEN:
            raise self.vm.sev_error("LAUNCH_MEASURE", result, arg)
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
        self.vm.sev_command("LAUNCH_SECRET", arg, gpa=int(gpa))
        return self

    def finish(self) -> SevRunning:
        """End the launch: the guest may run (KVM_SEV_LAUNCH_FINISH)."""
        self._check("finish()")
        self.vm.sev_command("LAUNCH_FINISH")
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
