# SPDX-License-Identifier: Apache-2.0
"""SNP_LAUNCH_START, UPDATE and FINISH: the order, the page types, and what is refused with which error."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    IdBlock,
    Kvm,
    SevError,
    SevRet,
    SnpPageType,
    SnpPolicy,
    kvm_sev_snp_launch_finish,
    kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update,
)
from kvmpy.coco import sev_platform, snp_cpuid
from kvmpy.coco.idblock import generate_key
from kvmpy.coco.snp_cpuid import CpuidFunction
from kvmpy.coco.snp_digest import PageType, SnpDigest
from kvmpy.coco.snp_launch import IdBlockPair, cpuid_page
from selftests.sev.conftest import MEMORY, PAGES, Bare, BareMaker, read_only, start_snp

pytestmark = pytest.mark.requires("protection:snp")

EINVAL = (errno.EINVAL, 0)
POLICY = 0x30000
NORMAL = SnpPageType.KVM_SEV_SNP_PAGE_TYPE_NORMAL
ZERO = SnpPageType.KVM_SEV_SNP_PAGE_TYPE_ZERO
UNMEASURED = SnpPageType.KVM_SEV_SNP_PAGE_TYPE_UNMEASURED
SECRETS = SnpPageType.KVM_SEV_SNP_PAGE_TYPE_SECRETS
CPUID = SnpPageType.KVM_SEV_SNP_PAGE_TYPE_CPUID


def update(guest: Bare, page: int = 0, pages: int = 1, **fields: int) -> kvm_sev_snp_launch_update:
    """Return the argument that adds *pages* pages from page number *page* of MEMORY on."""
    arg = kvm_sev_snp_launch_update(
        gfn_start=MEMORY.gfn + page,
        uaddr=guest.hva + page * PAGE_SIZE,
        len=pages * PAGE_SIZE,
        type=int(NORMAL),
    )
    for name, value in fields.items():
        setattr(arg, name, value)
    return arg


# START.


def test_start_twice(bare: BareMaker) -> None:
    """SNP_LAUNCH_START succeeds once; the second gives EINVAL."""
    guest_vm = bare("snp")
    arg = kvm_sev_snp_launch_start(policy=POLICY)
    assert guest_vm.raw("SNP_LAUNCH_START", arg) == (0, 0)
    assert guest_vm.raw("SNP_LAUNCH_START", arg) == EINVAL


@pytest.mark.parametrize("flags", [1, 0x8000])
def test_start_flags(bare: BareMaker, flags: int) -> None:
    """SNP_LAUNCH_START has no flags: EINVAL, and the launch can still begin."""
    guest = bare("snp")
    assert guest.raw("SNP_LAUNCH_START", kvm_sev_snp_launch_start(policy=POLICY, flags=flags)) == EINVAL
    assert guest.raw("SNP_LAUNCH_START", kvm_sev_snp_launch_start(policy=POLICY)) == (0, 0)


def test_start_without_bit_17(bare: BareMaker) -> None:
    """A policy without its reserved bit 17, which must be one, gives EINVAL."""
    assert bare("snp").raw("SNP_LAUNCH_START", kvm_sev_snp_launch_start(policy=1 << 16)) == EINVAL


@pytest.mark.requires("sev-attr:KVM_X86_SNP_POLICY_BITS")
def test_start_with_unknown_policy_bits(kvm: Kvm, bare: BareMaker) -> None:
    """Each policy bit that KVM_X86_SNP_POLICY_BITS lacks gives EINVAL."""
    offered = sev_platform.snp_policy_bits(kvm)
    assert offered & int(SnpPolicy(smt=False)), "bit 17 must be on offer"
    guest = bare("snp")
    refused = [bit for bit in range(64) if not offered >> bit & 1]
    assert refused
    for bit in refused:
        arg = kvm_sev_snp_launch_start(policy=POLICY | 1 << bit)
        assert guest.raw("SNP_LAUNCH_START", arg) == EINVAL, f"bit {bit}"
    assert guest.raw("SNP_LAUNCH_START", kvm_sev_snp_launch_start(policy=POLICY)) == (0, 0)


# UPDATE.


def test_update_before_start(bare: BareMaker) -> None:
    """SNP_LAUNCH_UPDATE before START gives EINVAL."""
    guest = bare("snp")
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest)) == EINVAL


@pytest.mark.parametrize(
    "fields",
    [
        {"len": 0},
        {"len": 1},
        {"len": PAGE_SIZE + 8},
        {"flags": 1},
        {"flags": 0x8000},
        {"type": 0},
        {"type": 2},
        {"type": 7},
        {"type": 255},
    ],
    ids=str,
)
def test_update_with_a_bad_field(bare: BareMaker, fields: dict[str, int]) -> None:
    """Lengths that are no pages, flags, and page types that are none (VMSA among them) give EINVAL."""
    guest = bare("snp")
    start_snp(guest)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, **fields)) == EINVAL
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest)) == (0, 0)


def test_update_from_an_unaligned_source(bare: BareMaker) -> None:
    """The source begins a page: EINVAL otherwise, but for ZERO, which has none."""
    guest = bare("snp")
    start_snp(guest)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, uaddr=guest.hva + 8)) == EINVAL
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, uaddr=8, type=int(ZERO))) == (0, 0)


def test_update_outside_memory(bare: BareMaker) -> None:
    """A GFN without a memory slot, or in one without a guest_memfd, gives EINVAL."""
    guest = bare("snp")
    start_snp(guest)
    shared = guest.vm.add_slot(MEMORY + PAGES * PAGE_SIZE, PAGE_SIZE)
    for gfn in (0, MEMORY.gfn - 1, shared.gpa // PAGE_SIZE):
        assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, gfn_start=gfn)) == EINVAL


def test_update_of_a_shared_page(bare: BareMaker) -> None:
    """A page without KVM_MEMORY_ATTRIBUTE_PRIVATE gives EIO without a firmware status."""
    guest = bare("snp")
    start_snp(guest)
    guest.vm.set_memory_attributes(int(MEMORY), PAGE_SIZE, 0)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest)) == (errno.EIO, 0)
    guest.vm.set_memory_attributes(int(MEMORY), PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest)) == (0, 0)


def test_update_of_the_same_page(bare: BareMaker) -> None:
    """A page that is part of the guest already gives EIO without a firmware status."""
    guest = bare("snp")
    start_snp(guest)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest)) == (0, 0)
    for kind in (NORMAL, ZERO):
        assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, type=int(kind))) == (errno.EIO, 0)


def test_update_from_nowhere(bare: BareMaker) -> None:
    """A source that is not mapped gives EIO without a firmware status."""
    guest = bare("snp")
    start_snp(guest)
    # The first page of the address space is never mapped.
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, uaddr=PAGE_SIZE)) == (errno.EIO, 0)
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest)) == (0, 0)


@pytest.mark.parametrize("kind", [NORMAL, UNMEASURED, SECRETS, CPUID], ids=lambda kind: kind.name)
def test_update_from_a_read_only_page(bare: BareMaker, kind: SnpPageType) -> None:
    """A source that cannot be written is good enough, but for a CPUID page, which may be corrected: EIO.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst, KVM_SEV_SNP_LAUNCH_UPDATE: the source is read, and
    written for CPUID pages alone.  kvm_gmem_populate() pins it with FOLL_WRITE only for those.
    """
    guest = bare("snp")
    start_snp(guest)
    page = cpuid_page(guest.vm) if kind == CPUID else b"\x5a" * PAGE_SIZE
    with read_only(page) as uaddr:
        answer = guest.raw("SNP_LAUNCH_UPDATE", update(guest, uaddr=uaddr, type=int(kind)))
        expected = (errno.EIO, 0) if kind == CPUID else (0, 0)
        assert answer == expected, f"{kind.name}: errno and status {answer}, expected {expected}"


def test_update_stops_at_the_end_of_the_slot(bare: BareMaker) -> None:
    """A range that runs over the end of its slot is done up to there, and the argument names the rest."""
    guest = bare("snp")
    start_snp(guest)
    arg = update(guest, PAGES - 2, 5)
    assert guest.raw("SNP_LAUNCH_UPDATE", arg) == (0, 0)
    assert (arg.gfn_start, arg.len) == (MEMORY.gfn + PAGES, 3 * PAGE_SIZE)
    assert arg.uaddr == guest.hva + PAGES * PAGE_SIZE
    assert guest.raw("SNP_LAUNCH_UPDATE", arg) == EINVAL


def test_update_stops_at_a_page_that_fails(bare: BareMaker) -> None:
    """A range with a bad page is done up to it; SevError names the page and how far the range got."""
    guest = bare("snp")
    launching = start_snp(guest)
    bad = MEMORY + 3 * PAGE_SIZE
    guest.vm.set_memory_attributes(int(bad), PAGE_SIZE, 0)
    with pytest.raises(SevError) as caught:
        launching.update(MEMORY, 6 * PAGE_SIZE, NORMAL, guest.hva)
    error = caught.value
    assert (error.errno, error.gpa, error.done) == (errno.EIO, int(bad), 3 * PAGE_SIZE)
    guest.vm.set_memory_attributes(int(bad), PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    launching.update(bad, 3 * PAGE_SIZE, NORMAL, guest.hva + 3 * PAGE_SIZE)


@pytest.mark.parametrize("kind", [kind for kind in SnpPageType if kind])
def test_page_types(bare: BareMaker, kind: SnpPageType) -> None:
    """Every page type is taken, and the argument says that nothing is left."""
    guest = bare("snp")
    start_snp(guest)
    if kind == CPUID:
        guest.vm.memory.write(MEMORY, cpuid_page(guest.vm))
    arg = update(guest, type=int(kind))
    first = arg.uaddr
    answer = guest.raw("SNP_LAUNCH_UPDATE", arg)
    if kind == CPUID and answer == (errno.EIO, int(SevRet.SEV_RET_INVALID_PARAM)):
        # What the firmware corrected it takes.
        answer = guest.raw("SNP_LAUNCH_UPDATE", arg)
    assert answer == (0, 0)
    assert (arg.gfn_start, arg.len) == (MEMORY.gfn + 1, 0)
    assert arg.uaddr == (first if kind == ZERO else first + PAGE_SIZE)


def test_a_cpuid_page_that_the_firmware_corrects(bare: BareMaker) -> None:
    """A CPUID page that claims too much comes back corrected in its source, and is accepted then."""
    guest = bare("snp")
    launching = start_snp(guest)
    boast = [CpuidFunction(0x8000_0008, 0, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF)]
    page = snp_cpuid.pack(boast)
    accepted = launching.update_cpuid(MEMORY, page)
    functions = snp_cpuid.unpack(accepted)
    assert [function.leaf for function in functions] == [0x8000_0008]
    assert snp_cpuid.corrections(boast, functions) != []


def test_a_cpuid_page_of_too_many_functions(bare: BareMaker) -> None:
    """A CPUID page that counts more than 64 functions is refused with INVALID_PARAM."""
    guest = bare("snp")
    start_snp(guest)
    guest.vm.memory.write(MEMORY, (65).to_bytes(4, "little"))
    answer = guest.raw("SNP_LAUNCH_UPDATE", update(guest, type=int(CPUID)))
    assert answer == (errno.EIO, int(SevRet.SEV_RET_INVALID_PARAM))


# FINISH.


def test_finish_before_start(bare: BareMaker) -> None:
    """SNP_LAUNCH_FINISH before START gives EINVAL."""
    assert bare("snp", vcpus=1).raw("SNP_LAUNCH_FINISH", kvm_sev_snp_launch_finish()) == EINVAL


@pytest.mark.parametrize("flags", [1, 0x8000])
def test_finish_flags(bare: BareMaker, flags: int) -> None:
    """SNP_LAUNCH_FINISH has no flags: EINVAL, and the launch can still end."""
    guest = bare("snp", vcpus=1)
    start_snp(guest)
    assert guest.raw("SNP_LAUNCH_FINISH", kvm_sev_snp_launch_finish(flags=flags)) == EINVAL
    assert guest.raw("SNP_LAUNCH_FINISH", kvm_sev_snp_launch_finish()) == (0, 0)


@pytest.mark.parametrize("vcpus", [0, 1, 4])
def test_finish(bare: BareMaker, vcpus: int) -> None:
    """A launch ends with any number of vCPUs, and takes no pages afterwards."""
    guest = bare("snp", vcpus=vcpus)
    launching = start_snp(guest)
    launching.update(MEMORY, 2 * PAGE_SIZE, NORMAL, guest.hva)
    launching.finish()
    assert guest.raw("SNP_LAUNCH_UPDATE", update(guest, 4)) == (
        errno.EIO,
        int(SevRet.SEV_RET_INVALID_GUEST_STATE),
    )


def test_finish_with_an_id_block_from_nowhere(bare: BareMaker) -> None:
    """An ID block or its authentication that cannot be read gives EFAULT."""
    guest = bare("snp")
    start_snp(guest)
    readable = guest.hva
    for block, auth in ((8, readable), (readable, 8)):
        arg = kvm_sev_snp_launch_finish(id_block_en=1, id_block_uaddr=block, id_auth_uaddr=auth)
        assert guest.raw("SNP_LAUNCH_FINISH", arg) == (errno.EFAULT, 0)


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ("digest", SevRet.SEV_RET_BAD_MEASUREMENT),
        ("policy", SevRet.SEV_RET_POLICY_FAILURE),
        ("algorithm", SevRet.SEV_RET_INVALID_PARAM),
        ("signature", SevRet.SEV_RET_BAD_SIGNATURE),
    ],
)
def test_finish_with_a_wrong_id_block(bare: BareMaker, wrong: str, status: SevRet) -> None:
    """An ID block that is wrong from one part on fails for the first: digest, policy, algorithm, signature.

    SNP firmware ABI, 8.18; firmware: snp_mcmd_launch_finish().
    """
    guest = bare("snp")
    launching = start_snp(guest)
    launching.update(MEMORY, PAGE_SIZE, NORMAL, guest.hva)
    parts = ("digest", "policy", "algorithm", "signature")
    right = parts[: parts.index(wrong)]
    digest = SnpDigest()
    digest.add(PageType.NORMAL, int(MEMORY), bytes(PAGE_SIZE))
    block = IdBlock(
        digest.value if "digest" in right else bytes(48),
        int(SnpPolicy(debug="policy" not in right)),
        bytes(16),
        bytes(16),
    )
    auth = bytearray(block.sign(generate_key()).to_bytes())
    auth[0] ^= "algorithm" not in right
    auth[0x40] ^= 1
    with pytest.raises(SevError) as caught:
        launching.finish(id_block=IdBlockPair(block.to_bytes(), bytes(auth)))
    assert (caught.value.errno, caught.value.firmware) == (errno.EIO, status)


def test_the_version_of_an_id_block(bare: BareMaker) -> None:
    """An ID block of a version that there is not is taken: no firmware looks at it.

    snp_mcmd_launch_finish() of AMD's firmware compares digest and policy, and verifies the signatures.
    """
    guest = bare("snp")
    launching = start_snp(guest)
    block = IdBlock(bytes(48), int(SnpPolicy()), bytes(16), bytes(16), version=7)
    auth = block.sign(generate_key())
    launching.finish(id_block=IdBlockPair(block.to_bytes(), auth.to_bytes()))


@pytest.mark.dangerous(unless="snp-finish-twice")
def test_finish_twice(bare: BareMaker) -> None:
    """A second SNP_LAUNCH_FINISH gives EINVAL: the vCPUs are measured already."""
    guest = bare("snp", vcpus=1)
    start_snp(guest).finish()
    assert guest.raw("SNP_LAUNCH_FINISH", kvm_sev_snp_launch_finish()) == EINVAL


def test_host_data(bare: BareMaker) -> None:
    """Host data and the choice of key are taken by SNP_LAUNCH_FINISH."""
    guest = bare("snp", vcpus=1)
    start_snp(guest).finish(host_data=bytes(range(32)), vcek_disabled=False)


@pytest.mark.requires("sev-attr:KVM_X86_SEV_SNP_REQ_CERTS")
def test_req_certs_after_a_vcpu(bare: BareMaker) -> None:
    """SNP_ENABLE_REQ_CERTS comes before the first vCPU: EINVAL afterwards."""
    assert bare("snp", vcpus=1).raw("SNP_ENABLE_REQ_CERTS") == EINVAL
    assert bare("snp").raw("SNP_ENABLE_REQ_CERTS") == (0, 0)


def test_a_launch_that_is_given_up(bare: BareMaker) -> None:
    """A VM closed in the middle of its launch gives its ASID and its pages back."""
    for _ in range(40):
        guest = bare("snp", vcpus=1)
        start_snp(guest).update(MEMORY, PAGES * PAGE_SIZE, NORMAL, guest.hva)
        guest.vm.close()
