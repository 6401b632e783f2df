# SPDX-License-Identifier: Apache-2.0
"""SEND and RECEIVE: guest memory that leaves and enters in packets (SEV API, chapter 6).

The other platform is the test itself: it has the keys of the session and opens and seals packets.  Its
certificates need AMD's signature only where the policy has SEV, and the owner's only where it has DOMAIN:
sev_mcmd_send_start() in AMD-ASPFW.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from kvmpy import PAGE_SIZE, GuestOwner, SevPolicy, SevRet, kvm_sev_send_start, kvm_sev_send_update_data
from kvmpy.coco.sev_launch import GuestState, SevGuest
from selftests.sev.conftest import IN_PLACE, MEMORY, PAGES, Bare, BareMaker, start_sev
from selftests.sev.transport import (
    HEADER_SIZE,
    SESSION_SIZE,
    Packet,
    ReceiveStart,
    ReceiveUpdate,
    SendStart,
    SendUpdate,
    needs_receive_update,
    open_session,
)

EINVAL = (errno.EINVAL, 0)
TEXT = bytes(range(256)) * 16


def firmware(status: SevRet) -> tuple[int, int]:
    """Return how a command ends that the firmware refuses."""
    return errno.EIO, int(status)


def policy(kind: str, **more: bool) -> SevPolicy:
    """Return a policy of the kind."""
    return SevPolicy(es=kind == "sev-es", **more)


def running(bare: BareMaker, kind: str, **more: bool) -> Bare:
    """Return a guest with TEXT at the begin of its memory."""
    guest = bare(kind)
    guest.vm.memory.write(MEMORY, TEXT)
    start_sev(guest, policy(kind, **more)).update_data(MEMORY, PAGE_SIZE).measure().finish()
    return guest


def receiving(bare: BareMaker, kind: str) -> tuple[Bare, GuestOwner]:
    """Return a guest that packets go into, and their sender."""
    guest_vm, sender = bare(kind), GuestOwner()
    guest_vm.vm.sev.reg_region(guest_vm.hva, PAGES * PAGE_SIZE)
    assert guest_vm.raw("RECEIVE_START", ReceiveStart(sender, int(policy(kind)))) == (0, 0)
    return guest_vm, sender


# Sending.


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_packet_is_the_guests_memory(bare: BareMaker, kind: str) -> None:
    """What SEND_UPDATE_DATA seals opens with the session's keys, and is what the guest has there."""
    guest, target = running(bare, kind), GuestOwner()
    start = SendStart(target)
    assert guest.raw("SEND_START", start.arg) == (0, 0)
    assert start.arg.policy == int(policy(kind))
    keys = open_session(target, start.session)
    for offset, size in ((0, PAGE_SIZE), (16, 16), (PAGE_SIZE - 32, 32)):
        update = SendUpdate(guest.hva + offset, size)
        assert guest.raw("SEND_UPDATE_DATA", update.arg) == (0, 0)
        assert update.packet.sealed != TEXT[offset : offset + size]
        assert update.packet.open(*keys) == TEXT[offset : offset + size]


@pytest.mark.parametrize("kind", IN_PLACE)
def test_the_size_of_a_session(bare: BareMaker, kind: str) -> None:
    """SEND_START without a length tells it, with INVALID_LEN."""
    guest = running(bare, kind)
    arg = kvm_sev_send_start()
    assert guest.raw("SEND_START", arg) == firmware(SevRet.SEV_RET_INVALID_LEN)
    assert arg.session_len == SESSION_SIZE
    assert SevGuest(guest.vm).state == GuestState.RUNNING


