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

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _fail(error: Exception) -> None:
    click.echo(f"kvmpy measure: {error}", err=True)
    sys.exit(1)


def number(bits: int) -> Callable[[str], int]:
    """Return the type of an option: an unsigned number of so many bits, decimal or with 0x."""

    def convert(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            raise click.BadParameter(f"{text!r} is no number") from None
        if not 0 <= value < 1 << bits:
            raise click.BadParameter(f"{text} does not fit {bits} bits")
        return value

    return convert


def hex_bytes(size: int, *, shorter: bool = False) -> Callable[[str], bytes]:
    """Return the type of an option: *size* bytes in hex, or fewer and zeros behind them."""

    def convert(text: str) -> bytes:
        try:
            data = bytes.fromhex(text.removeprefix("0x"))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not hex") from None
        if len(data) > size or (len(data) < size and not shorter):
            raise click.BadParameter(f"{len(data)} bytes, expected {'up to ' if shorter else ''}{size}")
        return data.ljust(size, b"\0")

    return convert


@click.group()
def measure() -> None:
    """Predict launch digests, and make the ID block that lets the firmware compare one."""


def _processes() -> int:
    return len(os.sched_getaffinity(0))


@measure.command()
@click.option("--manifest", required=True, metavar="FILE", type=_FILE, help="What is launched, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Digest and number of pages as JSON.")
def snp(manifest: Path, as_json: bool) -> None:
    """Print the launch digest of an SNP guest, in hex."""
    from kvmpy.coco.manifest import Manifest

    try:
        digest = Manifest.read(manifest).digest(_processes())
    except (ValueError, OSError) as error:
        _fail(error)
    if as_json:
        click.echo(json.dumps({"digest": digest.value.hex(), "pages": digest.pages}))
    else:
        click.echo(digest.value.hex())


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no unencrypted PEM key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(
            f"{path}: not an elliptic curve key; make one with: openssl ecparam -name secp384r1 -genkey"
        )
    return key


@measure.command()
@click.option("--digest", metavar="HEX", type=hex_bytes(48), help="The launch digest, 48 bytes.")
@click.option("--manifest", metavar="FILE", type=_FILE, help="Or what it is computed from.")
@click.option(
    "--policy", required=True, type=number(64), help="The guest policy of the launch, such as 0x30000."
)
@click.option("--id-key", required=True, metavar="PEM", type=_FILE, help="The P-384 key that signs.")
@click.option("--author-key", metavar="PEM", type=_FILE, help="The P-384 key that signs the ID key.")
@click.option("--family-id", type=hex_bytes(16, shorter=True), default="", help="Up to 16 bytes.")
@click.option("--image-id", type=hex_bytes(16, shorter=True), default="", help="Up to 16 bytes.")
@click.option("--guest-svn", type=number(32), default="0", help="The guest's security version number.")
@click.option(
    "--block", "block_file", metavar="FILE", type=click.Path(path_type=Path), help="Write the block."
)
@click.option(
    "--auth", "auth_file", metavar="FILE", type=click.Path(path_type=Path), help="Write the ID_AUTH page."
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, blobs in base64.")
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
    """Sign an ID block: a firmware that is given it refuses every other launch digest."""
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
