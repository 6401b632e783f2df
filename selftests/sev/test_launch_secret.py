# SPDX-License-Identifier: Apache-2.0
"""LAUNCH_SECRET: what the owner of an SEV or SEV-ES guest puts into it, and packets that are refused.

SEV API, 6.6 (LAUNCH_SECRET); Documentation/virt/kvm/x86/amd-memory-encryption.rst, KVM_SEV_LAUNCH_SECRET.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace

import pytest

from kvmpy import PAGE_SIZE, GuestOwner, MakeVm, Sev, SevEs, SevPolicy, SevRet, kvm_sev_launch_secret
from kvmpy.coco.sev_launch import GuestState, SevGuest, SevInitialised, SevMeasured, SevRunning
from kvmpy.coco.sev_session import SECRET_HEADER_SIZE
from selftests.sev.conftest import IN_PLACE, MEMORY, Bare, BareMaker
from selftests.sev.transport import Argument, platform_key

EINVAL = (errno.EINVAL, 0)
TEXT = bytes(range(256)) * 16
LIMIT = 16 << 10


def firmware(status: SevRet) -> tuple[int, int]:
    """Return how a command ends that the firmware refuses."""
    return errno.EIO, int(status)


class Secret(Argument):
    """LAUNCH_SECRET of a packet to *size* bytes at the host address *guest*."""

    arg: kvm_sev_launch_secret

    def __init__(self, guest: int, header: bytes, sealed: bytes, size: int | None = None) -> None:
        super().__init__()
        self.arg = kvm_sev_launch_secret(
            hdr_uaddr=self.place("header", header),
            hdr_len=len(header),
            guest_uaddr=guest,
            guest_len=len(sealed) if size is None else size,
            trans_uaddr=self.place("sealed", sealed),
            trans_len=len(sealed),
        )


@dataclass
class Waiting:
    """A guest that waits for its secret, and its owner."""

    made: Bare
    owner: GuestOwner
    measured: SevMeasured

    def seal(self, data: bytes, *, owner: GuestOwner | None = None) -> tuple[bytes, bytes]:
        """Return header and sealed data for this launch."""
        measurement = self.measured.measurement
        return (owner or self.owner).secret(data, measurement.mac + measurement.nonce)

    def inject(self, offset: int, header: bytes, sealed: bytes, size: int | None = None) -> tuple[int, int]:
        """Issue LAUNCH_SECRET for *offset* in the guest's memory."""
        return self.made.raw("LAUNCH_SECRET", Secret(self.made.hva + offset, header, sealed, size))

    def look(self, offset: int, size: int) -> bytes:
        """Return what the guest has at *offset*."""
        return SevGuest(self.made.vm).dbg_decrypt(MEMORY + offset, size)


def waiting(bare: BareMaker, kind: str, *, registered: bool = True) -> Waiting:
    """Return a guest with TEXT at the begin of its memory, measured."""
    guest_vm, owner = bare(kind), GuestOwner()
    guest_vm.vm.memory.write(MEMORY, TEXT)
    policy = SevPolicy(es=kind == "sev-es")
    assert isinstance(guest_vm.state, SevInitialised)
    launching = guest_vm.state.start(
        policy, dh_certificate=owner.certificate(), session=owner.session(platform_key()[0], int(policy))
    )
    if registered:
        guest_vm.vm.sev.reg_region(guest_vm.hva, 4 * PAGE_SIZE)
    measured = launching.update_data(MEMORY, PAGE_SIZE).measure()
    assert measured.state == GuestState.LSECRET
    return Waiting(guest_vm, owner, measured)


# What arrives.

GUEST = """
#include <kvmpy/guest.h>

void guest_main(const u64 *secret, u64 words)
{
	for (u64 at = 0; at < words; at++)
		GUEST_SYNC(secret[at]);
}
"""