@pytest.mark.parametrize("kind", IN_PLACE)
def test_the_size_of_a_header(bare: BareMaker, kind: str) -> None:
    """SEND_UPDATE_DATA without lengths tells that of the header, with INVALID_LEN."""
    guest = running(bare, kind)
    assert guest.raw("SEND_START", SendStart(GuestOwner())) == (0, 0)
    arg = kvm_sev_send_update_data()
    assert guest.raw("SEND_UPDATE_DATA", arg) == firmware(SevRet.SEV_RET_INVALID_LEN)
    assert arg.hdr_len == HEADER_SIZE


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_guest_that_must_stay(bare: BareMaker, kind: str) -> None:
    """A policy with NOSEND is refused by SEND_START: POLICY_FAILURE."""
    guest = running(bare, kind, no_send=True)
    assert guest.raw("SEND_START", SendStart(GuestOwner())) == firmware(SevRet.SEV_RET_POLICY_FAILURE)
    assert SevGuest(guest.vm).state == GuestState.RUNNING


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("missing", ["pdh_cert_uaddr", "pdh_cert_len", "session_uaddr"])
def test_send_start_without(bare: BareMaker, kind: str, missing: str) -> None:
    """SEND_START needs the other platform's certificate and a place for the session: EINVAL."""
    guest = running(bare, kind)
    start = SendStart(GuestOwner())
    setattr(start.arg, missing, 0)
    assert guest.raw("SEND_START", start.arg) == EINVAL


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_session_of_silly_size(bare: BareMaker, kind: str) -> None:
    """SEND_START into more than 16 KiB gives EINVAL."""
    guest = running(bare, kind)
    assert guest.raw("SEND_START", SendStart(GuestOwner(), 0x4001)) == EINVAL


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_certificate_that_is_none(bare: BareMaker, kind: str) -> None:
    """SEND_START to a platform whose certificate is none gives INVALID_CERTIFICATE."""
    guest = running(bare, kind)
    start = SendStart(GuestOwner())
    start.buffers["pdh"][0] ^= 0xFF
    assert guest.raw("SEND_START", start.arg) == firmware(SevRet.SEV_RET_INVALID_CERTIFICATE)


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(
    ("offset", "size"), [(0, PAGE_SIZE + 16), (16, PAGE_SIZE), (PAGE_SIZE - 16, 32)], ids=hex
)
def test_a_packet_of_two_pages(bare: BareMaker, kind: str, offset: int, size: int) -> None:
    """A packet is of one page: EINVAL beyond."""
    guest = running(bare, kind)
    assert guest.raw("SEND_START", SendStart(GuestOwner())) == (0, 0)
    assert guest.raw("SEND_UPDATE_DATA", SendUpdate(guest.hva + offset, size)) == EINVAL


# Where offset and length are added in 32 bits, the sum of these is within a page again.
WIDE = [(16, (1 << 32) - 16), (64, (1 << 32) - 48), (PAGE_SIZE - 16, (1 << 32) - 16), (0, 1 << 31)]


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("way", ["guest_len", "both"])
def test_lengths_of_gibibytes(bare: BareMaker, kind: str, way: str) -> None:
    """However long a packet is said to be, beyond a page it is EINVAL, and the firmware does not see it."""
    sender, receiver = running(bare, kind), receiving(bare, kind)
    guest, owner = receiver
    assert sender.raw("SEND_START", SendStart(GuestOwner())) == (0, 0)
    wrong = []
    for offset, size in WIDE:
        send = SendUpdate(sender.hva + offset, 16).arg
        receive = ReceiveUpdate(guest.hva + offset, Packet.seal(owner, TEXT[:16])).arg
        for name, arg, target in (("SEND", send, sender), ("RECEIVE", receive, guest)):
            arg.guest_len = size
            if way == "both":
                arg.trans_len = size
            answer = target.raw(f"{name}_UPDATE_DATA", arg)
            if answer != EINVAL:
                wrong.append(f"{name} of {size:#x} bytes at {offset:#x}: {answer}, expected {EINVAL}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(
    ("offset", "size", "status"),
    [(8, 16, SevRet.SEV_RET_INVALID_ADDRESS), (0, 24, SevRet.SEV_RET_INVALID_LEN)],
    ids=["address", "length"],
)
def test_a_packet_of_half_a_block(bare: BareMaker, kind: str, offset: int, size: int, status: SevRet) -> None:
    """Packets are whole blocks of 16 bytes: INVALID_ADDRESS or INVALID_LEN otherwise."""
    guest = running(bare, kind)
    assert guest.raw("SEND_START", SendStart(GuestOwner())) == (0, 0)
    assert guest.raw("SEND_UPDATE_DATA", SendUpdate(guest.hva + offset, size)) == firmware(status)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_packet_of_nothing(bare: BareMaker, kind: str) -> None:
    """A packet of no bytes, from nowhere or to nowhere gives EINVAL."""
    guest = running(bare, kind)
    assert guest.raw("SEND_START", SendStart(GuestOwner())) == (0, 0)
    for name in ("guest_uaddr", "guest_len", "hdr_uaddr", "trans_uaddr"):
        update = SendUpdate(guest.hva, 16)
        setattr(update.arg, name, 0)
        assert guest.raw("SEND_UPDATE_DATA", update.arg) == EINVAL, name


