# SPDX-License-Identifier: Apache-2.0
"""``kvmpy measure``: what a launch will measure, computed from files; no KVM is needed."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmpy.cli.numbers import hex_bytes, number

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from kvmpy.coco.firmware_launch import FirmwareLaunch

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _fail(error: Exception) -> None:
    click.echo(f"kvmpy measure: {error}", err=True)
    sys.exit(1)


@click.group()
def measure() -> None:
    """Predict launch digests, and sign ID blocks, with which the firmware checks them."""


def _processes() -> int:
    return len(os.sched_getaffinity(0))


def _kernel_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--append", metavar="TEXT", default="", help="The kernel command line; its hash is measured."
        ),
        click.option("--initrd", metavar="FILE", type=_FILE, help="The initrd; its hash is measured."),
        click.option(
            "--kernel", metavar="FILE", type=_FILE, help="The kernel for direct boot; its hash is measured."
        ),
    ):
        command = option(command)
    return command


_ovmf_option = click.option(
    "--ovmf", required=True, metavar="FILE", type=_FILE, help="The firmware image that QEMU launches."
)


def _vcpu_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--vcpu-sig",
            type=number(32),
            help="Instead of --vcpu-type: EAX of CPUID leaf 1, such as 0xa00f11.",
        ),
        click.option("--vcpu-type", metavar="MODEL", help="QEMU CPU model of the vCPUs, such as EPYC-Milan."),
        click.option("--vcpus", type=click.IntRange(1, 4096), help="Number of vCPUs."),
    ):
        command = option(command)
    return command


def _launch(
    ovmf: Path,
    kernel: Path | None,
    initrd: Path | None,
    append: str,
    vcpus: tuple[int | None, str | None, int | None] | None = None,
) -> FirmwareLaunch:
    from kvmpy.coco.firmware_launch import FirmwareLaunch, cpu_signature
    from kvmpy.coco.ovmf import KernelHashes, Ovmf

    if kernel is None and (initrd or append):
        raise click.UsageError("--initrd and --append are those of a --kernel")
    count, signature = 0, 0
    if vcpus is not None:
        number_of, model, given = vcpus
        if number_of is None or (model is None) == (given is None):
            raise click.UsageError("with --ovmf give --vcpus, and either --vcpu-type or --vcpu-sig")
        count, signature = number_of, cpu_signature(model) if model is not None else given or 0
    hashes = None if kernel is None else KernelHashes.of(kernel, initrd, append)
    return FirmwareLaunch(Ovmf.read(ovmf), count, signature, hashes)


@measure.command()
@click.option(
    "--manifest",
    metavar="FILE",
    type=_FILE,
    help="A JSON list of the launched pages and save areas (docs/measurement.md).",
)
@click.option(
    "--ovmf", metavar="FILE", type=_FILE, help="Instead of --manifest: the firmware image that QEMU launches."
)
@_vcpu_options
@_kernel_options
@click.option("--guest-features", type=number(64), default="0x1", show_default=True, help="SEV_FEATURES.")
@click.option("--start-digest", "--snp-ovmf-hash", metavar="HEX", type=hex_bytes(48),
              help="Start from this digest; with --ovmf it replaces the content of the image.")  # fmt: skip
@click.option(
    "--image-only", is_flag=True, help="Print only the digest of the --ovmf image, for --start-digest."
)
@click.option("--json", "as_json", is_flag=True, help="Print digest and number of pages as JSON.")
def snp(
    manifest: Path | None,
    ovmf: Path | None,
    vcpus: int | None,
    vcpu_type: str | None,
    vcpu_sig: int | None,
    kernel: Path | None,
    initrd: Path | None,
    append: str,
    guest_features: int,
    start_digest: bytes | None,
    image_only: bool,
    as_json: bool,
) -> None:
    """Print the launch digest of an SNP guest, in hex."""
    from kvmpy.coco.manifest import Manifest

    if (manifest is None) == (ovmf is None):
        raise click.UsageError("give either --manifest or --ovmf")
    if ovmf is None and (vcpus or vcpu_type or vcpu_sig or kernel or initrd or append or image_only):
        raise click.UsageError(
            "vCPUs, kernel and --image-only go with --ovmf: a manifest says all of it itself"
        )
    try:
        if ovmf is None:
            digest = Manifest.read(manifest or Path()).digest(_processes(), start_digest)
        elif image_only:
            digest = _launch(ovmf, None, None, "").image()
        else:
            launch = _launch(ovmf, kernel, initrd, append, (vcpus, vcpu_type, vcpu_sig))
            digest = launch.snp(guest_features, start_digest)
    except (ValueError, OSError) as error:
        _fail(error)
    if as_json:
        click.echo(json.dumps({"digest": digest.value.hex(), "pages": digest.pages}))
    else:
        click.echo(digest.value.hex())


@measure.command()
@_ovmf_option
@_kernel_options
def sev(ovmf: Path, kernel: Path | None, initrd: Path | None, append: str) -> None:
    """Print the launch digest of an SEV guest, in hex; LAUNCH_MEASURE returns an HMAC over it."""
    try:
        click.echo(_launch(ovmf, kernel, initrd, append).sev().value.hex())
    except (ValueError, OSError) as error:
        _fail(error)


@measure.command("sev-es")
@_ovmf_option
@_vcpu_options
@_kernel_options
def sev_es(
    ovmf: Path,
    vcpus: int | None,
    vcpu_type: str | None,
    vcpu_sig: int | None,
    kernel: Path | None,
    initrd: Path | None,
    append: str,
) -> None:
    """Print the launch digest of an SEV-ES guest, in hex; LAUNCH_MEASURE returns an HMAC over it."""
    try:
        launch = _launch(ovmf, kernel, initrd, append, (vcpus, vcpu_type, vcpu_sig))
        click.echo(launch.sev(es=True).value.hex())
    except (ValueError, OSError) as error:
        _fail(error)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    from kvmpy.coco.idblock import load_key

    try:
        return load_key(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@measure.command()
@click.option("--digest", metavar="HEX", type=hex_bytes(48), help="The launch digest, 48 bytes.")
@click.option(
    "--manifest", metavar="FILE", type=_FILE, help="Instead of --digest: the manifest to compute it from."
)
@click.option(
    "--policy", required=True, type=number(64), help="The guest policy of the launch, such as 0x30000."
)
@click.option(
    "--id-key", required=True, metavar="PEM", type=_FILE, help="The P-384 key that signs the ID block."
)
@click.option("--author-key", metavar="PEM", type=_FILE, help="The P-384 key that signs the ID key.")
@click.option("--family-id", type=hex_bytes(16, shorter=True), default="", help="At most 16 bytes, in hex.")
@click.option("--image-id", type=hex_bytes(16, shorter=True), default="", help="At most 16 bytes, in hex.")
@click.option("--guest-svn", type=number(32), default="0", help="The guest's security version number.")
@click.option(
    "--block",
    "block_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the ID block to this file.",
)
@click.option(
    "--auth",
    "auth_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the ID_AUTH page to this file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, binary data in base64.")
def idblock(
    digest: bytes | None,
    manifest: Path | None,
    policy: int,
    id_key: Path,
    author_key: Path | None,
    family_id: bytes,
    image_id: bytes,
    guest_svn: int,
    block_file: Path | None,
    auth_file: Path | None,
    as_json: bool,
) -> None:
    """Sign an ID block, with which the firmware refuses any other launch digest."""
    from kvmpy.coco.idblock import IdBlock
    from kvmpy.coco.manifest import Manifest
    from kvmpy.coco.policy import SNP_RESERVED_ONE

    if (digest is None) == (manifest is None):
        raise click.UsageError("give either --digest or --manifest")
    try:
        if not policy & SNP_RESERVED_ONE:
            raise ValueError(
                f"policy {policy:#x} lacks bit 17, which must be one: the firmware refuses every launch"
            )
        expected = digest or Manifest.read(manifest or Path()).digest(_processes()).value
        block = IdBlock(expected, policy, family_id, image_id, 1, guest_svn)
        auth = block.sign(_load_key(id_key), _load_key(author_key) if author_key else None)
        for file, data in ((block_file, block.to_bytes()), (auth_file, auth.to_bytes())):
            if file is not None:
                file.write_bytes(data)
    except (ValueError, OSError) as error:
        _fail(error)
    values = {
        "digest": expected.hex(),
        "policy": f"{policy:#x}",
        "id_key_digest": auth.id_key_digest.hex(),
        "author_key_digest": auth.author_key_digest.hex(),
        "author_key_enabled": auth.author_key_enabled,
        "id_block": base64.b64encode(block.to_bytes()).decode(),
        "id_auth": base64.b64encode(auth.to_bytes()).decode(),
    }
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    for name in ("digest", "policy", "id_key_digest", "author_key_digest", "id_block"):
        click.echo(f"{name:<18} {values[name]}")
