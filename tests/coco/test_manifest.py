# SPDX-License-Identifier: Apache-2.0
"""Manifests of SNP launches: their digest, and what is wrong with bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sevsnpmeasure.gctx import GCTX

from kvmpy.coco.manifest import Manifest, ManifestError

PAGE = 4096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "code.bin").write_bytes(b"code" * (2 * PAGE // 4))
    (tmp_path / "odd.bin").write_bytes(b"odd")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "vmsa0.bin").write_bytes(b"\x01" * PAGE)
    (tmp_path / "vmsa1.bin").write_bytes(b"\x02" * PAGE)
    return tmp_path


def manifest(folder: Path, data: Any) -> Path:
    file = folder / "manifest.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    return file


def normal(**changes: Any) -> dict[str, Any]:
    return {"gpa": "0x10000", "type": "normal", "file": "code.bin", **changes}


def test_pages_and_save_areas_are_measured_in_their_order(folder: Path) -> None:
    file = manifest(
        folder,
        {
            "pages": [
                normal(),
                {"gpa": 0x1000, "type": "zero", "pages": 2},
                {"gpa": "0x3000", "type": "unmeasured"},
                {"gpa": "0x4000", "type": "secrets", "pages": 1},
                {"gpa": "0x5000", "type": "cpuid", "pages": 1},
            ],
            "vmsas": ["vmsa0.bin", "vmsa1.bin"],
        },
    )
    oracle = GCTX()
    oracle.update_normal_pages(0x10000, b"code" * (2 * PAGE // 4))
    oracle.update_zero_pages(0x1000, 2 * PAGE)
    oracle.update_unmeasured_pages(0x3000, PAGE)
    oracle.update_secrets_page(0x4000)
    oracle.update_cpuid_page(0x5000)
    oracle.update_vmsa_page(b"\x01" * PAGE)
    oracle.update_vmsa_page(b"\x02" * PAGE)
    digest = Manifest.read(file).digest()
    assert digest.value == oracle.ld()
    assert digest.pages == 9


def test_nothing_measures_zero() -> None:
    assert Manifest.parse({}, Path()).digest().value == bytes(48)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "a manifest is a JSON object"),
        ({"page": []}, "no key 'page'"),
        ({"pages": {}}, "'pages' is a list"),
        ({"vmsas": "vmsa0.bin"}, "'vmsas' is a list"),
        ({"pages": ["x"]}, r"pages\[0\]: an object"),
        ({"pages": [normal(size=1)]}, r"pages\[0\]: no key 'size'"),
        ({"pages": [normal(type="vmsa")]}, r"'type' is one of normal, zero, .*, not 'vmsa'"),
        ({"pages": [normal(type=["normal"])]}, r"'type' is one of"),
        ({"pages": [normal(gpa="0x10001")]}, "0x10001 is not aligned"),
        ({"pages": [normal(gpa="here")]}, "'gpa' is not a number: 'here'"),
        ({"pages": [normal(gpa=True)]}, "'gpa' is a number"),
        ({"pages": [normal(gpa=-4096)]}, "'gpa' is a number"),
        ({"pages": [normal(gpa=None)]}, "'gpa' is a number"),
        ({"pages": [normal(gpa=(1 << 52) - PAGE)]}, "beyond the guest-physical address space"),
        ({"pages": [normal(pages=2)]}, "the file of a normal page says"),
        ({"pages": [normal(file="none.bin")]}, r"pages\[0\]: no file .*none.bin"),
        ({"pages": [normal(file=".")]}, r"pages\[0\]: no file"),
        ({"pages": [{"gpa": 0, "type": "normal"}]}, "a file name is missing"),
        ({"pages": [normal(file="odd.bin")]}, "3 bytes, which is not a whole number of pages"),
        ({"pages": [normal(file="empty.bin")]}, "0 bytes, which is not a whole number of pages"),
        ({"pages": [normal(type="zero")]}, "not measured: no 'file'"),
        ({"pages": [{"gpa": 0, "type": "zero", "pages": 0}]}, "'pages' is at least 1"),
        (
            {"pages": [normal(), {"gpa": "0x11000", "type": "zero"}]},
            r"pages\[1\] at 0x11000 overlaps pages\[0\], 0x10000 to 0x11fff",
        ),
        (
            {
                "pages": [
                    {"gpa": 0x20000, "type": "zero", "pages": 2},
                    {"gpa": 0x1F000, "type": "zero", "pages": 2},
                ]
            },
            r"pages\[0\] at 0x20000 overlaps pages\[1\]",
        ),
        ({"vmsas": ["none.bin"]}, r"vmsas\[0\]: no file"),
        ({"vmsas": ["vmsa0.bin", "code.bin"]}, r"vmsas\[1\]: .*code.bin has 8192 bytes"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, data: Any, text: str) -> None:
    with pytest.raises(ManifestError, match=text):
        Manifest.read(manifest(folder, data))


def test_neighbours_do_not_overlap(folder: Path) -> None:
    data = {"pages": [normal(), {"gpa": "0x12000", "type": "zero"}, {"gpa": "0xf000", "type": "zero"}]}
    assert len(Manifest.read(manifest(folder, data)).runs) == 3


@pytest.mark.parametrize("text", ["{", "\xff"])
def test_no_json_is_said(folder: Path, text: str) -> None:
    file = folder / "manifest.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match="not JSON"):
        Manifest.read(file)