# Receiving.


@needs_receive_update
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_packet_arrives(bare: BareMaker, kind: str) -> None:
    """What the sender sealed is what the guest has, as DBG_DECRYPT shows it."""
    guest, sender = receiving(bare, kind)
    for offset, size in ((0, PAGE_SIZE), (PAGE_SIZE + 16, 16), (3 * PAGE_SIZE - 48, 48)):
        update = ReceiveUpdate(guest.hva + offset, Packet.seal(sender, TEXT[:size]))
        assert guest.raw("RECEIVE_UPDATE_DATA", update.arg) == (0, 0)
        assert SevGuest(guest.vm).dbg_decrypt(MEMORY + offset, size) == TEXT[:size]
    assert guest.raw("RECEIVE_FINISH") == (0, 0)


@needs_receive_update
@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("part", ["header", "sealed"])
def test_a_packet_that_was_changed(bare: BareMaker, kind: str, part: str) -> None:
    """A flipped bit anywhere in a packet is found: BAD_MEASUREMENT, and memory stays as it was."""
    guest, sender = receiving(bare, kind)
    right = Packet.seal(sender, TEXT[:64])
    bad = bytearray(getattr(right, part))
    bad[-1] ^= 1
    wrong = replace(right, **{part: bytes(bad)})
    assert guest.raw("RECEIVE_UPDATE_DATA", ReceiveUpdate(guest.hva, wrong)) == firmware(
        SevRet.SEV_RET_BAD_MEASUREMENT
    )
    assert SevGuest(guest.vm).dbg_decrypt(MEMORY, 64) != TEXT[:64]
    assert guest.raw("RECEIVE_UPDATE_DATA", ReceiveUpdate(guest.hva, right)) == (0, 0)


@needs_receive_update
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_packet_of_somebody_else(bare: BareMaker, kind: str) -> None:
    """A packet that was sealed with other keys gives BAD_MEASUREMENT."""
    guest, _ = receiving(bare, kind)
    packet = Packet.seal(GuestOwner(), TEXT[:64])
    assert guest.raw("RECEIVE_UPDATE_DATA", ReceiveUpdate(guest.hva, packet)) == firmware(
        SevRet.SEV_RET_BAD_MEASUREMENT
    )


@needs_receive_update
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_compressed_packet(bare: BareMaker, kind: str) -> None:
    """A flag for compression is refused with UNSUPPORTED where the firmware has none."""
    guest, sender = receiving(bare, kind)
    packet = Packet.seal(sender, TEXT[:64])
    packet = replace(packet, header=b"\x01" + packet.header[1:])
    _, status = guest.raw("RECEIVE_UPDATE_DATA", ReceiveUpdate(guest.hva, packet))
    assert status in (int(SevRet.SEV_RET_UNSUPPORTED), int(SevRet.SEV_RET_BAD_MEASUREMENT))


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(("offset", "size"), [(0, PAGE_SIZE + 16), (16, PAGE_SIZE)], ids=hex)
def test_a_packet_into_two_pages(bare: BareMaker, kind: str, offset: int, size: int) -> None:
    """A packet goes into one page: EINVAL beyond."""
    guest, sender = receiving(bare, kind)
    packet = Packet.seal(sender, (TEXT * 2)[:size])
    assert guest.raw("RECEIVE_UPDATE_DATA", ReceiveUpdate(guest.hva + offset, packet)) == EINVAL


