# SPDX-License-Identifier: Apache-2.0
"""Attestation reports: fields, signature, certificates, expectations, and what is wrong with bad ones."""

from __future__ import annotations

import random
import struct
from functools import cache

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from kvmpy.coco import idblock, report
from kvmpy.coco.certificates import Chain, certified_tcb, load
from kvmpy.coco.guest_message import Message, MessageType
from kvmpy.coco.report import PlatformInfo, Report, ReportError, SigningKey, Tcb
from tests.coco.attestation import AMD, CHIP, REPORTED_TCB, Authority, leaf_extensions


@cache
def authority(rsa_keys: bool = False) -> Authority:
    return Authority(rsa_keys=rsa_keys)


def chain(of: Authority) -> Chain:
    return Chain.of([of.leaf, of.root, of.intermediate])


def test_fields_lie_where_the_specification_has_them() -> None:
    data = bytearray(report.REPORT_SIZE)
    struct.pack_into("<IIQ", data, 0, 3, 4, 0x30000)
    struct.pack_into("<IIQQI", data, 0x30, 2, 1, 0x0708_0000_0000_0201, 0x23, 1 | 1 << 2)
    data[0x50:0x90], data[0x90:0xC0], data[0xC0:0xE0] = b"D" * 64, b"M" * 48, b"H" * 32
    data[0xE0:0x110], data[0x110:0x140] = b"I" * 48, b"A" * 48
    data[0x188:0x18B] = bytes([0x19, 0x11, 1])
    data[0x1A0:0x1E0] = CHIP
    data[0x1E8:0x1EB] = bytes([31, 55, 1])
    read = Report(bytes(data))
    assert (read.version, read.policy, read.vmpl) == (3, 0x30000, 2)
    assert read.integer("guest_svn") == 4
    assert read.tcb("current_tcb") == Tcb(bootloader=1, tee=2, snp=8, microcode=7)
    assert (
        read.platform_info == PlatformInfo.SMT_EN | PlatformInfo.TSME_EN | PlatformInfo.ALIAS_CHECK_COMPLETE
    )
    assert (read.author_key_enabled, read.chip_key_masked, read.signing_key) == (True, False, SigningKey.VLEK)
    assert (read.report_data, read.measurement, read.host_data) == (b"D" * 64, b"M" * 48, b"H" * 32)
    assert (read.field("id_key_digest"), read.field("author_key_digest")) == (b"I" * 48, b"A" * 48)
    assert (read.chip_id, read.integer("current_major"), read.integer("current_minor")) == (CHIP, 1, 55)
    assert read.integer("current_build") == 31


def test_turin_counts_an_fmc_in_front() -> None:
    data = report.build({"version": 3, "cpuid_family": 0x1A, "current_tcb": 0x0700_0000_0403_0201})
    assert Report(data).tcb("current_tcb") == Tcb(fmc=1, bootloader=2, tee=3, snp=4, microcode=7)


def test_every_field_of_the_version_is_in_the_dictionary() -> None:
    old, new = (Report(report.build({"version": version})).as_dict() for version in (2, 5))
    assert set(new) - set(old) == {
        "cpuid_family",
        "cpuid_model",
        "cpuid_stepping",
        "launch_mit_vector",
        "current_mit_vector",
    }


@pytest.mark.parametrize("rsa_keys", [False, True], ids=["ecdsa", "rsa-pss"])
def test_a_signed_report_verifies_up_to_its_root(rsa_keys: bool) -> None:
    signed = authority(rsa_keys)
    chain(signed).verify_report(Report(signed.report()), root=signed.root)


def test_every_flipped_bit_of_the_signed_part_is_noticed() -> None:
    data = authority().report()
    generator = random.Random(1)
    for _ in range(64):
        bit = generator.randrange(32, report.SIGNED_SIZE * 8)
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ReportError):
            chain(authority()).verify_report(Report(bytes(flipped)))


