# SPDX-License-Identifier: Apache-2.0
"""How fast an SNP launch digest is predicted, beside what OpenSSL's SHA-384 allows."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvmpy.coco.snp_digest import PAGE_SIZE, PageType, SnpDigest, file_page_digests
from kvmpy.testing.bench.samples import Figure, Samples

SIZE = 256 << 20
STRETCH = 2 << 20
LIMIT = 1.2
# Blocks of 128 bytes that SHA-384 compresses for a page of 4096 bytes and a PAGE_INFO of 112, padding
# included, and those for the page's bytes in one long message.
_BLOCKS, _BLOCKS_OF_BULK = 33 + 2, 32


def _in_turn(data: bytes) -> tuple[float, float, bytes]:
    """Return the seconds for the digest of *data*, those of OpenSSL for as many blocks, and the digest.

    The two take turns, stretch by stretch: what slows the machine down for a while slows down both.
    """
    view, message, digest = memoryview(data), hashlib.sha384(), SnpDigest()
    taken = allowed = 0.0
    for at in range(0, len(view), STRETCH):
        stretch = view[at : at + STRETCH]
        start = time.perf_counter()
        message.update(stretch)
        between = time.perf_counter()
        digest.add(PageType.NORMAL, at, stretch)
        taken += time.perf_counter() - between
        allowed += between - start
    return taken, allowed * _BLOCKS / _BLOCKS_OF_BULK, digest.value


def measure(rounds: int) -> Iterator[Figure]:
    """Measure one core, and all of them on a file."""
    data = os.urandom(1 << 20) * (SIZE >> 20)
    one, all_cores = Samples(), Samples()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="kvmpy-bench-") as folder:
        file = Path(folder) / "image"
        file.write_bytes(data)
        for _ in range(rounds):
            taken, allowed, value = _in_turn(data)
            one.add(taken, allowed)
            start = time.perf_counter()
            spread = SnpDigest()
            pages = len(data) // PAGE_SIZE
            spread.add_digests(PageType.NORMAL, 0, file_page_digests(file, cores), count=pages)
            all_cores.add(time.perf_counter() - start, allowed)
            if spread.value != value:
                raise RuntimeError("the digest of a file is not that of its bytes")
    yield one.figure(
        "digest",
        f"the launch digest of {SIZE >> 20} MiB on one core, beside as many SHA-384 blocks in one message",
        "s",
        "at most 1.2 times",
        lambda figure: figure.ratio <= LIMIT,
        beside="OpenSSL",
    )
    yield all_cores.figure(
        f"digest-file/{cores}",
        f"the same from a file, with {cores} processes",
        "s",
        beside="OpenSSL",
    )