@needs_receive_update
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_packet_that_is_too_short(bare: BareMaker, kind: str) -> None:
    """Less data or less header than there must be gives INVALID_LEN."""
    guest, sender = receiving(bare, kind)
    packet = Packet.seal(sender, TEXT[:64])
    short = replace(packet, header=packet.header[:-4])
    for update in (ReceiveUpdate(guest.hva, packet, size=80), ReceiveUpdate(guest.hva, short)):
        assert guest.raw("RECEIVE_UPDATE_DATA", update.arg) == firmware(SevRet.SEV_RET_INVALID_LEN)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_receive_without(bare: BareMaker, kind: str) -> None:
    """RECEIVE_START and RECEIVE_UPDATE_DATA need every pointer and length that they have: EINVAL."""
    guest, sender = bare(kind), GuestOwner()
    for name in ("pdh_uaddr", "pdh_len", "session_uaddr", "session_len"):
        start = ReceiveStart(sender, int(policy(kind)))
        setattr(start.arg, name, 0)
        assert guest.raw("RECEIVE_START", start.arg) == EINVAL, name
    assert guest.raw("RECEIVE_START", ReceiveStart(sender, int(policy(kind)))) == (0, 0)
    for name in ("hdr_uaddr", "hdr_len", "guest_uaddr", "guest_len", "trans_uaddr", "trans_len"):
        update = ReceiveUpdate(guest.hva, Packet.seal(sender, TEXT[:16]))
        setattr(update.arg, name, 0)
        assert guest.raw("RECEIVE_UPDATE_DATA", update.arg) == EINVAL, name


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_session_for_another_policy(bare: BareMaker, kind: str) -> None:
    """The session authenticates the policy: BAD_MEASUREMENT with another one, and no guest is left."""
    guest, sender = bare(kind), GuestOwner()
    start = ReceiveStart(sender, int(policy(kind)))
    start.arg.policy = int(policy(kind, no_debug=True))
    assert guest.raw("RECEIVE_START", start.arg) == firmware(SevRet.SEV_RET_BAD_MEASUREMENT)
    assert guest.raw("RECEIVE_START", ReceiveStart(sender, int(policy(kind)))) == (0, 0)


@needs_receive_update
@pytest.mark.parametrize("kind", IN_PLACE)
def test_there_and_back(bare: BareMaker, kind: str) -> None:
    """What one guest sends, another receives: the test carries the packets, and reseals none."""
    source, target = running(bare, kind), bare(kind)
    target.vm.sev.reg_region(target.hva, PAGES * PAGE_SIZE)
    middle = GuestOwner()
    start = SendStart(middle)
    assert source.raw("SEND_START", start.arg) == (0, 0)
    update = SendUpdate(source.hva, PAGE_SIZE)
    assert source.raw("SEND_UPDATE_DATA", update.arg) == (0, 0)
    assert source.raw("SEND_FINISH") == (0, 0)
    tek, tik = open_session(middle, start.session)
    carrier = GuestOwner(tek, tik, middle.dh_key)
    assert target.raw("RECEIVE_START", ReceiveStart(carrier, int(policy(kind)))) == (0, 0)
    assert target.raw("RECEIVE_UPDATE_DATA", ReceiveUpdate(target.hva, update.packet)) == (0, 0)
    assert target.raw("RECEIVE_FINISH") == (0, 0)
    assert SevGuest(target.vm).state == GuestState.RUNNING
    assert SevGuest(target.vm).dbg_decrypt(MEMORY, PAGE_SIZE) == TEXT
