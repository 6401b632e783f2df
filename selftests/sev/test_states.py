# SPDX-License-Identifier: Apache-2.0
"""Which command the firmware takes in which state of an SEV or SEV-ES guest (SEV API, chapter 5 and 6).

Their order of checks is the firmware's (AMD-ASPFW); sev_mcmd_attestation() takes SUPDATE and SENT, too.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kvmpy import (
    PAGE_SIZE,
    GuestOwner,
    SevPolicy,
    SevRet,
    Struct,
    kvm_sev_attestation_report,
    kvm_sev_dbg,
    kvm_sev_guest_status,
    kvm_sev_launch_measure,
    kvm_sev_launch_secret,
    kvm_sev_launch_start,
    kvm_sev_launch_update_data,
)
from kvmpy.coco.sev_launch import GuestState, SevGuest, SevInitialised, SevLaunching
from kvmpy.uapi import ffi
from selftests.sev.conftest import IN_PLACE, MEMORY, PAGES, Bare, BareMaker
from selftests.sev.transport import Argument, ReceiveStart, SendStart, SendUpdate, platform_key

OK = (0, 0)
WRONG_STATE = (errno.EIO, int(SevRet.SEV_RET_INVALID_GUEST_STATE))
ASID_OWNED = (errno.EIO, int(SevRet.SEV_RET_ASID_OWNED))
# Of the guest that a VM has not got yet, KVM does not know the firmware's file descriptor either.
NO_GUEST = (errno.EBADF, 0)
SECRET = b"sixteen bytes ok"


@dataclass
class Guest:
    """A bare VM with one vCPU under SEV-ES, and the owner of its keys."""

    made: Bare
    owner: GuestOwner
    measurement: bytes = bytes(48)

    @property
    def policy(self) -> int:
        """What it is launched with."""
        return int(SevPolicy(es=self.made.kind == "sev-es"))

    @property
    def state(self) -> GuestState:
        """Where the firmware says that it is."""
        return SevGuest(self.made.vm).state

    def issue(self, command: str) -> tuple[int, int]:
        """Issue *command* with an argument that is right in itself."""
        arg = ARGUMENTS[command](self)
        outcome = self.made.raw(command, arg.arg if isinstance(arg, Argument) else arg)
        if command == "LAUNCH_MEASURE" and outcome == OK:
            self.measurement = bytes(BUFFER[:48])
        return outcome

    def go(self, state: GuestState) -> None:
        """Bring it into *state*."""
        for command in WAYS[state]:
            assert self.issue(command) == OK, command
        assert self.state == state


# A page of its own: what is debugged into it ends in it.
BUFFER = mmap.mmap(-1, PAGE_SIZE)


def buffer() -> int:
    """Return where answers go."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(BUFFER)))


def measure(_: Guest) -> Struct:
    """Return the argument of LAUNCH_MEASURE."""
    return kvm_sev_launch_measure(uaddr=buffer(), len=48)


class Secret(Argument):
    """A secret that is sealed for the guest's last measurement."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        header, data = guest.owner.secret(SECRET, guest.measurement)
        self.arg = kvm_sev_launch_secret(
            hdr_uaddr=self.place("header", header),
            hdr_len=len(header),
            guest_uaddr=guest.made.hva,
            guest_len=len(data),
            trans_uaddr=self.place("sealed", data),
            trans_len=len(data),
        )


class Start(Argument):
    """LAUNCH_START with the owner's session."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        pdh, _ = platform_key()
        certificate = guest.owner.certificate()
        session = guest.owner.session(pdh, guest.policy)
        self.arg = kvm_sev_launch_start(
            policy=guest.policy,
            dh_uaddr=self.place("dh", certificate),
            dh_len=len(certificate),
            session_uaddr=self.place("session", session),
            session_len=len(session),
        )


