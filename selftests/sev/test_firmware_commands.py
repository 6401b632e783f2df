# SPDX-License-Identifier: Apache-2.0
"""The software AMD-SP against the table of the firmware's checks: their status, and their order.

docs/software-amd-sp-commands.md is the table; the firmware is AMD's Genoa SEV firmware 1.55.25 (AMD-ASPFW).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import pytest

from kvmpy import PAGE_SIZE, SIZE_2M, IdBlock, SevRet
from kvmpy.coco import idblock
from kvmpy.coco.rmp import Entry
from kvmpy.coco.sev_session import SESSION_SIZE
from kvmpy.coco.snp_digest import PageType, SnpDigest
from selftests.sev import firmware_table
from selftests.sev.bench import ES_ASID, FOLDER, LARGE, Bench, fields_of
from selftests.sev.bench_commands import BUILDERS
from selftests.sev.bench_scene import PLACES, Scene
from selftests.sev.firmware_table import Check
from selftests.sev.softrmp import host_writes, rmp

pytestmark = [
    pytest.mark.requires("protection:snp"),
    pytest.mark.skipif(
        not (FOLDER / "command").exists(),
        reason="no bench of a software AMD-SP in debugfs: `kvmpy lab build --soft-sev`",
    ),
]

CHECKS = firmware_table.read()
REACHED = [check for check in CHECKS if check.options]
PAIRS = [(check, after) for check in REACHED if (after := firmware_table.behind(REACHED, check))]
# Commands that only a platform which is not initialised takes.
PLATFORMS = {
    "INIT": "uninit",
    "SHUTDOWN": "uninit",
    "INIT_EX": "uninit",
    "FACTORY_RESET": "uninit",
    "SNP_INIT_EX": "no-snp",
    "SNP_SHUTDOWN_EX": "uninit",
}
# What comes as a message: the command that carries it, and where the answer has its status.
MESSAGES = ("MSG_REPORT_REQ", "MSG_KEY_REQ")


@pytest.fixture(name="bench")
def _bench() -> Iterator[Bench]:
    """The commands, below KVM; what a test makes of guests and pages is taken back."""
    bench = Bench()
    try:
        bench.reset()
        yield bench
    finally:
        bench.close()


def surroundings(bench: Bench, platform: str) -> AbstractContextManager[None]:
    """Return what the platform is while the command runs."""
    if platform == "uninit":
        return bench.uninitialised()
    if platform == "no-es":
        return bench.without_es()
    if platform == "no-snp":
        return bench.without_snp()
    assert platform in ("as-is", "init")
    return nullcontext()


def perform(bench: Bench, command: str, options: dict[str, str]) -> str:
    """Run a command in a scene of *options*, and return its status by name."""
    scene = Scene(bench, options)
    platform = scene.word("platform", PLATFORMS.get(command, "as-is"))
    carrier = "SNP_GUEST_REQUEST" if command in MESSAGES else command
    # Guests and pages can be made on a platform without SEV-ES, and not on one that is not initialised.
    with ExitStack() as stack:
        if platform == "no-es":
            stack.enter_context(surroundings(bench, platform))
        fields = BUILDERS[command](scene)
        scene.check()
        if platform != "no-es":
            stack.enter_context(surroundings(bench, platform))
        if platform == "init":
            bench.drop_guests()
        status, after = bench.run(carrier, **fields)
        if not status:
            follow(bench, carrier, after)
        if command in MESSAGES:
            assert status == SevRet.SEV_RET_SUCCESS, f"the message's carrier fails with {status.name}"
            status = answered(scene)
    if command == "PEK_CERT_IMPORT":
        bench.drop_guests()
        bench.must("PEK_GEN")
    if command == "SNP_VLEK_LOAD" and not status:
        with bench.without_snp():
            pass
    return status.name.removeprefix("SEV_RET_")


def follow(bench: Bench, command: str, after: dict[str, int]) -> None:
    """Note what a command has made of guests and pages."""
    if command in ("LAUNCH_START", "RECEIVE_START"):
        bench.guests.append(after["handle"])
    elif command == "DECOMMISSION":
        bench.guests.remove(after["handle"])
    elif command == "SNP_GCTX_CREATE":
        bench.changed(PLACES["gctx"], "context")
    elif command == "SNP_DECOMMISSION":
        bench.changed(PLACES["gctx"], "firmware")
    elif command == "SNP_PAGE_UNSMASH":
        bench.joined()


def answered(scene: Scene) -> SevRet:
    """Open the response to a message, and return the status in it."""
    payload = scene.open(scene.bench.read(PLACES["response"])).payload
    return SevRet(int.from_bytes(payload[:4], "little"))


@pytest.mark.parametrize("command", BUILDERS)
def test_a_command_that_is_right(bench: Bench, command: str) -> None:
    """What no check refuses succeeds: each check of the table fails for its own reason alone."""
    assert perform(bench, command, {}) == "SUCCESS"


@pytest.mark.parametrize("check", REACHED, ids=lambda check: check.name)
def test_a_check(bench: Bench, check: Check) -> None:
    """A command that violates one check has that check's status."""
    assert perform(bench, check.command, check.options) == check.status


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda check: check.name)
def test_the_order(bench: Bench, first: Check, second: Check) -> None:
    """A command that violates two checks has the status of the earlier one."""
    assert perform(bench, first.command, first.options | second.options) == first.status


