# SPDX-License-Identifier: Apache-2.0
"""``kvmpy report``: SNP attestation reports, shown and verified; no KVM is needed."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmpy.cli.numbers import hex_bytes, number

if TYPE_CHECKING:
    from kvmpy.coco.report import Report

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def report() -> None:
    """Show and verify SNP attestation reports."""


def _read(path: Path) -> Report:
    """Read a binary report, or one written in hex."""
    from kvmpy.coco.report import REPORT_SIZE, Report, ReportError

    data = path.read_bytes()
    if len(data) != REPORT_SIZE:
        with suppress(ValueError):  # neither: Report says which length is expected
            data = bytes.fromhex(data.decode("ascii"))
    try:
        return Report(data)
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from None


def _fail(error: Exception) -> None:
    click.echo(f"kvmpy report: {error}", err=True)
    sys.exit(1)


@report.command()
@click.argument("file", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
def show(file: Path, as_json: bool) -> None:
    """Print the fields of a report without checking anything."""
    from kvmpy.coco.report import VERSIONS, SigningKey

    try:
        read = _read(file)
    except (ValueError, OSError) as error:
        _fail(error)
    if as_json:
        click.echo(json.dumps(read.as_dict(), indent=2))
        return
    if read.newer:
        click.echo(
            f"kvmpy report: version {read.version} is newer than {VERSIONS.stop - 1}, the last that kvmpy "
            "knows: what it has added is shown as unknown bytes",
            err=True,
        )
    key = read.signing_key
    words = {
        "platform_info": ", ".join(
            flag.name or "" for flag in type(read.platform_info) if flag in read.platform_info
        ),
        "key_flags": ", ".join(
            [
                f"signed by {key.name if isinstance(key, SigningKey) else f'key {key}'}",
                *(["author key"] if read.author_key_enabled else []),
                *(["chip key masked"] if read.chip_key_masked else []),
            ]
        ),
        **{
            name: str(read.tcb(name))
            for name in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")
        },
    }
    for name, value in read.as_dict().items():
        text = f"{value:#x}" if isinstance(value, int) else value
        click.echo(f"{name:<20} {text}" + (f"  ({words[name]})" if words.get(name) else ""))
    if read.has_fmc is None:
        click.echo("the chip ID is masked: TCBs are shown in the order of families before 1Ah (Turin)")
    for offset, data in read.unknown():
        click.echo(f"unknown at {offset:#05x}     {data.hex()}")


@report.command()
@click.argument("file", type=_FILE)
@click.option("--cert", "certificates", metavar="FILE", type=_FILE, multiple=True, required=True,
              help="PEM or DER, in one file or more: VCEK or VLEK, ASK or ASVK, ARK or --root.")  # fmt: skip
@click.option("--root", metavar="FILE", type=_FILE, help="The trusted ARK (default: the one in the chain).")
@click.option("--policy", type=number(64), help="The expected policy.")
@click.option("--vmpl", type=number(32), help="The expected VMPL.")
@click.option("--measurement", type=hex_bytes(48), help="The expected launch digest.")
@click.option("--host-data", type=hex_bytes(32, shorter=True), help="The expected host data.")
@click.option(
    "--report-data", type=hex_bytes(64, shorter=True), help="The expected report data (from the guest)."
)
@click.option("--id-key-digest", type=hex_bytes(48), help="The expected ID key digest.")
@click.option("--author-key-digest", type=hex_bytes(48), help="The expected author key digest.")
def verify(
    file: Path, certificates: tuple[Path, ...], root: Path | None, **stated: int | bytes | None
) -> None:
    """Verify signature, certificate chain, chip and TCB, and compare fields with expected values."""
    from kvmpy.coco.certificates import Chain, load
    from kvmpy.coco.report import ReportError

    try:
        read = _read(file)
        trusted = load([root.read_bytes()]) if root else []
        if root and len(trusted) != 1:
            raise ReportError(f"{root}: one root is expected, here are {len(trusted)}")
        given = load([path.read_bytes() for path in certificates])
        if not any(certificate.subject == certificate.issuer for certificate in given):
            given += trusted
        chain = Chain.of(given)
        unchecked = chain.verify_report(read, trusted[0] if trusted else None)
        read.expect({name: value for name, value in stated.items() if value is not None})
    except (ValueError, OSError) as error:
        _fail(error)
    checked = ["signature", "certificates", "chip", "TCB"]
    checked += [name for name, value in stated.items() if value is not None]
    click.echo(f"verified: {', '.join(name for name in checked if name not in unchecked)}")
    for name, why in (*unchecked.items(), ("dates and revocation", "kvmpy does not look at them")):
        click.echo(f"not verified: {name}: {why}")
    if read.newer:
        click.echo(f"not verified: fields that version {read.version} has added: they are not known here")
    signer = chain.root.subject.rfc4514_string()
    click.echo(
        f"root: {signer}" + ("" if root else " (taken from the chain itself: give --root to trust one)")
    )
