# SPDX-License-Identifier: Apache-2.0
"""Launches with a firmware image against sev-snp-measure, and images that cannot be measured."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sevsnpmeasure import guest, vcpu_types
from sevsnpmeasure.sev_mode import SevMode

from kvmpy.cli.measure import measure
from kvmpy.coco import ovmf
from kvmpy.coco.firmware_launch import CPU_MODELS, FirmwareLaunch, cpu_signature
from kvmpy.coco.ovmf import KernelHashes, Ovmf, OvmfError
from tests.coco.ovmf_image import HASH_TABLE_GPA, RESET_EIP, SECTIONS, entry, image

MODES = {"snp": SevMode.SEV_SNP, "sev-es": SevMode.SEV_ES, "sev": SevMode.SEV}
# What Debian's package ovmf has; images for SEV are built as AmdSev in newer ones.
INSTALLED = [
    Path("/usr/share/ovmf/OVMF.amdsev.fd"),
    Path("/usr/share/ovmf/OVMF.fd"),
    Path("/usr/share/OVMF/OVMF_CODE_4M.fd"),
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "ovmf.fd").write_bytes(image())
    for name, seed in (("kernel", 2), ("initrd", 3)):
        (tmp_path / name).write_bytes(random.Random(seed).randbytes(5000 * seed))
    return tmp_path


def oracle(mode: str, file: Path, vcpus: int = 1, model: str = "EPYC-Milan", **more: Any) -> str:
    values = {"kernel": "", "initrd": "", "append": "", "guest_features": 1, **more}
    digest: bytes = guest.calc_launch_digest(
        MODES[mode], vcpus, vcpu_types.CPU_SIGS[model], str(file), **values
    )
    return digest.hex()


def run(*arguments: str | Path | int) -> str:
    result = CliRunner().invoke(measure, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output.strip()


def cpus(mode: str, vcpus: int = 1, model: str = "EPYC-Milan") -> list[str]:
    return [] if mode == "sev" else ["--vcpus", str(vcpus), "--vcpu-type", model]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vcpus", [1, 2, 5])
def test_a_launch_measures_as_the_oracle_says(mode: str, vcpus: int, files: Path) -> None:
    digest = run(mode, "--ovmf", files / "ovmf.fd", *cpus(mode, vcpus))
    assert digest == oracle(mode, files / "ovmf.fd", vcpus)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", [0, 1, 2], ids=["kernel", "with-initrd", "with-command-line"])
def test_what_is_booted_directly_is_measured_by_its_hash(mode: str, parts: int, files: Path) -> None:
    more: dict[str, Any] = {"kernel": str(files / "kernel")}
    if parts > 0:
        more["initrd"] = str(files / "initrd")
    if parts > 1:
        more["append"] = "console=ttyS0 quiet"
    options = [word for name, value in more.items() for word in (f"--{name}", value)]
    digest = run(mode, "--ovmf", files / "ovmf.fd", *cpus(mode), *options)
    assert digest == oracle(mode, files / "ovmf.fd", **more)
    assert digest != oracle(mode, files / "ovmf.fd")


@pytest.mark.parametrize("model", sorted(vcpu_types.CPU_SIGS))
def test_models_have_qemus_signatures(model: str, files: Path) -> None:
    assert cpu_signature(model) == vcpu_types.CPU_SIGS[model]
    digest = run("snp", "--ovmf", files / "ovmf.fd", "--vcpus", 1, "--vcpu-sig", vcpu_types.CPU_SIGS[model])
    assert digest == oracle("snp", files / "ovmf.fd", model=model)


def test_features_are_in_the_save_areas(files: Path) -> None:
    digest = run("snp", "--ovmf", files / "ovmf.fd", *cpus("snp"), "--guest-features", "0x21")
    assert digest == oracle("snp", files / "ovmf.fd", guest_features=0x21)


def test_a_start_digest_stands_for_the_image(files: Path) -> None:
    """As with sev-snp-measure's --snp-ovmf-hash the image gives its metadata alone."""
    start = run("snp", "--ovmf", files / "ovmf.fd", "--image-only")
    assert start == guest.calc_snp_ovmf_hash(str(files / "ovmf.fd")).hex()
    whole = run("snp", "--ovmf", files / "ovmf.fd", *cpus("snp", 2))
    other = bytearray(image())
    other[0x2000] ^= 1
    (files / "ovmf.fd").write_bytes(other)
    for option in ("--start-digest", "--snp-ovmf-hash"):
        assert run("snp", "--ovmf", files / "ovmf.fd", *cpus("snp", 2), option, start) == whole
    assert oracle("snp", files / "ovmf.fd", 2, snp_ovmf_hash_str=start) == whole
    assert run("snp", "--ovmf", files / "ovmf.fd", *cpus("snp", 2)) != whole