# RECEIVE_UPDATE_DATA is not among them: see needs_receive_update.
ARGUMENTS: dict[str, Callable[[Guest], Struct | Argument | None]] = {
    "LAUNCH_START": Start,
    "LAUNCH_UPDATE_DATA": lambda g: kvm_sev_launch_update_data(uaddr=g.made.hva, len=PAGE_SIZE),
    "LAUNCH_MEASURE": measure,
    "LAUNCH_SECRET": Secret,
    "LAUNCH_FINISH": lambda _: None,
    "GUEST_STATUS": lambda _: kvm_sev_guest_status(),
    "DBG_DECRYPT": lambda g: kvm_sev_dbg(src_uaddr=g.made.hva, dst_uaddr=buffer(), len=16),
    "DBG_ENCRYPT": lambda g: kvm_sev_dbg(src_uaddr=buffer(), dst_uaddr=g.made.hva + 64, len=16),
    "GET_ATTESTATION_REPORT": lambda _: kvm_sev_attestation_report(uaddr=buffer(), len=0x600),
    "SEND_START": lambda g: SendStart(g.owner),
    "SEND_UPDATE_DATA": lambda g: SendUpdate(g.made.hva, 16),
    "SEND_FINISH": lambda _: None,
    "SEND_CANCEL": lambda _: None,
    "RECEIVE_START": lambda g: ReceiveStart(g.owner, g.policy),
    "RECEIVE_FINISH": lambda _: None,
}
ANYWHERE = ("GUEST_STATUS", "DBG_DECRYPT", "DBG_ENCRYPT")
# How to come into a state, by commands.
WAYS: dict[GuestState, tuple[str, ...]] = {
    GuestState.LUPDATE: ("LAUNCH_START",),
    GuestState.LSECRET: ("LAUNCH_START", "LAUNCH_UPDATE_DATA", "LAUNCH_MEASURE"),
    GuestState.RUNNING: ("LAUNCH_START", "LAUNCH_UPDATE_DATA", "LAUNCH_MEASURE", "LAUNCH_FINISH"),
    GuestState.RUPDATE: ("RECEIVE_START",),
}
WAYS[GuestState.SUPDATE] = (*WAYS[GuestState.RUNNING], "SEND_START")
WAYS[GuestState.SENT] = (*WAYS[GuestState.SUPDATE], "SEND_FINISH")
# What is taken in a state, and the state behind it.
TAKEN: dict[GuestState, dict[str, GuestState]] = {
    GuestState.LUPDATE: {"LAUNCH_UPDATE_DATA": GuestState.LUPDATE, "LAUNCH_MEASURE": GuestState.LSECRET},
    GuestState.LSECRET: {
        "LAUNCH_SECRET": GuestState.LSECRET,
        "GET_ATTESTATION_REPORT": GuestState.LSECRET,
        "LAUNCH_FINISH": GuestState.RUNNING,
    },
    GuestState.RUNNING: {"GET_ATTESTATION_REPORT": GuestState.RUNNING, "SEND_START": GuestState.SUPDATE},
    GuestState.SUPDATE: {
        "GET_ATTESTATION_REPORT": GuestState.SUPDATE,
        "SEND_UPDATE_DATA": GuestState.SUPDATE,
        "SEND_FINISH": GuestState.SENT,
        "SEND_CANCEL": GuestState.RUNNING,
    },
    GuestState.SENT: {"GET_ATTESTATION_REPORT": GuestState.SENT},
    GuestState.RUPDATE: {"RECEIVE_FINISH": GuestState.RUNNING},
}


def in_state(bare: BareMaker, kind: str, state: GuestState) -> Guest:
    """Return a guest that the firmware has in *state*."""
    guest_vm = bare(kind)
    guest_vm.vm.sev.reg_region(guest_vm.hva, PAGES * PAGE_SIZE)
    guest = Guest(guest_vm, GuestOwner())
    guest.go(state)
    return guest


def states(*, but: tuple[GuestState, ...] = ()) -> list[Any]:
    """Return the states as parameters."""
    return [pytest.param(state, id=state.name) for state in WAYS if state not in but]


