# SPDX-License-Identifier: Apache-2.0
"""The digest of an SNP launch before it happens, in a signed ID block: the firmware itself compares.

A launch whose digest is another one fails with SEV_RET_BAD_MEASUREMENT, so a guest that runs is a guest whose
measurement was predicted; no question to the guest is needed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvmpy.coco.snp_launch import IdBlockPair
from kvmpy.core.address import PAGE_SIZE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from kvmpy.coco.snp import SnpPlan
    from kvmpy.coco.snp_digest import SnpDigest
    from kvmpy.guest.vm import GuestVm


def predict_digest(vm: GuestVm, plan: SnpPlan) -> SnpDigest:
    """Return the digest that *plan* ends with, vCPUs included; before LAUNCH_FINISH protects their state."""
    from kvmpy.coco import vmsa_prediction
    from kvmpy.coco.snp_digest import PageType, SnpDigest

    digest = SnpDigest()
    for part in plan.pages:
        kind = PageType(int(part.page_type))
        if kind is PageType.NORMAL:
            digest.add(kind, int(part.gpa), part.source)
        else:
            digest.add(kind, int(part.gpa), pages=part.size // PAGE_SIZE)
    for vcpu in vm.vcpus:
        digest.add_vmsa(vmsa_prediction.predict(vcpu, plan.vmsa_features, snp=True))
    return digest


@functools.lru_cache(maxsize=1)
def process_key() -> ec.EllipticCurvePrivateKey:
    """Return the ID key of this process: it authenticates nobody, it makes the firmware compare."""
    from kvmpy.coco.idblock import generate_key

    return generate_key()


def predicted_id_block(vm: GuestVm, plan: SnpPlan) -> IdBlockPair:
    """Return an ID block with the predicted digest, signed with :func:`process_key`."""
    from kvmpy.coco.idblock import IdBlock

    block = IdBlock(predict_digest(vm, plan).value, plan.policy)
    auth = block.sign(process_key())
    return IdBlockPair(block.to_bytes(), auth.to_bytes(), auth.author_key_enabled)