@pytest.mark.parametrize("offset", [report.SIGNED_SIZE, report.SIGNED_SIZE + 72])
def test_a_flipped_bit_of_the_signature_is_noticed(offset: int) -> None:
    flipped = bytearray(authority().report())
    flipped[offset] ^= 1
    with pytest.raises(ReportError, match="the signature is not that of this report"):
        chain(authority()).verify_report(Report(bytes(flipped)))


def test_a_report_of_another_machine_is_noticed() -> None:
    other = Authority()
    with pytest.raises(ReportError, match="the signature is not that of this report"):
        chain(other).verify_report(Report(authority().report()))


@pytest.mark.parametrize(
    ("extensions", "text"),
    [
        (leaf_extensions(spl8=114), "the certificate is for TCB .*microcode 114.*microcode 115"),
        (leaf_extensions(chip=bytes(64)), "the certificate is of chip 0000"),
    ],
    ids=["tcb", "chip"],
)
def test_the_certificate_must_be_of_this_chip_and_tcb(extensions: dict[str, bytes], text: str) -> None:
    other = Authority(extensions=extensions)
    with pytest.raises(ReportError, match=text):
        chain(other).verify_report(Report(other.report()))


def test_a_masked_chip_cannot_be_compared() -> None:
    other = Authority(extensions=leaf_extensions(chip=b"\x01" * 64))
    chain(other).verify_report(Report(other.report(chip_id=bytes(64))))


def test_a_turin_certificate_names_eight_bytes_of_chip_and_an_fmc() -> None:
    other = Authority(extensions=leaf_extensions(chip=CHIP[:8], spl9=9))
    assert certified_tcb(other.leaf) == Tcb(3, 0, 8, 115, fmc=9)
    levels = int.from_bytes(bytes([9, 3, 0, 8, 0, 0, 0, 115]), "little")
    fields = {"version": 3, "cpuid_family": 0x1A, "reported_tcb": levels}
    chain(other).verify_report(Report(other.report(**fields, chip_id=CHIP[:8])))
    with pytest.raises(ReportError, match="is of chip"):
        chain(other).verify_report(Report(other.report(**fields)))


def test_only_the_trusted_root_is_trusted() -> None:
    with pytest.raises(ReportError, match="which is not the trusted root"):
        chain(authority()).verify(root=Authority().root)


def test_a_chain_may_have_no_intermediate() -> None:
    mine = authority()
    short = Chain.of([mine.intermediate, mine.root])
    short.verify(root=mine.root)
    with pytest.raises(ReportError, match="CN=ASK is not signed by CN=ARK"):
        Chain(Authority().intermediate, None, mine.root).verify()


@pytest.mark.parametrize("place", ["leaf", "intermediate"])
def test_a_certificate_of_another_issuer_with_the_same_name_is_noticed(place: str) -> None:
    mine, other = authority(), Authority()
    certificates = {"leaf": mine.leaf, "intermediate": mine.intermediate, place: getattr(other, place)}
    with pytest.raises(ReportError, match="is not signed by"):
        Chain(certificates["leaf"], certificates["intermediate"], mine.root).verify()


def test_certificates_of_no_chain_are_listed() -> None:
    mine = authority()
    with pytest.raises(ReportError, match=r"3 certificates .*, not 1"):
        Chain.of([mine.root])
    with pytest.raises(ReportError, match="are not a chain: CN=VCEK, CN=ARK"):
        Chain.of([mine.leaf, mine.root])
    with pytest.raises(ReportError, match="0 of the certificates sign themselves"):
        Chain.of([mine.leaf, mine.leaf, mine.intermediate])
    with pytest.raises(ReportError, match="are not a chain: CN=VCEK, CN=VCEK, CN=ARK"):
        Chain.of([mine.leaf, Authority().leaf, mine.root])


