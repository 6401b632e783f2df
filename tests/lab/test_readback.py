# SPDX-License-Identifier: Apache-2.0
"""What was asked for is compared with what is inside, and what differs ends the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvmpy.core import kernel as running
from kvmpy.lab import kernels, qemu, readback, tools
from kvmpy.lab.errors import LabError
from kvmpy.lab.events import _ABSENT, Host
from kvmpy.lab.qemu import Options
from kvmpy.lab.root import Root
from kvmpy.platforms import LARGE_GMEM
from kvmpy.testing import host
from kvmpy.testing.host import HostSummary
from kvmpy.uapi import ffi, lib
from tests.lab.test_session import Lab, lab

__all__ = ["lab"]

PASSES: list[list[Any]] = [["test", "test_a", "passed"], ["end"]]
AS_ASKED: Mapping[str, Any] = {"cpus": 2, "memory": 4095, "nodes": 2}


def refused(image: Path, asked: Mapping[str, Any], inside: Mapping[str, Any]) -> list[str]:
    options = Options(kernels.find(str(image)), **asked)
    return Host(HostSummary("7.2", "cpu", (), "lab", True), **{**AS_ASKED, **inside}).refused(options)


NPT = {"parameters": ("softsev", "kvm_amd.npt=0")}
KNOWN: dict[str, list[str]] = {"kvm": ["tdp_mmu", "halt_poll_ns"], "kvm_amd": []}


@pytest.mark.parametrize(
    ("asked", "inside", "complaint"),
    [
        ({}, {}, []),
        (NPT, {"parameters": {"kvm_amd.npt": "N"}}, []),
        (NPT, {"parameters": {"kvm_amd.npt": "Y"}}, ["kvm_amd.npt is Y inside, not 0"]),
        (NPT, {}, ["the kernel inside has no parameter kvm_amd.npt"]),
        (
            {"parameters": (f"{LARGE_GMEM}=Y",)},
            {"known": KNOWN},
            [
                f"the kernel inside has no parameter {LARGE_GMEM}{_ABSENT[LARGE_GMEM]}",
            ],
        ),
        (
            {"parameters": ("kvm.tdp_mu=N", "kvm_amd.npt=0")},
            {"known": KNOWN},
            [
                "the kernel inside has no parameter kvm.tdp_mu; did you mean kvm.tdp_mmu?",
                "the kernel inside has no parameter kvm_amd.npt",
            ],
        ),
        ({"optional": ("kvm.later=N",)}, {"parameters": {"kvm.later": None}}, []),
        (
            {"optional": ("kvm.later=N",)},
            {"parameters": {"kvm.later": "Y"}},
            ["kvm.later is Y inside, not N"],
        ),
        ({"parameters": ("no5lv",)}, {"ignored": ["no5lv"]}, ["the kernel does not know no5lv"]),
        ({"cpu": ("+la57", "-vgif")}, {"flags": {"la57": True, "vgif": False}}, []),
        (
            {"cpu": ("+la57", "-vgif")},
            {"flags": {"la57": False, "vgif": True}},
            ["the CPU inside has no la57", "the CPU inside has the flag vgif"],
        ),
        ({"cpu": ("-vgif",)}, {}, ["the CPU inside has the flag vgif"]),
        ({}, {"cpus": 1}, ["there are 1 CPUs inside, not 2"]),
        ({"memory": 6144}, {}, ["there are 4095 MiB of memory inside, not 6144"]),
        ({"memory": 2048}, {}, ["there are 4095 MiB of memory inside, not 2048"]),
        ({"nodes": 4}, {}, ["there are 2 NUMA nodes inside, not 4"]),
        ({}, {"nodes": 1}, []),  # none was asked for
    ],
)
def test_what_is_another_one_inside(
    image: Path, cache: Path, asked: dict[str, Any], inside: dict[str, Any], complaint: list[str]
) -> None:
    assert refused(image, asked, inside) == complaint


def test_a_machine_is_described_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from a tree that stands for the kernel's, and from this CPU."""
    folder = tmp_path / "kvm" / "parameters"
    folder.mkdir(parents=True)
    (folder / "tdp_mmu").write_text("Y\n")
    monkeypatch.setattr(running, "SYS_MODULE", tmp_path)
    (tmp_path / "cmdline").write_text("/bin/sh\0/init\0no5lv\0")
    (tmp_path / "environ").write_text("HOME=/\0foo=bar\0")
    (tmp_path / "iomem").write_text(
        "00001000-0009ffff : System RAM\n00100000-3fffffff : System RAM\n  01000000-01bfffff : Kernel code\n"
        "fec00000-fec003ff : IOAPIC 0\n"
    )
    words = ("kvm.tdp_mmu=N", "kvm.tdp_mu=N", "other.name=1", "no5lv", "foo=bar", "quiet")
    monkeypatch.setenv(readback.VARIABLE, readback.asked(words, ("+fpu", "-rtm")))
    told = readback.read(first=tmp_path, iomem=tmp_path / "iomem")
    assert told["parameters"] == {"kvm.tdp_mmu": "Y", "kvm.tdp_mu": None, "other.name": None}
    assert told["known"] == {"kvm": ["tdp_mmu"], "other": []}
    assert told["ignored"] == ["no5lv", "foo=bar"]
    assert told["memory"] == (0x9F000 + 0x3FF00000) >> 20
    assert told["flags"]["fpu"] is True
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize(
    ("word", "early", "ignored"),
    [("no5lvl", False, []), ("no5lvl", True, ["no5lvl"])],
)
def test_a_word_that_the_kernel_knows_before_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, early: bool, ignored: list[str]
) -> None:
    """The kernel hands it to the first process though it has heeded it: its effect is looked for."""
    (tmp_path / "cmdline").write_text(f"/init\0{word}\0")
    (tmp_path / "environ").write_text("")
    (tmp_path / "iomem").write_text("")
    monkeypatch.setattr(host, "cpu_flag", lambda flag: early and flag == "la57")
    monkeypatch.setenv(readback.VARIABLE, readback.asked((word,), ()))
    assert readback.read(first=tmp_path, iomem=tmp_path / "iomem")["ignored"] == ignored


