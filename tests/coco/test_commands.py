# SPDX-License-Identifier: Apache-2.0
"""``kvmpy measure`` and ``kvmpy report`` as their users call them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sevsnpmeasure.gctx import GCTX

from kvmpy.cli.measure import measure
from kvmpy.cli.report import report
from kvmpy.coco import idblock
from kvmpy.coco.idblock import IdAuth, IdBlock
from tests.coco.attestation import Authority

DIGEST = bytes(range(48))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Path:
    (tmp_path / "x.bin").write_bytes(b"x" * 8192)
    manifest = {"pages": [{"gpa": "0x1000", "type": "normal", "file": "x.bin"}]}
    (tmp_path / "m.json").write_text(json.dumps(manifest), encoding="utf-8")
    for name in ("id", "author"):
        key = idblock.generate_key()
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{name}.pem").write_bytes(pem)
    (tmp_path / "report.bin").write_bytes(authority.report())
    (tmp_path / "leaf.der").write_bytes(authority.leaf.public_bytes(Encoding.DER))
    chain = authority.intermediate.public_bytes(Encoding.PEM) + authority.root.public_bytes(Encoding.PEM)
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "root.pem").write_bytes(authority.root.public_bytes(Encoding.PEM))
    (tmp_path / "other.pem").write_bytes(Authority().root.public_bytes(Encoding.PEM))
    return tmp_path


def run(*arguments: str | Path) -> Result:
    command = {"measure": measure, "report": report}[str(arguments[0])]
    return CliRunner().invoke(command, [str(argument) for argument in arguments[1:]])


def oracle() -> bytes:
    context = GCTX()
    context.update_normal_pages(0x1000, b"x" * 8192)
    digest: bytes = context.ld()
    return digest


def test_the_digest_of_a_manifest_is_printed_in_hex(files: Path) -> None:
    result = run("measure", "snp", "--manifest", files / "m.json")
    assert (result.exit_code, result.output) == (0, oracle().hex() + "\n")
    result = run("measure", "snp", "--manifest", files / "m.json", "--json")
    assert json.loads(result.output) == {"digest": oracle().hex(), "pages": 2}


def test_measuring_needs_nothing_of_kvm(files: Path) -> None:
    code = (
        "import sys; sys.argv = ['kvmpy', 'measure', 'snp', '--manifest', sys.argv[1]]\n"
        "from kvmpy.cli.main import main\n"
        "try: main()\n"
        "finally: print([name for name in sys.modules if name.startswith(('kvmpy.uapi', 'kvmpy.core'))])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(files / "m.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.splitlines() == [oracle().hex(), "[]"]


def test_a_bad_manifest_is_one_line_and_a_status(files: Path) -> None:
    (files / "m.json").write_text('{"pages": [{"gpa": 1, "type": "zero"}]}', encoding="utf-8")
    result = run("measure", "snp", "--manifest", files / "m.json")
    assert result.exit_code == 1
    assert result.output == "kvmpy measure: pages[0]: gpa 0x1 is not aligned to 0x1000\n"


def test_an_id_block_is_written_and_verifies(files: Path) -> None:
    result = run(
        *(
            "measure",
            "idblock",
            "--digest",
            DIGEST.hex(),
            "--policy",
            "0x30000",
            "--id-key",
            files / "id.pem",
        ),
        *("--author-key", files / "author.pem", "--family-id", "0102", "--guest-svn", "3", "--json"),
        *("--block", files / "block", "--auth", files / "auth"),
    )
    assert result.exit_code == 0, result.output
    block = IdBlock.from_bytes((files / "block").read_bytes())
    auth = IdAuth.from_bytes((files / "auth").read_bytes())
    auth.verify(block)
    assert block == IdBlock(DIGEST, 0x30000, b"\1\2" + bytes(14), bytes(16), 1, 3)
    shown = json.loads(result.output)
    assert base64.b64decode(shown["id_block"]) == block.to_bytes()
    assert base64.b64decode(shown["id_auth"]) == auth.to_bytes()
    assert shown["author_key_digest"] == auth.author_key_digest.hex()


def test_an_id_block_takes_the_digest_of_a_manifest(files: Path) -> None:
    result = run(
        "measure",
        "idblock",
        "--manifest",
        files / "m.json",
        "--policy",
        "0x30000",
        "--id-key",
        files / "id.pem",
    )
    assert result.exit_code == 0, result.output
    assert f"digest             {oracle().hex()}\n" in result.output


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--digest", "00"], "1 bytes, expected 48"),
        (["--digest", "xx"], "'xx' is not hex"),
        ([], "give either --digest or --manifest"),
        (["--digest", DIGEST.hex(), "--manifest", "m.json"], "give either --digest or --manifest"),
        (["--digest", DIGEST.hex(), "--guest-svn", "0x100000000"], "does not fit 32 bits"),
        (["--digest", DIGEST.hex(), "--guest-svn", "many"], "'many' is not a number"),
        (["--digest", DIGEST.hex(), "--author-key", "x.bin"], "no unencrypted PEM key"),
    ],
)
def test_bad_arguments_are_named(files: Path, changes: list[str], text: str) -> None:
    paths = [str(files / change) if change in ("m.json", "x.bin") else change for change in changes]
    result = run("measure", "idblock", "--policy", "0x30000", "--id-key", files / "id.pem", *paths)
    assert result.exit_code != 0
    assert text in result.output


def test_a_report_is_shown_field_by_field(files: Path) -> None:
    result = run("report", "show", files / "report.bin")
    assert result.exit_code == 0
    assert "policy               0x30000\n" in result.output
    assert "platform_info        0x1  (SMT_EN)\n" in result.output
    assert "(bootloader 3, TEE 0, SNP 8, microcode 115)" in result.output
    assert json.loads(run("report", "show", "--json", files / "report.bin").output)["guest_svn"] == 4


def test_a_report_in_hex_is_read_too(files: Path, authority: Authority) -> None:
    text = authority.report().hex()
    (files / "report.hex").write_text(f"{text[:64]}\n{text[64:]}\n", encoding="ascii")
    assert (
        run("report", "show", files / "report.hex").output
        == run("report", "show", files / "report.bin").output
    )


def verify(files: Path, *more: str | Path) -> Result:
    certificates = ("--cert", files / "leaf.der", "--cert", files / "chain.pem")
    return run("report", "verify", files / "report.bin", *certificates, *more)


def test_a_report_is_verified_with_what_is_expected(files: Path) -> None:
    result = verify(
        files, "--root", files / "root.pem", "--measurement", "5a" * 48, "--report-data", b"question".hex()
    )
    assert result.exit_code == 0, result.output
    assert result.output.startswith(
        "verified: signature, certificates, chip, TCB, measurement, report_data\n"
    )
    assert "root: CN=ARK\n" in result.output
    assert "not verified: dates and revocation" in result.output
    assert "taken from the chain itself" in verify(files).output


@pytest.mark.parametrize("repeated", [False, True])
def test_the_root_need_not_be_given_twice(files: Path, authority: Authority, repeated: bool) -> None:
    (files / "ask.pem").write_bytes(authority.intermediate.public_bytes(Encoding.PEM))
    certificates: list[str | Path] = ["--cert", files / "leaf.der", "--cert", files / "ask.pem"]
    more = [*certificates, "--cert", files / "chain.pem"] if repeated else certificates
    result = run("report", "verify", files / "report.bin", *more, "--root", files / "root.pem")
    assert result.exit_code == 0, result.output
    assert "root: CN=ARK\n" in result.output
    assert run("report", "verify", files / "report.bin", *certificates).exit_code == 1


def test_what_was_not_verified_is_not_called_so(files: Path, authority: Authority) -> None:
    (files / "report.bin").write_bytes(authority.report(key_flags=1 << 2))
    result = verify(files)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(
        "verified: signature, certificates, TCB\nnot verified: chip: a VLEK has signed"
    )


def test_a_newer_report_is_shown_and_said_to_be_newer(files: Path, authority: Authority) -> None:
    data = bytearray(authority.report(version=7, chip_id=b"\7" * 8))
    data[0x210] = 0xAB
    (files / "report.bin").write_bytes(data)
    result = run("report", "show", files / "report.bin")
    assert result.exit_code == 0
    assert "version 7 is newer than 5" in result.output
    assert "policy               0x30000\n" in result.output
    assert "unknown at 0x208     0000000000000000ab00" in result.output
    (files / "report.bin").write_bytes(authority.report(version=7))
    assert "not verified: fields that version 7 has added" in verify(files).output


@pytest.mark.parametrize("policy", ["0x10000", "0"])
def test_a_policy_that_no_firmware_takes_is_not_signed(files: Path, policy: str) -> None:
    result = run(
        *("measure", "idblock", "--digest", DIGEST.hex(), "--policy", policy),
        *("--id-key", files / "id.pem", "--block", files / "block"),
    )
    assert result.exit_code == 1
    assert "lacks bit 17, which must be one" in result.output
    assert not (files / "block").exists()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--measurement", "5b" * 48], "measurement is 5a"),
        (["--policy", "0xb0000"], "policy is 0x30000, expected 0xb0000"),
        (["--root", "leaf.der"], "is not the trusted root"),
        (["--root", "other.pem"], "the chain ends in CN=ARK, which is not the trusted root CN=ARK"),
        (["--root", "chain.pem"], "one root is expected, here are 2"),
        (["--root", "x.bin"], "no certificate"),
    ],
)
def test_what_is_not_as_expected_fails(files: Path, more: list[str], text: str) -> None:
    result = verify(files, more[0], files / more[1] if more[0] == "--root" else more[1])
    assert result.exit_code == 1
    assert text in result.output


@pytest.mark.parametrize("change", ["short", "flipped"])
def test_a_damaged_report_fails(files: Path, authority: Authority, change: str) -> None:
    data = bytearray(authority.report())
    if change == "short":
        del data[-1]
    else:
        data[0x90] ^= 1
    (files / "report.bin").write_bytes(data)
    result = verify(files)
    assert result.exit_code == 1
    assert ("1184 bytes, not 1183" if change == "short" else "the signature is not that") in result.output