def test_a_name_that_cannot_be_read_is_told() -> None:
    """The library looks at names when it is asked for them, long after it has read the certificate."""
    mine = authority()
    raw = [entry.public_bytes(Encoding.DER) for entry in (mine.leaf, mine.intermediate, mine.root)]
    given = load([content.replace(b"ASK", b"\xff\xfe\xfd") for content in raw])
    with pytest.raises(ReportError, match="no certificate that can be read"):
        Chain.of(given)


def test_certificates_are_read_from_pem_and_der() -> None:
    mine = authority()
    pem = mine.intermediate.public_bytes(Encoding.PEM) + mine.root.public_bytes(Encoding.PEM)
    assert load([mine.leaf.public_bytes(Encoding.DER), pem]) == [mine.leaf, mine.intermediate, mine.root]
    with pytest.raises(ReportError, match="no certificate"):
        load([b"\x30\x03abc"])


@pytest.mark.parametrize("size", [0, 1183, 1185])
def test_a_report_cut_short_is_refused(size: int) -> None:
    with pytest.raises(ReportError, match=f"1184 bytes, not {size}"):
        Report(bytes(size))


@pytest.mark.parametrize("version", [0, 1])
def test_an_unknown_version_is_refused(version: int) -> None:
    with pytest.raises(ReportError, match=f"version {version} is unknown"):
        Report(report.build({"version": version}))


def test_of_a_newer_version_the_known_fields_are_read() -> None:
    """Version 9 with something new at 0x210 and 8 bytes more behind: shown, and said to be newer."""
    signed = authority()
    read = Report(signed.report(version=9))
    assert read.newer
    assert chain(signed).verify_report(read, root=signed.root) == {}
    data = bytearray(signed.report(version=9, current_mit_vector=7))
    data[0x210:0x212] = b"\x12\x34"
    longer = Report(bytes(data) + bytes(8))
    assert longer.as_dict()["current_mit_vector"] == 7
    assert [(start, part.rstrip(b"\0")) for start, part in longer.unknown()] == [
        (0x208, bytes(8) + b"\x12\x34")
    ]
    with pytest.raises(ReportError, match="version 9 with 1192 bytes: where its signature lies is not known"):
        chain(signed).verify_report(longer)
    with pytest.raises(ReportError, match="1184 bytes, not 1192"):
        Report(signed.report(version=5) + bytes(8))
    known = Report(signed.report(version=5))
    assert not known.newer
    assert list(known.unknown()) == []


TURIN = int.from_bytes(bytes([9, 3, 0, 8, 0, 0, 0, 115]), "little")


def test_turins_first_reports_tell_its_tcb_by_the_length_of_the_chip_id() -> None:
    """Version 2 does not name the family: 8 bytes of chip ID are Turin's, whose TCB begins with the FMC."""
    fields = {"version": 2, "current_tcb": TURIN, "reported_tcb": TURIN}
    turin = Report(report.build({**fields, "chip_id": CHIP[1:9]}))
    assert turin.tcb("current_tcb") == Tcb(3, 0, 8, 115, fmc=9)
    milan = Report(report.build({**fields, "chip_id": CHIP[1:10]}))
    assert milan.tcb("current_tcb") == Tcb(9, 3, 0, 115)
    masked = Report(report.build(fields))
    assert (turin.has_fmc, milan.has_fmc, masked.has_fmc) == (True, False, None)
    # A masked one is read as its certificate says.
    other = Authority(extensions=leaf_extensions(chip=CHIP[:8], spl9=9))
    assert set(chain(other).verify_report(Report(other.report(**fields, chip_id=bytes(64))))) == {"chip"}


NO_TCB = {oid: value for oid, value in leaf_extensions().items() if not oid.startswith(f"{AMD}.3.")}
NO_CHIP = {oid: value for oid, value in leaf_extensions().items() if oid.startswith(f"{AMD}.3.")}