def test_a_manifest_goes_on_from_a_start_digest(files: Path) -> None:
    (files / "a.json").write_text('{"pages": [{"gpa": 0, "type": "zero"}]}')
    (files / "b.json").write_text('{"pages": [{"gpa": 4096, "type": "secrets"}]}')
    (files / "both.json").write_text(
        '{"pages": [{"gpa": 0, "type": "zero"}, {"gpa": 4096, "type": "secrets"}]}'
    )
    first = run("snp", "--manifest", files / "a.json")
    both = run("snp", "--manifest", files / "both.json")
    assert run("snp", "--manifest", files / "b.json", "--start-digest", first) == both


def test_random_images_measure_as_the_oracle_says(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    generator = random.Random(seed)
    for number in range(8):
        kinds = [generator.choice([1, 2, 3, 4]) for _ in range(generator.randrange(6))]
        sizes = [0x1000 if kind in (2, 3) else 0x1000 * generator.randrange(1, 5) for kind in kinds]
        sections = [(0x10_0000 * index, sizes[index], kind) for index, kind in enumerate(kinds)]
        file = tmp_path / f"{number}.fd"
        file.write_bytes(image(generator.randrange(1, 20), sections, seed=generator.randrange(1 << 32)))
        vcpus, model = generator.randrange(1, 4), generator.choice(sorted(CPU_MODELS))
        digest = run("snp", "--ovmf", file, *cpus("snp", vcpus, model))
        assert digest == oracle("snp", file, vcpus, model)


@pytest.mark.parametrize("file", INSTALLED, ids=lambda file: file.name)
@pytest.mark.parametrize("mode", MODES)
def test_an_installed_image_measures_as_the_oracle_says(mode: str, file: Path, tmp_path: Path) -> None:
    if not file.exists():
        pytest.skip(f"no {file}: apt-get install ovmf")
    image = Ovmf.read(file)
    if mode == "snp" and ovmf.METADATA not in image.table:
        pytest.skip(f"{file} is not built for SNP")
    more: dict[str, Any] = {}
    if image.hash_table_gpa and (mode != "snp" or any(s.kind == 0x10 for s in image.sections())):
        (tmp_path / "kernel").write_bytes(b"kernel")
        more = {"kernel": str(tmp_path / "kernel"), "append": "ro"}
    options = [word for name, value in more.items() for word in (f"--{name}", value)]
    digest = run(mode, "--ovmf", file, *cpus(mode, 4), *options)
    assert digest == oracle(mode, file, 4, **more)


# What is wrong.


def test_the_table_is_read_backwards() -> None:
    read = Ovmf.parse(image())
    assert (read.gpa, read.reset_eip, read.hash_table_gpa) == (0xFFFF_C000, RESET_EIP, HASH_TABLE_GPA)
    assert [(s.gpa, s.size, int(s.kind)) for s in read.sections()] == list(SECTIONS)
    plain = Ovmf.parse(bytes(4096))
    assert plain.table == {}
    assert (plain.reset_eip, plain.hash_table_gpa) == (None, None)


def changed(position: int, data: bytes) -> bytes:
    content = bytearray(image())
    content[position : position + len(data)] = data
    return bytes(content)


TABLE_END = 4 * 4096 - 32


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a whole number of pages"),
        (bytes(4097), "not a whole number of pages"),
        (image(sections=None), "has no SEV metadata"),
        (changed(0x100, b"BSEV"), "b'BSEV' version 1, not b'ASEV'"),
        (changed(0x108, b"\2"), "version 2, not"),
        (changed(0x10C, struct.pack("<I", 7)), "7 sections do not fit"),
        (changed(0x10C, b"\xff\xff\xff\xff"), "sections do not fit"),
        (changed(0x118, struct.pack("<I", 9)), "unknown kind 0x9"),
        (changed(0x110, b"\1"), "SEC_MEM, 0x9000 bytes at 0x800001, is not whole pages"),
        (changed(0x114, bytes(4)), "SEC_MEM, 0x0 bytes"),
        (changed(TABLE_END - 18, b"\1\0"), "table of 1 bytes does not fit"),
        (changed(TABLE_END - 18, b"\xff\xff"), "table of 65535 bytes does not fit"),
        (changed(TABLE_END - 36, b"\xff\xff"), "table entry 00f771de-.* of 65535 bytes does not fit"),
        (changed(TABLE_END - 36, b"\2\0"), "of 2 bytes does not fit"),
    ],
)
def test_what_is_wrong_with_an_image_is_named(data: bytes, text: str) -> None:
    with pytest.raises(OvmfError, match=text):
        FirmwareLaunch(Ovmf.parse(data), 2).snp()


