# SPDX-License-Identifier: Apache-2.0
"""The SNP launch digest against an independent implementation, and its bad input."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevsnpmeasure.gctx import GCTX

from kvmpy.coco import snp_digest
from kvmpy.coco.snp_digest import PAGE_SIZE, PageType, SnpDigest, VmplPermissions, file_page_digests

GPAS = st.integers(0, (1 << 40) // PAGE_SIZE).map(lambda gfn: gfn * PAGE_SIZE)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Whole pages of repeated short patterns: their content matters, their entropy does not."""
    return b"".join(
        (draw(st.binary(min_size=1, max_size=16)) * PAGE_SIZE)[:PAGE_SIZE]
        for _ in range(draw(st.integers(1, 4)))
    )


STEPS = st.one_of(
    st.tuples(st.just(PageType.NORMAL), GPAS, contents()),
    st.tuples(
        st.sampled_from([PageType.ZERO, PageType.UNMEASURED, PageType.SECRETS, PageType.CPUID]),
        GPAS,
        st.integers(1, 3),
    ),
)


@given(st.lists(STEPS, max_size=12), st.integers(0, 8), st.binary(min_size=1, max_size=64))
def test_random_launches_measure_as_the_oracle_says(
    steps: list[tuple[PageType, int, bytes | int]], vcpus: int, pattern: bytes
) -> None:
    oracle, digest = GCTX(), SnpDigest()
    count = 0
    for kind, gpa, label in steps:
        if isinstance(label, bytes):
            oracle.update_normal_pages(gpa, label)
            digest.add(kind, gpa, label)
            count += len(label) // PAGE_SIZE
            continue
        digest.add(kind, gpa, pages=label)
        count += label
        for page in range(label):
            address = gpa + page * PAGE_SIZE
            if kind is PageType.ZERO:
                oracle.update_zero_pages(address, PAGE_SIZE)
            elif kind is PageType.UNMEASURED:
                oracle.update_unmeasured_pages(address, PAGE_SIZE)
            elif kind is PageType.SECRETS:
                oracle.update_secrets_page(address)
            else:
                oracle.update_cpuid_page(address)
    for index in range(vcpus):
        vmsa = (bytes([index]) + pattern * PAGE_SIZE)[:PAGE_SIZE]
        oracle.update_vmsa_page(vmsa)
        digest.add_vmsa(vmsa)
    assert digest.value == oracle.ld()
    assert digest.pages == count + vcpus


def test_imi_and_permissions_are_at_their_places_in_page_info() -> None:
    page = bytes(range(256)) * 16
    digest = SnpDigest()
    digest.add(PageType.NORMAL, 0x5000, page, imi=True, permissions=VmplPermissions(1, 2, 4))
    info = bytes(48) + hashlib.sha384(page).digest()
    info += bytes([0x70, 0, 1, 1, 4, 2, 1, 0]) + (0x5000).to_bytes(8, "little")
    assert digest.value == hashlib.sha384(info).digest()


def test_a_copy_goes_its_own_way() -> None:
    digest = SnpDigest()
    digest.add(PageType.ZERO, 0)
    before = digest.value
    other = digest.copy()
    other.add(PageType.ZERO, 0x1000)
    assert digest.value == before
    assert other.value != before
    assert (digest.pages, other.pages) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((PageType.NORMAL, 0x1001, bytes(4096)), "not the address"),
        ((PageType.NORMAL, 0x1000, bytes(4095)), "whole number of pages"),
        ((PageType.NORMAL, 0x1000, b""), "whole number of pages"),
        ((PageType.NORMAL, 0x1000, None), "measured by its contents"),
        ((PageType.CPUID, 0x1000, bytes(4096)), "not measured"),
        ((PageType.ZERO, (1 << 52) - 4096 * 0, None), "not the address"),
        ((PageType.NORMAL, -4096, bytes(4096)), "not the address"),
    ],
)
def test_what_no_launch_can_hold_is_refused(arguments: tuple[PageType, int, bytes | None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SnpDigest().add(*arguments)


def test_a_save_area_has_one_page() -> None:
    with pytest.raises(ValueError, match="a VMSA has 4096 bytes, not 8192"):
        SnpDigest().add_vmsa(bytes(8192))


def test_no_pages_are_not_a_launch_step() -> None:
    with pytest.raises(ValueError, match="0 pages cannot be added"):
        SnpDigest().add(PageType.ZERO, 0, pages=0)


def test_several_processes_hash_a_file_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snp_digest, "_CHUNK_PAGES", 3)
    monkeypatch.setattr(snp_digest, "_PARALLEL_FROM", 1)
    data = b"".join(index.to_bytes(2, "little") * (PAGE_SIZE // 2) for index in range(10))
    file = tmp_path / "image"
    file.write_bytes(data)
    expected = [
        hashlib.sha384(data[offset : offset + PAGE_SIZE]).digest()
        for offset in range(0, len(data), PAGE_SIZE)
    ]
    assert list(file_page_digests(file, processes=2)) == expected
    assert list(file_page_digests(file)) == expected


@pytest.mark.parametrize("size", [0, 1, 4097])
def test_a_file_of_no_whole_pages_is_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "image"
    file.write_bytes(bytes(size))
    with pytest.raises(ValueError, match="whole number of pages"):
        list(file_page_digests(file))
