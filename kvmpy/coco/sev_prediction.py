# SPDX-License-Identifier: Apache-2.0
"""The measurement of an SEV or SEV-ES launch, predicted: a session of kvmpy's own, and the digest beside it.

LAUNCH_MEASURE answers with an HMAC whose key is known to the firmware and to whoever made the session. So a
launch that is to be compared is one of kvmpy's own owner (:class:`~kvmpy.coco.sev_session.GuestOwner`).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from kvmpy.coco import vmsa_prediction
from kvmpy.coco.sev_session import GuestOwner, LaunchDigest
from kvmpy.core.errors import KvmError, MissingError
from kvmpy.core.sev_device import PlatformStatus, SevDevice

if TYPE_CHECKING:
    from kvmpy.coco.sev_launch import Measurement
    from kvmpy.guest.vm import GuestVm


class PredictedLaunch:
    """One launch that is going to be compared: its session, and the digest of what goes in."""

    def __init__(self, pdh: bytes, firmware: PlatformStatus, policy: int) -> None:
        self.owner = GuestOwner()
        self.policy = policy
        self.digest = LaunchDigest()
        self.session = self.owner.session(pdh, policy)
        self.dh_certificate = self.owner.certificate()
        self._firmware = (firmware.api_major, firmware.api_minor, firmware.build)

    @classmethod
    def of(cls, policy: int) -> PredictedLaunch | None:
        """Ask the platform for its key; None, with a warning, when it gives none, or none to this user."""
        try:
            with SevDevice() as device:
                pdh, _ = device.pdh_cert_export()
                return cls(pdh, device.platform_status(), policy)
        except (KvmError, MissingError) as error:
            because = str(error).splitlines()[0]
            warnings.warn(f"the launch is compared with no prediction: {because}", stacklevel=2)
            return None

    def add_vcpus(self, vm: GuestVm, vmsa_features: int) -> None:
        """Add the save areas of all vCPUs, in the order in which KVM encrypts them; before it does."""
        for vcpu in vm.vcpus:
            self.digest.add(vmsa_prediction.predict(vcpu, vmsa_features))

    def check(self, measurement: Measurement) -> None:
        """Compare LAUNCH_MEASURE's answer; raises ValueError with both values when they differ."""
        self.owner.check_measurement(
            measurement.mac + measurement.nonce, self.digest.value, self._firmware, self.policy
        )