def test_metadata_outside_the_image_are_named() -> None:
    for offset in (8, 5 * 4096):
        metadata = entry(ovmf.METADATA, struct.pack("<I", offset))
        table = metadata + struct.pack("<H", len(metadata) + 18) + ovmf.FOOTER.bytes_le
        data = bytes(4096 - 32 - len(table)) + table + bytes(32)
        with pytest.raises(OvmfError, match=f"{offset:#x} bytes before the end, are not in the image"):
            Ovmf.parse(data).sections()


KERNEL = KernelHashes(bytes(32), bytes(32), bytes(32))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (image(sections=SECTIONS[:4]), "no section for hashes of a kernel: take one that is built as AmdSev"),
        (image(hash_table=None), "no place for hashes of a kernel"),
        (image(hash_table=0), "no place for hashes of a kernel"),
        (image(hash_table=0x80_0000), "0x800000 is not in its section at 0x810000"),
        (image(hash_table=0x81_0FF0), "0x810ff0 is not in its section"),
        (image(reset_eip=None), "does not say where vCPUs but the first start"),
    ],
)
def test_what_an_image_lacks_is_named(data: bytes, text: str) -> None:
    with pytest.raises(OvmfError, match=text):
        FirmwareLaunch(Ovmf.parse(data), 2, kernel=KERNEL).snp()


def test_one_vcpu_needs_no_reset_block() -> None:
    assert FirmwareLaunch(Ovmf.parse(image(reset_eip=None)), 1).sev(es=True).value


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["snp"], "either --manifest or --ovmf"),
        (["snp", "--ovmf", "ovmf.fd", "--manifest", "kernel"], "either --manifest or --ovmf"),
        (["snp", "--manifest", "kernel", "--vcpus", "1"], "a manifest says all of it itself"),
        (["snp", "--ovmf", "ovmf.fd"], "give --vcpus, and either --vcpu-type or --vcpu-sig"),
        (["sev-es", "--ovmf", "ovmf.fd", "--vcpus", "1"], "either --vcpu-type or --vcpu-sig"),
        (["snp", "--ovmf", "ovmf.fd", *cpus("snp"), "--vcpu-sig", "1"], "either --vcpu-type or --vcpu-sig"),
        (["snp", "--ovmf", "ovmf.fd", *cpus("snp", 1, "EPYC-Paris")], "no CPU model 'EPYC-Paris'"),
        (["snp", "--ovmf", "ovmf.fd", *cpus("snp"), "--append", "ro"], "are those of a --kernel"),
        (["sev", "--ovmf", "kernel"], "kernel: 0x2710 bytes are not a whole number of pages"),
        (["snp", "--ovmf", "ovmf.fd", *cpus("snp"), "--start-digest", "00"], "1 bytes, expected 48"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], text: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    result = CliRunner().invoke(measure, arguments)
    assert result.exit_code in (1, 2)
    assert text in result.output