@pytest.mark.parametrize(
    ("extensions", "fields", "unchecked"),
    [
        (None, {}, {}),
        (None, {"key_flags": SigningKey.VLEK << 2}, {"chip": "a VLEK has signed, which belongs to no chip"}),
        (None, {"chip_id": bytes(64)}, {"chip": "the report's chip ID is masked"}),
        (NO_CHIP, {}, {"chip": "the certificate does not say of which chip it is"}),
        (NO_TCB, {}, {"TCB": "the certificate does not say for which TCB it is"}),
    ],
    ids=["all", "vlek", "masked", "no-hwid", "no-tcb"],
)
def test_what_could_not_be_verified_is_said(
    extensions: dict[str, bytes] | None, fields: dict[str, int | bytes], unchecked: dict[str, str]
) -> None:
    other = Authority(extensions=extensions)
    assert chain(other).verify_report(Report(other.report(**fields))) == unchecked


def test_a_failed_assertion_shows_no_chip_and_no_key() -> None:
    """What pytest prints of a report or of a message goes into archives."""
    shown = repr(Report(authority().report())) + repr(Message(MessageType.KEY_RSP, CHIP, 1))
    assert repr(CHIP[:8])[2:-1] not in shown
    assert "KEY_RSP" in shown


def test_a_report_without_a_signature_says_why() -> None:
    data = authority().report(key_flags=2)[: report.SIGNED_SIZE] + bytes(512)
    with pytest.raises(ReportError, match=r"is not signed: the platform masks its chip key"):
        chain(authority()).verify_report(Report(data))


def test_an_unknown_signature_algorithm_is_named() -> None:
    with pytest.raises(ReportError, match="algorithm 2 is unknown"):
        Report(authority().report(signature_algorithm=2)).verify_signature(authority().key.public_key())
    with pytest.raises(ReportError, match="the certificate's key is secp256r1"):
        Report(authority().report()).verify_signature(ec.generate_private_key(ec.SECP256R1()).public_key())


def test_all_differences_from_what_is_expected_are_listed() -> None:
    read = Report(authority().report())
    read.expect({"report_data": b"question", "policy": 0x30000, "reported_tcb": REPORTED_TCB})
    with pytest.raises(ReportError) as error:
        read.expect({"policy": 0xB0000, "host_data": b"\xa5" * 31, "guest_svn": 4})
    assert "policy is 0x30000, expected 0xb0000; host_data is a5" in str(error.value)
    assert "guest_svn" not in str(error.value)
    with pytest.raises(ReportError, match="host_data has 32 bytes, 33 are expected"):
        read.expect({"host_data": bytes(33)})
    with pytest.raises(KeyError):
        read.expect({"nothing": 1})


def test_a_response_gives_its_report_or_the_status() -> None:
    data = authority().report()
    assert report.from_response(struct.pack("<II24x", 0, len(data)) + data).data == data
    with pytest.raises(ReportError, match="status 0x27: the key asked for is not there"):
        report.from_response(struct.pack("<II24x", 0x27, 0))
    with pytest.raises(ReportError, match="holds 1215"):
        report.from_response((struct.pack("<II24x", 0, len(data)) + data)[:-1])
    with pytest.raises(ReportError, match="at least 32 bytes, not 3"):
        report.from_response(b"abc")


def test_a_published_key_has_its_published_digest() -> None:
    """The test vector that QEMU-compatible ID block tools share: a public key, and what a report shows of
    it.
    """
    key = ec.EllipticCurvePublicNumbers(
        0xF6763E4D2609CF1B2CF22F2CC8B8CA4CF55D470C3C23552C93B168874390DD95CB3FDEE847DDF79FF29EFBB8803C6D1F,
        0xCCD7A8D047B9CDC1C750B1190ABE6D1DAD37A8DECB14327B766619F712607CFD0D38853C50DA9BCD080B35389C93BE3E,
        ec.SECP384R1(),
    ).public_key()
    assert idblock.key_digest(idblock.encode_public_key(key)).hex() == (
        "59fb2c686dfa4fef49f38339aa775c90051c28d57383ddc3baf3b5eb4b1496df3b0dbbdcbae5fe27677a644820773fe2"
    )
