# SPDX-License-Identifier: Apache-2.0
"""Which fixes the running kernel is known to have: what decides whether a dangerous test is one here.

A fix cannot be probed where its absence is what harms.  So a kernel is known to have one by its version, as
the stable history tells it; a distribution's kernel that took the fix under an older version is not known to.
Pure: no KVM, no pytest.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from kvmpy.testing.errata import kernel_in_range


@dataclass(frozen=True)
class Fix:
    """A fix of Linux: *commit* and *title* upstream, what happens *without* it, which *kernels* have it.

    Each of *kernels* is a range as errata conditions have them.
    """

    commit: str
    title: str
    without: str
    kernels: tuple[str, ...]

    def known(self, release: str | None = None) -> bool:
        """Whether a kernel of this *release*, the running one by default, is known to have the fix."""
        here = os.uname().release if release is None else release
        candidate = re.match(r"(\d+\.\d+)(?:\.0)?-rc", here)
        # Which candidate of the first release was the first to have it is not known.
        if candidate is not None and candidate[1] in self.versions.split(", "):
            return False
        return any(kernel_in_range(here, wanted) for wanted in self.kernels)

    @property
    def versions(self) -> str:
        """The first version of each series that has it, such as ``7.2, 7.1.3``."""
        return ", ".join(wanted.partition(",")[0].removeprefix(">=") for wanted in self.kernels)


_VMSA = (">=7.1", ">=7.0.1,<7.1", ">=6.19.14,<6.20", ">=6.18.24,<6.19")
FIXES = {
    "sev-dbg-page": Fix(
        "78ee2d50185a",
        "KVM: SVM: Fix page overflow in sev_dbg_crypt() for ENCRYPT path",
        "DBG_ENCRYPT and DBG_DECRYPT into a page that ends before the source's write into the next one",
        (">=7.2", ">=7.1.3,<7.2", ">=6.18.38,<6.19", ">=6.12.95,<6.13"),
    ),
    "snp-finish-twice": Fix(
        "9b9f7962e3e8",
        "KVM: SEV: Reject attempts to sync VMSA of an already-launched/encrypted vCPU",
        "a second SNP_LAUNCH_FINISH makes the host write a VMSA that is the guest's: the kernel faults",
        (*_VMSA, ">=6.12.83,<6.13"),
    ),
    "snp-finish-race": Fix(
        "cb923ee6a80f",
        "KVM: SEV: Lock all vCPUs when synchronzing VMSAs for SNP launch finish (CVE-2026-31591)",
        "a vCPU that is changed or run during SNP_LAUNCH_FINISH can crash the host",
        _VMSA,
    ),
    "sev-region-race": Fix(
        "b6408b6cec5d",
        "KVM: SEV: Protect *all* of sev_mem_enc_register_region() with kvm->lock (CVE-2026-31592)",
        "KVM_MEMORY_ENCRYPT_REG_REGION beside a KVM_SEV_INIT2 that fails uses what was never set up",
        _VMSA,
    ),
}
