# SPDX-License-Identifier: Apache-2.0
"""Protections ``sev`` and ``sev-es``: memory encrypted in place; with ES, registers too.

Private and shared pages lie in the same host memory, which the launch encrypts where pages are private.  What
the host reads there afterwards is ciphertext.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pyroaring import BitMap

from kvmpy.coco import ghcb, sev_host, sev_platform
from kvmpy.coco.policy import SevPolicy
from kvmpy.coco.sev_launch import SevInitialised, SevRunning
from kvmpy.core.address import PAGE_SHIFT, EncryptionBit, Gpa
from kvmpy.core.errors import MissingError, PrivateMemoryError
from kvmpy.core.kvm import Kvm
from kvmpy.guest import layout
from kvmpy.guest.errors import LaunchError
from kvmpy.guest.private import frame_runs
from kvmpy.guest.protection import Availability, Protection, Traits
from kvmpy.guest.vcpu import GuestVcpu
from kvmpy.guest.vm import GuestVm
from kvmpy.uapi.constants import VmType

_SOFTWARE = sev_platform.software_platform()
_LABEL = sev_platform.SOFTWARE if _SOFTWARE else ""


def encryption_bit(kvm: Kvm) -> EncryptionBit:
    """Return the C-bit as KVM_GET_SUPPORTED_CPUID has it; MissingError without SEV."""
    cpuid = sev_platform.sev_cpuid(kvm)
    if cpuid is None or not cpuid.c_bit:
        raise MissingError("CPUID 0x8000001F in KVM_GET_SUPPORTED_CPUID", "a KVM with SEV")
    return EncryptionBit(cpuid.c_bit, set_means_private=True)


def availability(kvm: Kvm, kind: VmType) -> Availability:
    """Tell whether *kvm* launches guests of this type."""
    host = sev_host.read(kvm)
    missing = sev_platform.missing_pieces(kvm, kind, host)
    return Availability(not missing, tuple(missing), note="" if missing else sev_platform.describe(kvm, host))


class _Pinned:
    """The pages that are registered: encryption depends on the physical address, so they must not move."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm
        self._frames = BitMap()

    def add(self, gpa: Gpa, size: int) -> None:
        """Register what is not registered yet of a range."""
        frames = BitMap()
        frames.add_range(gpa.gfn, gpa.gfn + (size >> PAGE_SHIFT))
        ends = [segment.gpa.gfn for segment in self._vm.memory.segments()]
        for start, length in frame_runs(frames - self._frames, ends):
            self._vm.sev.reg_region(self._vm.memory.hva(start, private=False), length)
        self._frames |= frames

    def convert(self, gpa: Gpa, size: int, private: bool, discard: bool) -> None:
        """Pin what becomes private; KVM has nothing to convert."""
        if discard and not private:
            raise PrivateMemoryError(
                f"gpa {gpa}, {size:#x} bytes is encrypted in place: the host clears none"
            )
        if private:
            self.add(gpa, size)


class Sev(Protection):
    """SEV: encrypted memory, registers in plaintext.

    *policy* and the owner's *dh_certificate* and *session* go into LAUNCH_START.  Without a session the
    launch is given one of kvmpy's own, and LaunchError says when it measures anything else than was
    predicted; a platform that does not export its key gives a warning in its place.  *compare* False leaves
    that out.
    """

    name = "sev"
    vm_type = int(VmType.KVM_X86_SEV_VM)
    label = _LABEL
    traits = Traits(
        has_encryption_bit=True,
        has_private_memory=True,
        host_sees_private=False,
        emulator_reads_private=False,
        really_encrypts=not _SOFTWARE,
        policies=("all",),
        emulated=_SOFTWARE,
    )
    es: ClassVar[bool] = False

    def __init__(
        self,
        policy: SevPolicy | int | None = None,
        *,
        vmsa_features: int = 0,
        ghcb_version: int = 0,
        dh_certificate: bytes = b"",
        session: bytes = b"",
        compare: bool = True,
    ) -> None:
        self.policy = SevPolicy(es=self.es) if policy is None else policy
        self.vmsa_features = vmsa_features
        self.ghcb_version = ghcb_version
        self.dh_certificate = dh_certificate
        self.session = session
        self.compare = compare and not session

    @classmethod
    def availability(cls, kvm: Kvm) -> Availability:
        """Needs the VM type, /dev/sev and a firmware that answers."""
        return availability(kvm, VmType(cls.vm_type))

    def about_vcpu(self, vm: GuestVm, vcpu: GuestVcpu) -> Iterator[str]:
        """What the vCPU's GHCB holds."""
        return ghcb.about(vm, vcpu)

    def encryption_bit(self, kvm: Kvm) -> EncryptionBit:
        """The C-bit."""
        return encryption_bit(kvm)

    def created(self, vm: GuestVm) -> None:
        """Make it an SEV guest (KVM_SEV_INIT2)."""
        vm.launch_state = SevInitialised.init2(
            vm, es=self.es, vmsa_features=self.vmsa_features, ghcb_version=self.ghcb_version
        )

    def launch(self, vm: GuestVm) -> None:
        """Encrypt and measure the private pages, with ES the vCPUs, and let the guest run."""
        from kvmpy.coco.sev_prediction import PredictedLaunch

        state = vm.launch_state
        if not isinstance(state, SevInitialised):
            raise LaunchError(f"{vm.name} is in state {type(state).__name__}, not ready to launch")
        predicted = PredictedLaunch.of(int(self.policy)) if self.compare else None
        launching = state.start(
            self.policy,
            dh_certificate=predicted.dh_certificate if predicted else self.dh_certificate,
            session=predicted.session if predicted else self.session,
        )
        vm.launch_state = launching
        pinned = _Pinned(vm)
        for gpa, size in vm.private.image():
            pinned.add(gpa, size)
            if predicted:
                predicted.digest.add(vm.memory.view(gpa, size))
            launching.update_data(gpa, size)
        if self.es:
            if predicted:
                predicted.add_vcpus(vm, self.vmsa_features)
            launching.update_vmsa()
        measured = launching.measure()
        vm.launch_state = measured
        if predicted:
            try:
                predicted.check(measured.measurement)
            except ValueError as error:
                raise LaunchError(f"{vm.name}: {error}") from None
        vm.launch_state = measured.finish()
        vm.memory.convert = pinned.convert


class SevEs(Sev):
    """SEV-ES: encrypted memory and registers; the guest talks through its GHCB."""

    name = "sev-es"
    vm_type = int(VmType.KVM_X86_SEV_ES_VM)
    traits = Traits(
        has_encryption_bit=True,
        has_private_memory=True,
        can_read_registers=False,
        host_sees_private=False,
        emulator_reads_private=False,
        has_ghcb=True,
        readonly_slots=False,
        really_encrypts=not _SOFTWARE,
        policies=("all",),
        emulated=_SOFTWARE,
    )
    es = True
    guest_sev = layout.SEV_ES


def running(vm: GuestVm) -> SevRunning:
    """Return the launched SEV or SEV-ES guest of *vm*: status, debugging, attestation report."""
    state = vm.launch_state
    if not isinstance(state, SevRunning):
        raise LaunchError(f"{vm.name} is not a launched SEV guest: {type(state).__name__}")
    return state


__all__ = ["Sev", "SevEs", "availability", "encryption_bit", "running"]