def test_lengths_that_are_told(bench: Bench) -> None:
    """A buffer that is too small is answered with the length that would do, and INVALID_LEN.

    SEV API, 5.9, 5.11, 5.12, 6.5, 6.8, 6.11.
    """
    told = {
        "PEK_CSR": ("len", 0x824),
        "PDH_CERT_EXPORT": ("pdh_len", 0x824),
        "GET_ID": ("len", 64),
        "LAUNCH_MEASURE": ("len", 48),
        "ATTESTATION": ("len", 0xD0),
        "SEND_START": ("session_len", SESSION_SIZE),
        "SEND_UPDATE_DATA": ("hdr_len", 52),
    }
    for command, (field, size) in told.items():
        fields = BUILDERS[command](Scene(bench, {}))
        assert field in fields_of(command)
        status, after = bench.run(command, **(fields | {field: 1}))
        assert (status, after[field]) == (SevRet.SEV_RET_INVALID_LEN, size), command
        bench.reset()


@pytest.mark.parametrize(
    "kind", [PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("changed", [False, True], ids=["right", "one-byte-off"])
def test_a_launch_page_of_2m(bench: Bench, kind: PageType, changed: bool) -> None:
    """One SNP_LAUNCH_UPDATE of 2 MiB measures its 512 pages one by one, and its entry stays one of 2 MiB.

    Firmware ABI 8.17 and 8.18, table 67: the digest is that of the ID block, or SNP_LAUNCH_FINISH fails.
    """
    count = SIZE_2M // PAGE_SIZE
    text = b"".join((page * 0x1_0001 + 1).to_bytes(PAGE_SIZE, "little") for page in range(count))
    digest = SnpDigest()
    if kind is PageType.NORMAL:
        digest.add(kind, LARGE * PAGE_SIZE, text)
    else:
        digest.add(kind, LARGE * PAGE_SIZE, pages=count)
    expected = bytes([digest.value[0] ^ changed]) + digest.value[1:]
    scene = Scene(bench, {})
    gctx = scene.context("LAUNCH")
    block = IdBlock(expected, scene.snp_policy(), bytes(16), bytes(16))
    bench.page(LARGE, "pre-guest", asid=ES_ASID, large=True)
    bench.write(LARGE, text)
    head = bench.base // PAGE_SIZE + LARGE

    bench.must("SNP_LAUNCH_UPDATE", gctx=gctx, address=bench.address(LARGE), bits=1 | int(kind) << 1)

    entry = Entry(True, LARGE * PAGE_SIZE, ES_ASID, large=True, validated=True)
    assert {pfn: each for pfn, each in rmp().items() if head <= pfn < head + count} == {head: entry}
    content = bytes(SIZE_2M) if kind is PageType.ZERO else text
    assert bench.read(LARGE, SIZE_2M) == content
    status, _ = bench.run(
        "SNP_LAUNCH_FINISH",
        gctx=gctx,
        bits=1,
        id_block=scene.memory("id_block", block.to_bytes()),
        id_auth=scene.memory("id_auth", block.sign(idblock.generate_key()).to_bytes()),
    )
    assert status == (SevRet.SEV_RET_BAD_MEASUREMENT if changed else SevRet.SEV_RET_SUCCESS)


@pytest.mark.parametrize("state", ["guest-valid", "pre-guest", "firmware"])
def test_a_page_of_2m_comes_back(bench: Bench, state: str) -> None:
    """After SNP_PAGE_RECLAIM and RMPUPDATE of 2 MiB the host may write to all 512 pages.

    Firmware ABI 8.30: a pre-guest page becomes the guest's, a firmware page is reclaimed.
    """
    scene = Scene(bench, {})
    gctx = scene.context("LAUNCH")
    head = bench.base // PAGE_SIZE + LARGE
    pages = range(head, head + SIZE_2M // PAGE_SIZE)
    bench.page(LARGE, "firmware" if state == "firmware" else "pre-guest", asid=ES_ASID, large=True)
    if state == "guest-valid":
        kind = int(PageType.UNMEASURED)
        bench.must("SNP_LAUNCH_UPDATE", gctx=gctx, address=bench.address(LARGE), bits=1 | kind << 1)
    assert not any(host_writes(pfn) for pfn in pages)
    status, _ = bench.run("SNP_PAGE_RECLAIM", address=bench.address(LARGE))
    assert status == SevRet.SEV_RET_INVALID_PAGE_SIZE

    bench.release(LARGE)

    assert not rmp().keys() & set(pages)
    assert all(host_writes(pfn) for pfn in pages)
