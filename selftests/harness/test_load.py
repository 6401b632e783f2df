# SPDX-License-Identifier: Apache-2.0
"""The load: what its vCPUs and the host notice about memory that is not as it must be."""

from __future__ import annotations

import pytest

from kvmpy import (
    PAGE_SIZE,
    GuestError,
    GuestTimeoutError,
    LoadError,
    MakeLoad,
    UnexpectedExitError,
    VcpuKickedError,
    Vector,
)

PAGES = 60
# What is noticed does not depend on how memory is protected.
PLAIN = pytest.mark.protections("none")


def put(memory: memoryview, page: int, word: int, value: int) -> None:
    memory.cast("Q")[page * PAGE_SIZE // 8 + word] = value


@pytest.mark.parametrize("execute", [False, True], ids=["data", "code"])
def test_memory_is_what_the_guest_wrote(make_load: MakeLoad, ring: int, execute: bool) -> None:
    """Memory that nobody touches holds exactly what the vCPUs wrote: for each of them, and for the host.

    Documentation/virt/kvm/api.rst 4.35.
    """
    loaded = make_load(pages=PAGES, ring=ring, execute=execute, readers=1)
    with loaded.load as load:
        for _ in load.turns():
            loaded.check()
    loaded.check()
    before = load.moment()
    assert min(before) > 0
    with load:
        load.wait(PAGES + 1)
    loaded.check()
    assert list(load.written(before, load.moment())) == list(range(PAGES))
    assert len(load.touched(before, before)) == 2


@PLAIN
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (0, "found 0"),
        (1 << 32 | 7 << 9 | 511, "found generation 1"),
        (1 << 60 | 7 << 9 | 511, f"found generation {1 << 28}"),
        (5 << 32 | 6 << 9 | 511, ".*which would be generation 5 of page 6, word 511"),
    ],
    ids=["lost", "older", "newer", "moved"],
)
def test_a_wrong_word_is_found(make_load: MakeLoad, ring: int, value: int, found: str) -> None:
    """A word of another generation, or of another page, is told with vCPU, page and word."""
    loaded = make_load(pages=PAGES, ring=ring)
    load = loaded.load
    with load:
        load.wait(2 * PAGES)
    memory = loaded.memory()
    put(memory, 7, 511, value)
    with pytest.raises(LoadError, match=rf"page 7, word 511: expected generation .*{found}"):
        loaded.check()
    with pytest.raises(LoadError, match=rf"vcpu\d (read|executed) page 7, word 511: expected .*{found}"):  # noqa: SIM117
        with load:
            load.wait(4 * PAGES)
    memory.release()


@PLAIN
def test_wrong_code_is_executed(make_load: MakeLoad) -> None:
    """A page that returns another value than it holds as data is told as executed."""
    loaded = make_load(pages=PAGES, execute=True)
    load = loaded.load
    with load:
        load.wait(2 * PAGES)
    with loaded.memory() as memory:
        put(memory, 9, 256, 0xC3 << 48)  # RET, and what RAX holds by then
    with pytest.raises(LoadError, match="executed page 9, word 257"), load:
        load.wait(2 * PAGES)


@PLAIN
def test_an_exit_that_nobody_expects(make_load: MakeLoad, ring: int) -> None:
    """A vCPU that leaves the guest ends the wait of the test at once; without its memory it does."""
    loaded = make_load(pages=PAGES, ring=ring, vcpus=2)
    load = loaded.load.start()
    load.wait()
    loaded.slot.delete()
    with pytest.raises(UnexpectedExitError, match=r"expected the load to go on, got MmioExit"):
        load.wait(PAGES)
    assert not load.running


@PLAIN
def test_an_exception_in_the_guest(make_load: MakeLoad, ring: int) -> None:
    """A vCPU whose access faults is told with the exception and the address."""
    loaded = make_load(pages=PAGES, ring=ring, vcpus=1)
    loaded.vm.pages.unmap(loaded.load.gva, PAGE_SIZE)
    with pytest.raises(GuestError, match=rf"vcpu0 got #{Vector.PF.name}\(.*0x6000000000"), loaded.load:
        loaded.load.wait(PAGES)


@PLAIN
def test_a_vcpu_that_is_kicked(make_load: MakeLoad, ring: int) -> None:
    """A kick from elsewhere ends the load, which goes on where it was when it is started again."""
    loaded = make_load(pages=PAGES, ring=ring, vcpus=2)
    load = loaded.load
    load.start()
    load.wait(PAGES)
    loaded.vm.vcpus[1].kick()
    with pytest.raises(VcpuKickedError):
        load.wait(1 << 60)
    loaded.check()
    with load:
        load.wait(PAGES)
    loaded.check()


@PLAIN
def test_the_load_that_makes_no_progress(make_load: MakeLoad) -> None:
    """Waiting ends at the deadline, with all threads joined."""
    loaded = make_load(pages=PAGES, vcpus=2, deadline=0.4)
    with pytest.raises(GuestTimeoutError, match="made no"), loaded.load:
        loaded.load.wait(1 << 60)
    assert not loaded.load.running
    assert not any(vcpu.running for vcpu in loaded.vm.vcpus)
