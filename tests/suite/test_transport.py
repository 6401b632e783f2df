# SPDX-License-Identifier: Apache-2.0
"""When selftests of SEND and RECEIVE may give a packet to the firmware."""

from __future__ import annotations

import errno
from typing import cast

import pytest

from kvmpy.coco.kvm import Kvm
from kvmpy.core.errors import MissingError
from kvmpy.uapi.structs import sev_user_data_snp_status
from selftests.sev import transport


class Device:
    """/dev/sev of a platform whose SNP is in the state *state*, or that answers with an error."""

    state: int | Exception = 0

    def __enter__(self) -> Device:
        if isinstance(self.state, MissingError):
            raise self.state
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def snp_platform_status(self) -> sev_user_data_snp_status:
        """SNP_PLATFORM_STATUS."""
        if isinstance(self.state, Exception):
            raise self.state
        return sev_user_data_snp_status(state=self.state)


@pytest.mark.parametrize(
    ("state", "may"),
    [
        (1, False),
        (0, True),
        (OSError(errno.EIO, "no such command"), True),
        (MissingError("/dev/sev", "load ccp"), True),
    ],
    ids=["initialised", "not initialised", "no SNP in the firmware", "no device"],
)
def test_a_packet_is_for_a_platform_without_snp(
    monkeypatch: pytest.MonkeyPatch, state: int | Exception, may: bool
) -> None:
    """The firmware's own word counts: the parameter of kvm_amd says nothing of what ccp has initialised."""
    monkeypatch.setattr(transport, "SevDevice", Device)
    monkeypatch.setattr(Device, "state", state)
    why = transport.receives(cast(Kvm, None))
    assert (why is None) is may
    assert may or "sev=nosnp" in str(why)
