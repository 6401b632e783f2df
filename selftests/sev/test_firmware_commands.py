# SPDX-License-Identifier: Apache-2.0
"""The software AMD-SP against the table of the firmware's checks: their status, and their order.

docs/software-amd-sp-commands.md is the table; the firmware is AMD's Genoa SEV firmware 1.55.25 (AMD-ASPFW).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import pytest

from kvmpy import SevRet
from kvmpy.coco.sev_session import SESSION_SIZE
from selftests.sev import firmware_table
from selftests.sev.bench import FOLDER, Bench, fields_of
from selftests.sev.bench_commands import BUILDERS
from selftests.sev.bench_scene import PLACES, Scene
from selftests.sev.firmware_table import Check

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