TRANSITIONS = [
    pytest.param(state, command, id=f"{state.name}-{command}")
    for state, taken in TAKEN.items()
    for command in taken
]


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("state", states())
def test_what_is_refused(bare: BareMaker, kind: str, state: GuestState) -> None:
    """In each state every other command is refused with INVALID_GUEST_STATE, and the state stays.

    A second START finds the VM's ASID taken by the first guest: ASID_OWNED.
    """
    guest = in_state(bare, kind, state)
    expected = {
        command: ASID_OWNED if command in ("LAUNCH_START", "RECEIVE_START") else WRONG_STATE
        for command in ARGUMENTS
        if command not in TAKEN[state] and command not in ANYWHERE
    }
    assert {command: guest.issue(command) for command in expected} == expected
    assert guest.state == state


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(("state", "command"), TRANSITIONS)
def test_what_is_taken(bare: BareMaker, kind: str, state: GuestState, command: str) -> None:
    """In each state the commands that belong there are taken, and lead where the API says."""
    guest = in_state(bare, kind, state)
    assert guest.issue(command) == OK
    assert guest.state == TAKEN[state][command]


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("state", states())
def test_what_is_taken_anywhere(bare: BareMaker, kind: str, state: GuestState) -> None:
    """Status and debugging, which the policy allows here, change no state and are refused in none."""
    guest = in_state(bare, kind, state)
    assert {command: guest.issue(command) for command in ANYWHERE} == dict.fromkeys(ANYWHERE, OK)
    assert guest.state == state


@pytest.mark.parametrize("kind", IN_PLACE)
def test_before_there_is_a_guest(bare: BareMaker, kind: str) -> None:
    """Between INIT2 and a START there is no guest: every command gives EBADF, and a launch can begin."""
    guest_vm = bare(kind)
    guest_vm.vm.sev.reg_region(guest_vm.hva, PAGES * PAGE_SIZE)
    guest = Guest(guest_vm, GuestOwner())
    expected = {
        command: NO_GUEST for command in ARGUMENTS if command not in ("LAUNCH_START", "RECEIVE_START")
    }
    assert {command: guest.issue(command) for command in expected} == expected
    assert guest.issue("LAUNCH_START") == OK


@pytest.mark.requires("protection:sev-es")
@pytest.mark.parametrize("state", states(but=(GuestState.LUPDATE,)))
def test_vmsa_outside_its_state(bare: BareMaker, state: GuestState) -> None:
    """LAUNCH_UPDATE_VMSA belongs to LUPDATE: INVALID_GUEST_STATE in every other."""
    guest_vm = bare("sev-es", vcpus=1)
    guest_vm.vm.sev.reg_region(guest_vm.hva, PAGES * PAGE_SIZE)
    guest = Guest(guest_vm, GuestOwner())
    guest.go(state)
    assert guest_vm.raw("LAUNCH_UPDATE_VMSA") == WRONG_STATE


@pytest.mark.parametrize("kind", IN_PLACE)
def test_states_of_the_chain(bare: BareMaker, kind: str) -> None:
    """A failed START leaves the VM where it can start again."""
    guest_vm = bare(kind)
    guest = Guest(guest_vm, GuestOwner())
    assert isinstance(guest_vm.state, SevInitialised)
    wrong = guest.owner.session(platform_key()[0], guest.policy ^ 1)
    arg = ReceiveStart(guest.owner, guest.policy, session=wrong)
    assert guest_vm.raw("RECEIVE_START", arg.arg) == (errno.EIO, int(SevRet.SEV_RET_BAD_MEASUREMENT))
    launching = guest_vm.state.start(guest.policy)
    assert isinstance(launching, SevLaunching)
    assert launching.state == GuestState.LUPDATE
    assert launching.update_data(MEMORY, 16).measure().finish().state == GuestState.RUNNING