@pytest.mark.protections("sev", "sev-es")
def test_the_guest_reads_its_secret(make_vm: MakeVm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest finds the owner's plain text at the address of the secret, and its neighbours as they were.

    SEV API, 6.6: the secret is decrypted with the TEK and encrypted with the guest's own key.
    """
    owner, secret = GuestOwner(), bytes(range(0x21, 0x41))
    kind = {"sev": Sev, "sev-es": SevEs}[make_vm.protection]
    policy = SevPolicy(es=kind.es)
    protection = kind(
        policy, dh_certificate=owner.certificate(), session=owner.session(platform_key()[0], int(policy))
    )
    vm = make_vm(GUEST, protection=protection)
    gva = vm.alloc(PAGE_SIZE)
    gpa = vm.gva_to_gpa(gva)
    vm.write(gva, TEXT)
    real = SevMeasured.finish

    def finish(self: SevMeasured) -> SevRunning:
        measurement = self.measurement
        self.secret(gpa + 16, *owner.secret(secret, measurement.mac + measurement.nonce))
        return real(self)

    monkeypatch.setattr(SevMeasured, "finish", finish)
    vm.vcpus[0].set_entry("guest_main", int(gva), 8)
    vm.launch()
    answer = b"".join(call.args[0].to_bytes(8, "little") for call in vm.vcpus[0].syncs())
    assert answer == TEXT[:16] + secret + TEXT[48:64]


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(("offset", "size"), [(0, 16), (PAGE_SIZE - 16, 16), (32, 1024), (0, PAGE_SIZE)])
def test_a_secret_of_any_size_in_a_page(bare: BareMaker, kind: str, offset: int, size: int) -> None:
    """A secret of whole blocks lies where it was put, and the rest of the page is as it was launched.

    SEV API, 6.6.
    """
    guest = waiting(bare, kind)
    secret = bytes(byte ^ 0xFF for byte in TEXT[:size])
    assert guest.inject(offset, *guest.seal(secret)) == (0, 0)
    assert guest.look(0, PAGE_SIZE) == TEXT[:offset] + secret + TEXT[offset + size :]
    assert guest.measured.state == GuestState.LSECRET


@pytest.mark.parametrize("kind", IN_PLACE)
def test_several_secrets(bare: BareMaker, kind: str) -> None:
    """Secrets go in one after another, each with a packet of its own, until the launch is finished.

    SEV API, 6.6: the guest stays in LSECRET.
    """
    guest = waiting(bare, kind)
    for number in range(3):
        assert guest.inject(16 * number, *guest.seal(bytes([number]) * 16)) == (0, 0)
    assert guest.look(0, 64) == bytes(16) + b"\1" * 16 + b"\2" * 16 + TEXT[48:64]
    assert guest.measured.finish().state == GuestState.RUNNING


@pytest.mark.parametrize("kind", IN_PLACE)
def test_memory_that_is_not_registered(bare: BareMaker, kind: str) -> None:
    """LAUNCH_SECRET pins its page by itself: memory that is not registered takes a secret, too.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst asks for registration of what must not move later.
    """
    guest = waiting(bare, kind, registered=False)
    assert guest.inject(0, *guest.seal(b"x" * 16)) == (0, 0)
    assert guest.look(0, 16) == b"x" * 16


# Packets that are not this owner's for this launch.


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("wrong", ["mac", "iv", "data", "owner", "measurement"])
def test_a_packet_that_does_not_verify(bare: BareMaker, kind: str, wrong: str) -> None:
    """A packet that was changed, or sealed by another owner or for another launch: BAD_MEASUREMENT.

    The memory is as it was, and the right packet is taken afterwards.  SEV API, 6.6: the HMAC covers header,
    lengths, data and the launch measurement.
    """
    guest = waiting(bare, kind)
    header, sealed = guest.seal(b"s" * 32)
    if wrong == "mac":
        bad = (header[:-1] + bytes([header[-1] ^ 1]), sealed)
    elif wrong == "iv":
        bad = (header[:4] + bytes([header[4] ^ 1]) + header[5:], sealed)
    elif wrong == "data":
        bad = (header, bytes([sealed[0] ^ 1]) + sealed[1:])
    elif wrong == "owner":
        bad = guest.seal(b"s" * 32, owner=replace(guest.owner, tik=bytes(16)))
    else:
        bad = guest.owner.secret(b"s" * 32, bytes(48))
    assert guest.inject(0, *bad) == firmware(SevRet.SEV_RET_BAD_MEASUREMENT)
    assert guest.look(0, PAGE_SIZE) == TEXT
    assert guest.inject(0, header, sealed) == (0, 0)
    assert guest.look(0, 32) == b"s" * 32


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_packet_that_is_compressed(bare: BareMaker, kind: str) -> None:
    """A header whose COMPRESSED flag is set is UNSUPPORTED by firmware that does not compress.

    SEV API, 6.6 and table 58 (packet header).
    """
    guest = waiting(bare, kind)
    measurement = guest.measured.measurement
    packet = guest.owner.secret(b"s" * 32, measurement.mac + measurement.nonce, flags=1)
    assert guest.inject(0, *packet) == firmware(SevRet.SEV_RET_UNSUPPORTED)
    assert guest.look(0, PAGE_SIZE) == TEXT


# Lengths and addresses.


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("size", [1, 8, 15, 17, 24, 31, 48])
def test_another_length(bare: BareMaker, kind: str, size: int) -> None:
    """A secret that is not a number of 16-byte blocks, or longer than its packet: INVALID_LEN.

    SEV API, 6.6 (GUEST_LENGTH and TRANS_LENGTH).
    """
    guest = waiting(bare, kind)
    header, sealed = guest.seal(b"s" * 32)
    assert guest.inject(0, header, sealed, size) == firmware(SevRet.SEV_RET_INVALID_LEN)
    assert guest.look(0, PAGE_SIZE) == TEXT


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("offset", [1, 8, 15])
def test_an_address_within_a_block(bare: BareMaker, kind: str, offset: int) -> None:
    """A secret that does not begin at a 16-byte block: INVALID_ADDRESS.

    SEV API, 6.6 (GUEST_PADDR).
    """
    guest = waiting(bare, kind)
    assert guest.inject(offset, *guest.seal(b"s" * 32)) == firmware(SevRet.SEV_RET_INVALID_ADDRESS)
    assert guest.look(0, PAGE_SIZE) == TEXT


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_header_that_is_too_short(bare: BareMaker, kind: str) -> None:
    """A header of less than 52 bytes: INVALID_LEN.

    SEV API, 6.6 (HDR_LENGTH).
    """
    guest = waiting(bare, kind)
    header, sealed = guest.seal(b"s" * 32)
    assert len(header) == SECRET_HEADER_SIZE
    assert guest.inject(0, header[:-1], sealed) == firmware(SevRet.SEV_RET_INVALID_LEN)


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *(
            (name, 0, errno.EINVAL)
            for name in ("guest_len", "trans_len", "hdr_len", "trans_uaddr", "hdr_uaddr")
        ),
        # The first page of the address space is never mapped.
        ("guest_uaddr", 16, errno.ENOMEM),
        ("hdr_uaddr", 16, errno.EFAULT),
        ("trans_uaddr", 16, errno.EFAULT),
    ],
)
def test_a_bad_argument(bare: BareMaker, kind: str, name: str, value: int, error: int) -> None:
    """No bytes, no header and no data give EINVAL, guest memory that cannot be pinned ENOMEM, a packet that
    cannot be read EFAULT: the firmware is not asked.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst; sev_launch_secret(), sev_pin_memory() and
    psp_copy_user_blob() in Linux.
    """
    guest = waiting(bare, kind)
    secret = Secret(guest.made.hva, *guest.seal(b"s" * 32))
    setattr(secret.arg, name, value)
    assert guest.made.raw("LAUNCH_SECRET", secret) == (error, 0)
    assert guest.look(0, PAGE_SIZE) == TEXT


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("name", ["trans_len", "hdr_len"])
def test_more_than_16k(bare: BareMaker, kind: str, name: str) -> None:
    """Header and data have at most 16 KiB: EINVAL beyond.

    SEV API, 6.6 (TRANS_LENGTH at most 16 KiB); SEV_FW_BLOB_MAX_SIZE in Linux.
    """
    guest = waiting(bare, kind)
    header, sealed = guest.seal(b"s" * 32)
    secret = Secret(guest.made.hva, header.ljust(LIMIT + 16), sealed.ljust(LIMIT + 16), 32)
    secret.arg.hdr_len, secret.arg.trans_len = len(header), len(sealed)
    setattr(secret.arg, name, LIMIT + 1)
    assert guest.made.raw("LAUNCH_SECRET", secret) == EINVAL
    assert guest.look(0, PAGE_SIZE) == TEXT


@pytest.mark.parametrize("kind", IN_PLACE)
def test_the_end_of_the_address_space(bare: BareMaker, kind: str) -> None:
    """A range that wraps around gives EINVAL.

    sev_pin_memory() in Linux.
    """
    guest = waiting(bare, kind)
    secret = Secret((1 << 64) - 16, *guest.seal(b"s" * 32))
    assert guest.made.raw("LAUNCH_SECRET", secret) == EINVAL
