# SPDX-License-Identifier: Apache-2.0
"""The ioctls of a minimal launch are those of docs/launch-streams.md: commands, order, bytes of arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.coco.kvm import Kvm
from kvmpy.coco.policy import SevPolicy, SnpPolicy
from kvmpy.coco.sev_launch import SevInitialised
from kvmpy.coco.snp_launch import SnpInitialised
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.debug.record.command import command_of
from kvmpy.debug.record.model import Record, request_name
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.script import Node, build
from kvmpy.uapi.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_SEV_SNP_PAGE_TYPE_NORMAL, VmType

PAGE = Path(__file__).resolve().parents[2] / "docs" / "launch-streams.md"
MEMORY = Gpa(0x10_0000)
CONTENT = b"\x5a" * PAGE_SIZE


def in_place(kvm: Kvm, *, es: bool) -> None:
    """Launch an SEV or SEV-ES guest of one page, and one vCPU with ES."""
    with kvm.create_vm(int(VmType.KVM_X86_SEV_ES_VM if es else VmType.KVM_X86_SEV_VM)) as vm:
        state = SevInitialised.init2(vm, es=es)
        slot = vm.add_slot(MEMORY, PAGE_SIZE)
        vm.memory.write(MEMORY, CONTENT)
        vm.sev.reg_region(slot.hva, PAGE_SIZE)
        if es:
            vm.create_vcpu()
        launching = state.start(SevPolicy(no_debug=True, es=es)).update_data(MEMORY, PAGE_SIZE)
        (launching.update_vmsa() if es else launching).measure().finish()


def snp(kvm: Kvm) -> None:
    """Launch an SNP guest of one page of code, one of zeroes, and one vCPU."""
    with kvm.create_vm(int(VmType.KVM_X86_SNP_VM)) as vm:
        state = SnpInitialised.init2(vm)
        vm.add_slot(MEMORY, 2 * PAGE_SIZE, gmem=vm.create_guest_memfd(2 * PAGE_SIZE))
        vm.create_vcpu()
        launching = state.start(SnpPolicy())
        vm.set_memory_attributes(int(MEMORY), 2 * PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        launching.update_bytes(MEMORY, CONTENT, KVM_SEV_SNP_PAGE_TYPE_NORMAL)
        launching.update_zero(MEMORY + PAGE_SIZE, PAGE_SIZE).finish(host_data=bytes(range(32)))


LAUNCHES = {
    "sev": lambda kvm: in_place(kvm, es=False),
    "sev-es": lambda kvm: in_place(kvm, es=True),
    "snp": snp,
}


def bytes_of(node: Node) -> Iterator[str]:
    """Yield the bytes of an argument, eight to a word: @@ is an address, ## a descriptor."""
    places = {
        offset: "##" if ref.object else "@@"
        for ref in node.refs
        for offset in range(ref.offset, ref.offset + ref.size)
    }
    digits = [places.get(offset, f"{byte:02x}") for offset, byte in enumerate(node.data)]
    words = ["".join(digits[offset : offset + 8]) for offset in range(0, len(digits), 8)]
    while len(words) > 1 and words[-1] == words[-2] == "00" * 8:
        words.pop()
    yield f"{len(node.data)} bytes: {' '.join(words)}" + (" ..." if 8 * len(words) < len(node.data) else "")
    for ref in node.refs:
        if ref.node is not None and ref.node.struct is not None:
            yield from (f"{ref.node.struct}, {line}" for line in bytes_of(ref.node))


def stream(path: Path) -> list[str]:
    """Return the ioctls of a record as the page has them."""
    lines = []
    for step in build(Record.load(path)).steps:
        ioctl = step.ioctl
        if ioctl is None:
            continue
        lines.append(str(command_of(ioctl) or request_name(ioctl)))
        if step.argument is not None and step.argument.node is not None:
            lines += [f"    {line}" for line in bytes_of(step.argument.node)]
        elif ioctl.arg:
            lines.append(f"    {ioctl.arg:#x}")
    return lines


def documented(name: str) -> list[str]:
    """Return the lines that the page has for a launch; what belongs to an ioctl is indented."""
    told = re.search(rf"^## {name}\n.*?^```\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert told is not None
    return told[1].splitlines()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.requires(f"protection:{name}")) for name in LAUNCHES]
)
def test_stream(name: str, tmp_path: Path) -> None:
    """What a minimal launch asks of KVM is what the page says, byte by byte."""
    path = tmp_path / "launch.rec"
    with Recorder(path), Kvm() as own:
        LAUNCHES[name](own)
    content = stream(path)
    start = content.index("KVM_CREATE_VM")
    assert content[start:] == documented(name)
