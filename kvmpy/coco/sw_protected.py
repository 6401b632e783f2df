# SPDX-License-Identifier: Apache-2.0
"""Protection ``sw-protected``: KVM_X86_SW_PROTECTED_VM, private memory in a guest_memfd on any hardware.

Nothing is encrypted and registers stay readable, but private pages are really out of the host's reach: the
guest_memfd behind them cannot be mapped.  So host writes cannot initialise them either, and :meth:`launch`
lets the guest do it.
"""

from __future__ import annotations

from kvmpy.coco.copy_in import copy_in
from kvmpy.coco.fd_backed import FdBackedProtection
from kvmpy.core.errors import MissingError
from kvmpy.core.kernel import ModuleParameters, config_hint, kernel_config
from kvmpy.core.kvm import Kvm
from kvmpy.guest.errors import LaunchError
from kvmpy.guest.protection import Availability, Traits
from kvmpy.guest.vm import GuestVm
from kvmpy.uapi.constants import VmType

OPTION = "KVM_SW_PROTECTED_VM"


def _how() -> str:
    ways = []
    if kernel_config(OPTION) != "y":
        ways.append(f"{config_hint(OPTION)} (needs CONFIG_EXPERT, no distribution sets it)")
    if ModuleParameters("kvm").get("tdp_mmu", "Y") != "Y":
        ways.append("kvm.tdp_mmu=Y (this kernel: N)")
    if not ways:
        ways.append("a vendor module with two-dimensional paging (kvm_amd with NPT, kvm_intel with EPT)")
    return f"{' and '.join(ways)}; or `kvmpy lab run`, which brings such a kernel"


class SoftwareProtected(FdBackedProtection):
    """A KVM_X86_SW_PROTECTED_VM.

    KVM's instruction emulator reads guest memory through its shared view, so the default policy is
    ``"data"``: with policy ``"all"`` every instruction that KVM emulates ends in KVM_EXIT_INTERNAL_ERROR.
    """

    name = "sw-protected"
    vm_type = int(VmType.KVM_X86_SW_PROTECTED_VM)
    traits = Traits(
        has_private_memory=True,
        host_sees_private=False,
        private_is_fd_backed=True,
        emulator_reads_private=False,
        policies=("data", "all"),
    )

    @classmethod
    def availability(cls, kvm: Kvm) -> Availability:
        """Needs the VM type, guest_memfd and private memory attributes."""
        missing = []
        if cls.vm_type not in kvm.vm_types():
            missing.append(MissingError("VM type KVM_X86_SW_PROTECTED_VM (KVM_CAP_VM_TYPES bit 1)", _how()))
        missing += cls.missing_capabilities(kvm, _how())
        return Availability(not missing, tuple(missing), note="nothing is encrypted")

    def launch(self, vm: GuestVm) -> None:
        """Make the private pages private in KVM and let a vCPU copy the staged image into them."""
        self.make_private(vm)
        image = vm.private.image()
        if image:
            if not vm.vcpus:
                raise LaunchError(f"{vm.name}: only a vCPU can bring the image into private memory: vcpus=1")
            copy_in(vm, vm.vcpus[0], image)
        self.drop_staging(vm)
