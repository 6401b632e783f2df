# SPDX-License-Identifier: Apache-2.0
"""How fast an SNP launch digest is predicted, beside what OpenSSL's SHA-384 allows."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvmpy.coco.snp_digest import PAGE_SIZE, PageType, SnpDigest, file_page_digests
from kvmpy.owned import OwnedFolder
from kvmpy.testing.bench.bare import Bare, BareError, OpenSsl
from kvmpy.testing.bench.samples import Figure, Samples

SIZE = 256 << 20
STRETCH = 2 << 20
LIMIT = 1.2
# Blocks of 128 bytes that SHA-384 compresses for a page of 4096 bytes and a PAGE_INFO of 112, padding
# included, and those for the page's bytes in one long message.
_BLOCKS, _BLOCKS_OF_BULK = 33 + 2, 32


@dataclass
class _Round:
    """Seconds for one digest: by kvmpy, by C with OpenSSL, by OpenSSL for as many blocks in one message."""

    kvmpy: float = 0.0
    bare: float = 0.0
    bulk: float = 0.0
    value: bytes = b""


def _in_turn(openssl: OpenSsl, data: bytes) -> _Round:
    """Measure the three stretch by stretch: what slows the machine down for a while slows all three down."""
    view, message, digest, taken = memoryview(data), hashlib.sha384(), SnpDigest(), _Round()
    for offset in range(0, len(view), STRETCH):
        stretch = view[offset : offset + STRETCH]
        start = time.perf_counter()
        message.update(stretch)
        middle = time.perf_counter()
        digest.add(PageType.NORMAL, offset, stretch)
        taken.kvmpy += time.perf_counter() - middle
        taken.bulk += (middle - start) * _BLOCKS / _BLOCKS_OF_BULK
        taken.bare += openssl.add(offset, stretch) / 1e9
    taken.value = digest.value
    if taken.value != openssl.value:
        raise BareError("the digest by C with OpenSSL is another one")
    return taken


def measure(rounds: int) -> Iterator[Figure]:
    """Measure one core, and all of them on a file."""
    data = os.urandom(1 << 20) * (SIZE >> 20)
    one, bulk, all_cores = Samples(), Samples(), Samples()
    bare = Bare()
    cores = len(os.sched_getaffinity(0))
    pages = SIZE // PAGE_SIZE
    with OwnedFolder("bench") as folder:
        file = folder / "image"
        file.write_bytes(data)
        for _ in range(rounds):
            taken = _in_turn(bare.openssl(), data)
            one.add(taken.kvmpy, taken.bare)
            bulk.add(taken.kvmpy, taken.bulk)
            start = time.perf_counter()
            spread = SnpDigest()
            spread.add_digests(PageType.NORMAL, 0, file_page_digests(file, cores), count=pages)
            all_cores.add(time.perf_counter() - start, taken.bare)
            if spread.value != taken.value:
                raise RuntimeError("the digest of a file is not that of its bytes")
    yield one.figure(
        "digest",
        f"the launch digest of {SIZE >> 20} MiB on one core, beside a C program that hashes with OpenSSL",
        "s",
        "at most 1.2 times",
        lambda figure: figure.ratio <= LIMIT,
    )
    yield bulk.figure(
        "digest-bulk",
        "the same beside as many blocks of SHA-384 in one message",
        "s",
        beside="OpenSSL",
    )
    yield all_cores.figure(f"digest-file/{cores}", f"the same from a file, with {cores} processes", "s")
