# SPDX-License-Identifier: Apache-2.0
"""The certificates behind an attestation report: VCEK or VLEK, signed by ASK or ASVK, signed by the ARK.

Extensions and signatures as the VCEK certificate and KDS interface specification describes them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning

from kvmpy.coco.report import Report, ReportError, SigningKey, Tcb

_AMD = "1.3.6.1.4.1.3704.1"
_SPL = {
    "bootloader": f"{_AMD}.3.1",
    "tee": f"{_AMD}.3.2",
    "snp": f"{_AMD}.3.3",
    "microcode": f"{_AMD}.3.8",
    "fmc": f"{_AMD}.3.9",
}
_HWID = f"{_AMD}.4"


@dataclass(frozen=True)
class Chain:
    """Certificates from the signer of reports up to the root, which signs itself.

    AMD has an intermediate (ASK or ASVK); the lab's software AMD-SP has none.
    """

    leaf: x509.Certificate
    intermediate: x509.Certificate | None
    root: x509.Certificate

    @classmethod
    def of(cls, certificates: Iterable[x509.Certificate]) -> Chain:
        """Order two or three certificates by who signs whom, each given once or more; raises ReportError."""
        with _reading():
            return cls._ordered(certificates)

    @classmethod
    def _ordered(cls, certificates: Iterable[x509.Certificate]) -> Chain:
        given = list(
            {certificate.public_bytes(Encoding.DER): certificate for certificate in certificates}.values()
        )
        if len(given) not in (2, 3):
            raise ReportError(
                "a chain is the VCEK or VLEK, the ASK or ASVK and the ARK: "
                f"3 certificates (2 without an intermediate), not {len(given)}"
            )
        roots = [certificate for certificate in given if certificate.subject == certificate.issuer]
        if len(roots) != 1:
            raise ReportError(f"{len(roots)} of the certificates sign themselves; the ARK alone does")
        root = roots[0]
        rest = [certificate for certificate in given if certificate is not root]
        if len(rest) == 1 and rest[0].issuer == root.subject:
            return cls(rest[0], None, root)
        for leaf, intermediate in (rest, rest[::-1]) if len(rest) > 1 else ():
            if leaf.issuer == intermediate.subject and intermediate.issuer == root.subject:
                return cls(leaf, intermediate, root)
        names = ", ".join(_name(certificate) for certificate in given)
        raise ReportError(f"these certificates are not a chain: {names}")

    def verify(self, root: x509.Certificate | None = None) -> None:
        """Check every signature, and that the root is the one that is trusted; raises ReportError.

        Without *root* the chain's own root is trusted: that proves consistency, not where it comes from.
        """
        with _reading():
            self._verify(root)

    def _verify(self, root: x509.Certificate | None) -> None:
        if root is not None and root.public_bytes(Encoding.DER) != self.root.public_bytes(Encoding.DER):
            raise ReportError(
                f"the chain ends in {_name(self.root)}, which is not the trusted root {_name(root)}"
            )
        _verify_signed_by(self.root, self.root)
        if self.intermediate is not None:
            _verify_signed_by(self.intermediate, self.root)
        _verify_signed_by(self.leaf, self.intermediate or self.root)

    def verify_report(self, report: Report, root: x509.Certificate | None = None) -> dict[str, str]:
        """Check the chain, the report's signature, and that leaf and report name one chip and one TCB.

        Returns why the rest could not be checked: ``chip`` or ``TCB``, and the reason.
        """
        self.verify(root)
        key = self.leaf.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ReportError(f"the key of {_name(self.leaf)} is not an elliptic curve key")
        report.verify_signature(key)
        return _compare_extensions(self.leaf, report)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Tell as a ReportError what cryptography cannot read: it looks at most of a certificate when asked."""
    try:
        yield
    except ReportError:
        raise
    except Exception as error:  # noqa: BLE001 - the library has many errors of its own, of no common class
        raise ReportError(f"no certificate that can be read: {str(error) or type(error).__name__}") from None


def load(files: Sequence[bytes]) -> list[x509.Certificate]:
    """Read certificates from PEM files (any number in each) or DER files; raises ReportError."""
    results: list[x509.Certificate] = []
    with warnings.catch_warnings():
        # The serial number of a VCEK is 0 by AMD's specification, whatever RFC 5280 says.
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        for data in files:
            with _reading():
                if b"-----BEGIN CERTIFICATE" in data:
                    results += x509.load_pem_x509_certificates(data)
                else:
                    results.append(x509.load_der_x509_certificate(data))
    return results


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "a certificate without a name"


def _verify_signed_by(certificate: x509.Certificate, signer: x509.Certificate) -> None:
    """Check one signature; AMD signs with RSA-PSS, the lab with ECDSA."""
    key, algorithm = signer.public_key(), certificate.signature_hash_algorithm
    failed = ReportError(f"{_name(certificate)} is not signed by {_name(signer)}")
    if algorithm is None:
        raise failed
    try:
        if isinstance(key, rsa.RSAPublicKey):
            parameters = certificate.signature_algorithm_parameters
            if not isinstance(parameters, (padding.PSS, padding.PKCS1v15)):
                raise failed
            key.verify(certificate.signature, certificate.tbs_certificate_bytes, parameters, algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(algorithm))
        else:
            raise failed
    except InvalidSignature:
        raise failed from None


def _extension(certificate: x509.Certificate, oid: str) -> bytes | None:
    try:
        extension = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(oid)).value
    except x509.ExtensionNotFound:
        return None
    return extension.value if isinstance(extension, x509.UnrecognizedExtension) else None


def certified_tcb(certificate: x509.Certificate) -> Tcb | None:
    """Return the TCB that a VCEK or VLEK is made for, None when the certificate does not say."""
    levels: dict[str, int] = {}
    for name, oid in _SPL.items():
        value = _extension(certificate, oid)
        if value is not None:
            # A DER INTEGER: tag 2, length, value.
            if len(value) < 3 or value[0] != 2 or value[1] != len(value) - 2:
                raise ReportError(f"{_name(certificate)}: the extension {oid} is not an integer")
            levels[name] = int.from_bytes(value[2:], "big")
    if not {"bootloader", "tee", "snp", "microcode"} <= set(levels):
        return None
    return Tcb(**levels)


def _compare_extensions(leaf: x509.Certificate, report: Report) -> dict[str, str]:
    unchecked: dict[str, str] = {}
    tcb = certified_tcb(leaf)
    if tcb is None:
        unchecked["TCB"] = "the certificate does not say for which TCB it is"
    else:
        reported = report.tcb("reported_tcb", has_fmc=tcb.fmc is not None)
        if tcb != reported:
            raise ReportError(f"the certificate is for TCB {tcb}, the report says {reported}")
    chip = _extension(leaf, _HWID)
    if report.signing_key is SigningKey.VLEK:
        unchecked["chip"] = "a VLEK has signed, which belongs to no chip"
    elif not any(report.chip_id):
        unchecked["chip"] = "the report's chip ID is masked"
    elif chip is None:
        unchecked["chip"] = "the certificate does not say of which chip it is"
    if chip is None or "chip" in unchecked:
        return unchecked
    if chip[:2] == bytes([4, len(chip) - 2]) and len(chip) - 2 in (8, 64):
        chip = chip[2:]  # a DER OCTET STRING around it
    if chip != report.chip_id[: len(chip)] or any(report.chip_id[len(chip) :]):
        raise ReportError(f"the certificate is of chip {chip.hex()}, the report of {report.chip_id.hex()}")
    return unchecked
