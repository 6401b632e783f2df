# SPDX-License-Identifier: Apache-2.0
"""Launches as chains of states, on a VM that answers by script instead of a firmware."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import Any, cast

import pytest

from kvmpy.coco.launch_state import LaunchStateError
from kvmpy.coco.policy import SevPolicy, SnpPolicy
from kvmpy.coco.sev_launch import SevInitialised
from kvmpy.coco.snp_launch import IdBlockPair, SnpInitialised, SnpLaunching
from kvmpy.core.address import Gpa
from kvmpy.core.sev import VmSev
from kvmpy.core.sev_errors import SevError, SevResult
from kvmpy.core.vm import Vm
from kvmpy.uapi.constants import SevRet, SnpPageType

OK = SevResult(0, 0, 0)
Answer = Callable[[Any], SevResult]


class FakeVm(VmSev):
    """Takes commands down; *answers* may say how one comes back, given its struct."""

    def __init__(self, **answers: Answer) -> None:
        super().__init__(self)
        self.name = "vm"
        self.sev = self
        self.answers = answers
        self.sent: list[str] = []

    def command_raw(
        self,
        command: Any,
        arg: Any = None,
        *,
        sev_fd: int | None = None,  # noqa: ARG002 - the interface
    ) -> SevResult:
        """Note the command and answer it."""
        self.sent.append(command if isinstance(command, str) else command.name.removeprefix("KVM_SEV_"))
        answer = self.answers.get(self.sent[-1])
        return OK if answer is None else answer(arg)


def snp(**answers: Answer) -> tuple[FakeVm, SnpLaunching]:
    """Return a VM in the middle of an SNP launch."""
    vm = FakeVm(**answers)
    return vm, SnpInitialised.init2(cast(Vm, vm)).start(SnpPolicy())


def test_the_order_of_an_sev_es_launch() -> None:
    """Each step sends its command, in order."""
    vm = FakeVm()
    launching = SevInitialised.init2(cast(Vm, vm), es=True).start(SevPolicy(es=True))
    measured = launching.update_vmsa().measure()
    measured.finish()
    assert vm.sent == ["INIT2", "LAUNCH_START", "LAUNCH_UPDATE_VMSA", "LAUNCH_MEASURE", "LAUNCH_FINISH"]


def test_legacy_commands() -> None:
    """INIT and ES_INIT take the place of INIT2 on default VMs."""
    for es, name in ((False, "INIT"), (True, "ES_INIT")):
        vm = FakeVm()
        SevInitialised.legacy_init(cast(Vm, vm), es=es)
        assert vm.sent == [name]


def test_a_state_is_used_once() -> None:
    """A state that a step has left refuses further steps."""
    _, launching = snp()
    launching.finish()
    with pytest.raises(LaunchStateError, match=r"update\(\) on SnpLaunching, which finish\(\) left"):
        launching.update_zero(Gpa(0), 4096)


def test_a_step_that_failed_leaves_the_state() -> None:
    """After an error the same state is still the one to use."""
    results = [SevResult(-1, errno.EIO, int(SevRet.SEV_RET_BAD_MEASUREMENT)), OK]
    _, launching = snp(SNP_LAUNCH_FINISH=lambda _arg: results.pop(0))
    with pytest.raises(SevError) as caught:
        launching.finish()
    assert caught.value.firmware == SevRet.SEV_RET_BAD_MEASUREMENT
    launching.finish()


def test_a_range_in_parts() -> None:
    """KVM may do a part of a range: the command is given again until nothing is left."""
    seen: list[tuple[int, int, int]] = []

    def two_pages(arg: Any) -> SevResult:
        seen.append((int(arg.gfn_start), int(arg.uaddr), int(arg.len)))
        arg.gfn_start += 2
        arg.uaddr += 0x2000
        arg.len -= 0x2000
        return OK

    _, launching = snp(SNP_LAUNCH_UPDATE=two_pages)
    launching.update(Gpa(0x10000), 0x6000, SnpPageType.KVM_SEV_SNP_PAGE_TYPE_NORMAL, 0x7F0000)
    assert seen == [(0x10, 0x7F0000, 0x6000), (0x12, 0x7F2000, 0x4000), (0x14, 0x7F4000, 0x2000)]


def test_a_range_that_fails_on_the_way() -> None:
    """The error names the page, its type, and how far the range got."""
    results = iter([OK, SevResult(-1, errno.EIO, int(SevRet.SEV_RET_INVALID_PAGE_STATE))])

    def first_part(arg: Any) -> SevResult:
        result = next(results)
        if result.ok:
            arg.gfn_start += 3
            arg.len -= 0x3000
        return result

    _, launching = snp(SNP_LAUNCH_UPDATE=first_part)
    with pytest.raises(SevError) as caught:
        launching.update(Gpa(0x10000), 0x6000, SnpPageType.KVM_SEV_SNP_PAGE_TYPE_NORMAL, 0x7F0000)
    error = caught.value
    assert (error.errno, error.firmware, error.gpa, error.done) == (errno.EIO, 0x1A, 0x13000, 0x3000)
    assert "INVALID_PAGE_STATE" in str(error)
    assert "gpa 0x13000, page type NORMAL, 0x3000 of 0x6000 bytes were done before" in str(error)


def test_try_again() -> None:
    """EAGAIN is answered with the same command."""
    results = iter([SevResult(-1, errno.EAGAIN, 0), SevResult(-1, errno.EAGAIN, 0), OK])

    def later(arg: Any) -> SevResult:
        result = next(results)
        if result.ok:
            arg.len = 0
        return result

    vm, launching = snp(SNP_LAUNCH_UPDATE=later)
    launching.update_zero(Gpa(0x1000), 0x1000)
    assert vm.sent.count("SNP_LAUNCH_UPDATE") == 3


def test_a_signal_in_between() -> None:
    """KVM gives EIO without a firmware status when a signal waits: that alone ends no launch."""
    results = [SevResult(-1, errno.EIO, 0), SevResult(-1, errno.EIO, 0)]

    def later(arg: Any) -> SevResult:
        if results:
            return results.pop()
        arg.len = 0
        return OK

    _, launching = snp(SNP_LAUNCH_UPDATE=later)
    launching.update_zero(Gpa(0x1000), 0x1000)
    _, launching = snp(SNP_LAUNCH_UPDATE=lambda _arg: SevResult(-1, errno.EIO, 0))
    with pytest.raises(SevError, match="EIO"):
        launching.update_zero(Gpa(0x1000), 0x1000)


def test_no_progress_is_an_error() -> None:
    """A command that succeeds and does nothing would go on for ever."""
    _, launching = snp(SNP_LAUNCH_UPDATE=lambda _arg: OK)
    with pytest.raises(SevError, match="0x0 of 0x1000 bytes"):
        launching.update_zero(Gpa(0x1000), 0x1000)


def _copy(address: int, size: int = 4096) -> bytes:
    return ctypes.string_at(address, size)


def test_a_cpuid_page_is_repaired() -> None:
    """The firmware's answer to a rejected CPUID page is given back to it."""
    right = b"right".ljust(4096, b"\0")
    given: list[bytes] = []

    def check(arg: Any) -> SevResult:
        given.append(_copy(int(arg.uaddr)))
        if given[-1] != right:
            ctypes.memmove(int(arg.uaddr), right, 4096)
            return SevResult(-1, errno.EIO, int(SevRet.SEV_RET_INVALID_PARAM))
        arg.len = 0
        return OK

    _, launching = snp(SNP_LAUNCH_UPDATE=check)
    wrong = b"wrong".ljust(4096, b"\0")
    assert launching.update_cpuid(Gpa(0x1000), wrong) == right
    assert given == [wrong, right]


