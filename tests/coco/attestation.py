# SPDX-License-Identifier: Apache-2.0
"""Certificates and reports that tests make themselves."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import NameOID

from kvmpy.coco import idblock, report

AMD = "1.3.6.1.4.1.3704.1"
TCB = {"1": 3, "2": 0, "3": 8, "8": 115}
REPORTED_TCB = 3 | 8 << 48 | 115 << 56
CHIP = bytes(range(64))
FIELDS: dict[str, int | bytes] = {
    "version": 2,
    "guest_svn": 4,
    "policy": 0x30000,
    "signature_algorithm": 1,
    "reported_tcb": REPORTED_TCB,
    "platform_info": 1,
    "report_data": b"question",
    "measurement": b"\x5a" * 48,
    "host_data": b"\xa5" * 32,
    "chip_id": CHIP,
}
Signer = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def certificate(
    name: str, key: Signer, issuer: str, issuer_key: Signer, extensions: dict[str, bytes] | None = None
) -> x509.Certificate:
    """Return a certificate; RSA issuers sign with PSS, as AMD's do."""
    day = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(day)
        .not_valid_after(day + datetime.timedelta(days=9000))
    )
    for oid, value in (extensions or {}).items():
        builder = builder.add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False
        )
    if isinstance(issuer_key, rsa.RSAPrivateKey):
        pss = padding.PSS(padding.MGF1(SHA384()), 48)
        return builder.sign(issuer_key, SHA384(), rsa_padding=pss)
    return builder.sign(issuer_key, SHA384())


def leaf_extensions(chip: bytes = CHIP, **levels: int) -> dict[str, bytes]:
    """Return TCB levels and chip as a VCEK has them; *levels* are ``spl1=...`` by the last number of the
    OID.
    """
    spl = {**TCB, **{name.removeprefix("spl"): value for name, value in levels.items()}}
    return {**{f"{AMD}.3.{number}": bytes([2, 1, value]) for number, value in spl.items()}, f"{AMD}.4": chip}


class Authority:
    """A root, an intermediate and a report-signing key; *rsa_keys* signs as AMD does, otherwise P-384
    throughout.
    """

    def __init__(self, *, rsa_keys: bool = False, extensions: dict[str, bytes] | None = None) -> None:
        def signer() -> Signer:
            return rsa.generate_private_key(65537, 2048) if rsa_keys else idblock.generate_key()

        root_key, intermediate_key = signer(), signer()
        self.key = idblock.generate_key()
        self.root = certificate("ARK", root_key, "ARK", root_key)
        self.intermediate = certificate("ASK", intermediate_key, "ARK", root_key)
        self.leaf = certificate(
            "VCEK", self.key, "ASK", intermediate_key, leaf_extensions() if extensions is None else extensions
        )

    def report(self, **fields: int | bytes) -> bytes:
        """Return a report with these fields, signed."""
        data = bytearray(report.build({**FIELDS, **fields}))
        signature = idblock.encode_signature(
            self.key.sign(bytes(data[: report.SIGNED_SIZE]), ec.ECDSA(SHA384()))
        )
        data[report.SIGNED_SIZE :] = signature
        return bytes(data)
