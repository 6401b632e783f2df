# SPDX-License-Identifier: Apache-2.0
"""The bare side of figures, where it computes something that can be compared."""

from __future__ import annotations

import pytest

from kvmpy.coco.snp_digest import PAGE_SIZE, PageType, SnpDigest
from kvmpy.core.errors import MissingError
from kvmpy.testing.bench import trace
from kvmpy.testing.bench.bare import Bare
from tests.debug.tracing import need_kvm


def test_the_digest_by_c_and_openssl_is_ours() -> None:
    """Stretch by stretch, at addresses that follow each other and at one that does not."""
    try:
        openssl = Bare().openssl()
    except MissingError as error:
        pytest.skip(str(error))
    ours = SnpDigest()
    assert openssl.value == ours.value
    for gpa, count in ((0, 1), (PAGE_SIZE, 3), (1 << 40, 2)):
        pages = bytes(range(256)) * (PAGE_SIZE // 256) * count
        assert openssl.add(gpa, memoryview(pages)) > 0
        ours.add(PageType.NORMAL, gpa, pages)
        assert openssl.value == ours.value


def test_what_tracing_costs_is_measured_both_ways() -> None:
    """Pairs of single ioctls, KVM_RUN sustained under each way to trace, and the tracer's own CPU."""
    need_kvm()
    figures = {figure.name: figure for figure in trace.measure(1, count=4000)}
    ways = ("-q-o", "-s", "-t")
    cpu = {f"trace-cpu{way}" for way in (*ways, "--json-t")}
    assert set(figures) == {"trace-pairs"} | {f"trace-sustained{way}" for way in ways} | cpu
    # The other ways take less for so few ioctls than one start differs from another.
    assert all(figure.kvmpy > 0 for name, figure in figures.items() if name not in cpu - {"trace-cpu-t"})
    assert all(figure.bare > 0 for figure in figures.values())