def test_bytes_are_given_page_aligned() -> None:
    """KVM takes page-aligned sources only."""
    given: list[tuple[int, bytes]] = []

    def take(arg: Any) -> SevResult:
        given.append((int(arg.uaddr) % 4096, _copy(int(arg.uaddr), int(arg.len))))
        arg.len = 0
        return OK

    _, launching = snp(SNP_LAUNCH_UPDATE=take)
    launching.update_bytes(Gpa(0x1000), b"\x5a" * 8192, SnpPageType.KVM_SEV_SNP_PAGE_TYPE_NORMAL)
    assert given == [(0, b"\x5a" * 8192)]


def test_an_id_block() -> None:
    """ID block and authentication go to LAUNCH_FINISH with their enables."""
    by_name: dict[str, object] = {}

    def take(arg: Any) -> SevResult:
        by_name.update(
            block=_copy(int(arg.id_block_uaddr), 96),
            auth=_copy(int(arg.id_auth_uaddr)),
            enables=(arg.id_block_en, arg.auth_key_en, arg.vcek_disabled),
            host_data=bytes(arg.host_data),
        )
        return OK

    _, launching = snp(SNP_LAUNCH_FINISH=take)
    pair = IdBlockPair(b"\1" * 96, b"\2" * 4096, author_key=True)
    launching.finish(id_block=pair, host_data=b"\3" * 32)
    assert by_name == {
        "block": b"\1" * 96,
        "auth": b"\2" * 4096,
        "enables": (1, 1, 0),
        "host_data": b"\3" * 32,
    }


def test_lengths_are_checked() -> None:
    """What has a fixed size is refused in any other."""
    with pytest.raises(ValueError, match="96 bytes"):
        IdBlockPair(b"", b"")
    _, launching = snp()
    with pytest.raises(ValueError, match="32 bytes, not 3"):
        launching.finish(host_data=b"abc")
    vm = FakeVm()
    with pytest.raises(ValueError, match="gosvw has 16 bytes"):
        SnpInitialised.init2(cast(Vm, vm)).start(SnpPolicy(), gosvw=b"")
    assert vm.sent == ["INIT2"]


def test_unaligned_data() -> None:
    """LAUNCH_UPDATE_DATA works on 16 bytes at a time."""
    launching = SevInitialised.init2(cast(Vm, FakeVm()), es=False).start(0)
    with pytest.raises(ValueError, match="multiples of 16"):
        launching.update_data(Gpa(8), 16)
