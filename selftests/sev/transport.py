# SPDX-License-Identifier: Apache-2.0
"""The other platform of SEND and RECEIVE, played by the test: session and packets (SEV API, chapter 2)."""

from __future__ import annotations

import hmac
import secrets
import struct
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from kvmpy import (
    GuestOwner,
    Kvm,
    MissingError,
    SevDevice,
    Struct,
    kvm_sev_receive_start,
    kvm_sev_receive_update_data,
    kvm_sev_send_start,
    kvm_sev_send_update_data,
)
from kvmpy.coco.sev_session import CERTIFICATE_SIZE, read_dh_certificate, transport_keys
from kvmpy.uapi import ffi

HEADER_SIZE = 52
SESSION_SIZE = 128
_DATA = b"\x02"


def receives(_: Kvm) -> str | None:
    """Return why RECEIVE_UPDATE_DATA may not be tried here, None where it may.

    KVM puts the encryption bit into the page's address (sev_receive_update_data()). Once the driver has
    initialised SNP, it gives that page to the firmware (snp_map_cmd_buf_desc()), takes the bit for a part of
    its number where the host's own memory is not encrypted, fails with EFAULT, and /dev/sev is busy ever
    after. It initialises SNP wherever CC_ATTR_HOST_SEV_SNP is set (__sev_snp_init_locked()):
    kvm_amd.sev_snp=0 changes nothing, and sev=nosnp is for hosts that are no guests themselves
    (arch/x86/virt/svm/cmdline.c, init_sev_config()).
    """
    try:
        with SevDevice() as device:
            if not device.snp_platform_status().state:
                return None
    except (OSError, MissingError):
        return None  # a firmware without SNP, or no device at all
    return (
        "SNP not initialised (sev=nosnp on the command line of a kernel that is no guest, or no RMP in the "
        "BIOS; kvm_amd.sev_snp=0 is not enough): with it, RECEIVE_UPDATE_DATA takes /dev/sev away"
    )


needs_receive_update = pytest.mark.requires.with_args(receives)


def platform_key() -> tuple[bytes, bytes]:
    """Return the Diffie-Hellman certificate of this platform, and the chain that signs it."""
    with SevDevice() as device:
        return device.pdh_cert_export()


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    cipher = Cipher(AES(key), CTR(iv)).encryptor()
    return cipher.update(data) + cipher.finalize()


def _mac(tik: bytes, header: bytes, size: int, sealed: bytes) -> bytes:
    lengths = struct.pack("<II", size, len(sealed))
    return hmac.digest(tik, _DATA + header[:20] + lengths + sealed, "sha256")


@dataclass(frozen=True)
class Packet:
    """What SEND_UPDATE_DATA gives out and RECEIVE_UPDATE_DATA takes."""

    header: bytes
    sealed: bytes

    @classmethod
    def seal(cls, owner: GuestOwner, data: bytes) -> Packet:
        """Encrypt *data* with the transport keys."""
        header = bytes(4) + secrets.token_bytes(16)
        sealed = _ctr(owner.tek, header[4:20], data)
        return cls(header + _mac(owner.tik, header, len(data), sealed), sealed)

    def open(self, tek: bytes, tik: bytes) -> bytes:
        """Return what is in it; AssertionError where it was not sealed with these keys."""
        assert self.header[20:] == _mac(tik, self.header, len(self.sealed), self.sealed)
        return _ctr(tek, self.header[4:20], self.sealed)


def open_session(owner: GuestOwner, session: bytes) -> tuple[bytes, bytes]:
    """Return TEK and TIK of a session that this platform made for *owner*'s certificate."""
    nonce, wrapped, iv, mac = session[:16], session[16:48], session[48:64], session[64:96]
    kek, kik = transport_keys(owner.dh_key, read_dh_certificate(platform_key()[0]), nonce)
    assert mac == hmac.digest(kik, wrapped, "sha256")
    keys = _ctr(kek, iv, wrapped)
    return keys[:16], keys[16:]


class Argument:
    """An argument whose pointers lead to copies of bytes, which live as long as this object: ``arg`` keeps
    them not.
    """

    arg: Struct

    def __init__(self) -> None:
        self._keep: list[object] = []
        self.buffers: dict[str, bytearray] = {}

    def place(self, name: str, data: bytes) -> int:
        """Return where a copy of *data* lies."""
        buffer = self.buffers[name] = bytearray(data)
        self._keep.append(ffi.from_buffer(buffer))
        return int(ffi.cast("uintptr_t", self._keep[-1]))


class SendStart(Argument):
    """SEND_START to the platform whose certificate *owner* has."""

    arg: kvm_sev_send_start

    def __init__(self, owner: GuestOwner, session_size: int = SESSION_SIZE) -> None:
        super().__init__()
        _, chain = platform_key()
        self.arg = kvm_sev_send_start(
            pdh_cert_uaddr=self.place("pdh", owner.certificate()),
            pdh_cert_len=CERTIFICATE_SIZE,
            plat_certs_uaddr=self.place("platform", chain),
            plat_certs_len=len(chain),
            amd_certs_uaddr=self.place("amd", bytes(2 * CERTIFICATE_SIZE)),
            amd_certs_len=2 * CERTIFICATE_SIZE,
            session_uaddr=self.place("session", bytes(session_size)),
            session_len=session_size,
        )

    @property
    def session(self) -> bytes:
        """What the firmware wrapped."""
        return bytes(self.buffers["session"])


class SendUpdate(Argument):
    """SEND_UPDATE_DATA of *size* bytes at the host address *guest*."""

    arg: kvm_sev_send_update_data

    def __init__(self, guest: int, size: int) -> None:
        super().__init__()
        self.arg = kvm_sev_send_update_data(
            hdr_uaddr=self.place("header", bytes(HEADER_SIZE)),
            hdr_len=HEADER_SIZE,
            guest_uaddr=guest,
            guest_len=size,
            trans_uaddr=self.place("sealed", bytes(size or 16)),
            trans_len=size or 16,
        )

    @property
    def packet(self) -> Packet:
        """What the firmware sealed."""
        return Packet(bytes(self.buffers["header"]), bytes(self.buffers["sealed"]))


class ReceiveStart(Argument):
    """RECEIVE_START with a session that *owner*, as the sending platform, made for this one."""

    arg: kvm_sev_receive_start

    def __init__(self, owner: GuestOwner, policy: int, session: bytes | None = None, handle: int = 0) -> None:
        super().__init__()
        session_data = owner.session(platform_key()[0], policy) if session is None else session
        self.arg = kvm_sev_receive_start(
            handle=handle,
            policy=policy,
            pdh_uaddr=self.place("pdh", owner.certificate()),
            pdh_len=CERTIFICATE_SIZE,
            session_uaddr=self.place("session", session_data),
            session_len=len(session_data),
        )


class ReceiveUpdate(Argument):
    """RECEIVE_UPDATE_DATA of *packet* to *size* bytes at the host address *guest*."""

    arg: kvm_sev_receive_update_data

    def __init__(self, guest: int, packet: Packet, size: int | None = None) -> None:
        super().__init__()
        self.arg = kvm_sev_receive_update_data(
            hdr_uaddr=self.place("header", packet.header),
            hdr_len=len(packet.header),
            guest_uaddr=guest,
            guest_len=len(packet.sealed) if size is None else size,
            trans_uaddr=self.place("sealed", packet.sealed),
            trans_len=len(packet.sealed),
        )