@pytest.mark.parametrize(
    ("flag", "leaf", "register", "bit"),
    [
        ("nrip-save", 0x8000_000A, 3, 3),
        ("cr8legacy", 0x8000_0001, 2, 4),
        ("la57", 7, 2, 16),
        ("avx2", 7, 1, 5),
    ],
)
def test_flags_by_qemus_names(flag: str, leaf: int, register: int, bit: int) -> None:
    """The bit of CPUID that AMD's and Intel's manuals give it."""
    place = ffi.new("uint32_t[4]")
    lib.kvmpy_cpuid(leaf & 0xFFFF_0000, 0, place)
    there = place[0] >= leaf
    lib.kvmpy_cpuid(leaf, 0, place)
    assert readback._has(flag) is (there and bool(place[register] >> bit & 1))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("+la75", "QEMU knows no CPU flag la75; did you mean la57?"),
        ("-vmx-ept", "kvmpy knows no CPUID bit of vmx-ept to read it back"),
    ],
)
def test_flags_that_cannot_be_had(
    word: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / tools.QEMU
    program.write_text(
        "#!/bin/sh\necho 'CPUs: la75'\necho 'Recognized CPUID flags:'\necho '  la57 vmx-ept'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    qemu.check_flag("+la57")
    with pytest.raises(LabError, match=says.replace("?", r"\?")):
        qemu.check_flag(word)


@pytest.mark.parametrize(
    ("cpus", "nodes", "words"),
    [
        (1, None, []),
        (2, 1, []),
        (2, None, ["0,memdev=node0,cpus=0-0", "1,memdev=node1,cpus=1-1"]),
        (3, 2, ["0,memdev=node0,cpus=0-0", "1,memdev=node1,cpus=1-2"]),
        (1, 2, ["0,memdev=node0", "1,memdev=node1,cpus=0-0"]),
    ],
)
def test_nodes_share_cpus_and_memory(
    image: Path, cache: Path, tmp_path: Path, cpus: int, nodes: int | None, words: list[str]
) -> None:
    options = Options(kernels.find(str(image)), cpus, 1025, cpu=("-vgif",), nodes=nodes)
    line = qemu.command_line(options, tmp_path, Root(tmp_path, ()), qemu.Start(tmp_path / "initramfs"))
    assert [word.removeprefix("node,nodeid=") for word in line if word.startswith("node,")] == words
    sizes = [int(word.rpartition("size=")[2][:-1]) for word in line if word.startswith("memory-backend-")]
    assert sum(sizes) == 1025
    assert line[line.index("-cpu") + 1].endswith(",-vgif,enforce")


def test_a_setting_without_effect_ends_the_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what differs, with what the kernel said of the parameter, and without a verdict."""
    monkeypatch.setenv("LAB_PARAMETERS", "kvm.halt_poll_ns=abc")
    says = "[ 0.1] kvm: `abc' invalid for parameter `halt_poll_ns'\n[ 0.2] kvm: `z' invalid\n"
    boot = [["machine", {"parameters": {"kvm.halt_poll_ns": "200000"}}, says], *PASSES]
    ended = lab.run([boot])
    assert ended.status == 3, ended.text
    assert "kvm.halt_poll_ns is 200000 inside, not abc" in ended.text
    assert "the kernel says: [ 0.1] kvm: `abc' invalid" in ended.text
    assert "`z'" not in ended.text
    assert not (lab.folder / "out.json").exists()


def test_a_setting_with_effect_runs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_PARAMETERS", "kvm.halt_poll_ns=0")
    assert lab.run([PASSES]).verdicts() == {"test_a": "pass"}
