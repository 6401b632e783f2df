# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator

import pytest

from kvmpy.core.address import PAGE_SIZE
from kvmpy.core.backing import Anonymous, Mapping, MemFd
from kvmpy.core.errors import MissingError
from kvmpy.core.uffd import DemandPager, PageFault, PagerStuckError, Userfaultfd, explain_open_failure
from kvmpy.uapi.constants import UffdFeature, UffdRegisterMode

PAGES = 8
EHWPOISON = 133  # not in Python's errno before 3.14


def zeroes(fault: PageFault) -> None:
    return None


@pytest.fixture(autouse=True)
def permitted() -> None:
    try:
        Userfaultfd().close()
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def area() -> Iterator[Mapping]:
    mapping = Anonymous(huge="never").map(PAGES * PAGE_SIZE)
    yield mapping
    mapping.close()


def content(area: Mapping, page: int) -> bytes:
    return bytes(area.view(page * PAGE_SIZE, PAGE_SIZE))


def test_missing_pages_get_what_the_handler_returns(area: Mapping) -> None:
    def handler(fault: PageFault) -> bytes:
        return bytes([(fault.address - area.hva) // PAGE_SIZE]) * PAGE_SIZE

    with DemandPager(handler) as pager:
        pager.register(area.hva, area.size)
        pager.touch(area.hva, area.size)
    assert [content(area, page)[:2] for page in range(PAGES)] == [bytes([page]) * 2 for page in range(PAGES)]
    assert [fault.address - area.hva for fault in pager.faults] == [page * PAGE_SIZE for page in range(PAGES)]


def test_none_is_a_page_of_zeroes(area: Mapping) -> None:
    with DemandPager(zeroes) as pager:
        pager.register(area.hva, area.size)
        pager.touch(area.hva, PAGE_SIZE)
    assert content(area, 0) == bytes(PAGE_SIZE)


def test_reads_and_writes_are_told_apart(area: Mapping) -> None:
    with DemandPager(zeroes) as pager:
        pager.register(area.hva, area.size)
        pager.touch(area.hva, PAGE_SIZE)
        pager.touch(area.hva + PAGE_SIZE, PAGE_SIZE, write=True)
    assert [fault.write for fault in pager.faults] == [False, True]


def test_write_protection_reports_the_first_write_of_each_page(area: Mapping) -> None:
    area.view(0, area.size)[:] = b"a" * area.size
    with DemandPager(zeroes, features=UffdFeature.UFFD_FEATURE_PAGEFAULT_FLAG_WP) as pager:
        pager.register(area.hva, area.size, UffdRegisterMode.UFFDIO_REGISTER_MODE_WP)
        pager.uffd.writeprotect(area.hva, area.size, True)
        pager.touch(area.hva, area.size)
        assert pager.faults == []
        pager.touch(area.hva + PAGE_SIZE, PAGE_SIZE, write=True)
        pager.touch(area.hva + PAGE_SIZE, PAGE_SIZE, write=True)
    assert [(fault.address, fault.wp) for fault in pager.faults] == [(area.hva + PAGE_SIZE, True)]


def test_minor_faults_map_what_the_file_holds() -> None:
    with Userfaultfd() as probe:
        if UffdFeature.UFFD_FEATURE_MINOR_SHMEM not in probe.features:
            pytest.skip("userfaultfd without UFFD_FEATURE_MINOR_SHMEM: it takes Linux 5.14")
    mapping = MemFd().map(PAGES * PAGE_SIZE)
    os.pwrite(mapping.fd, b"file" * (PAGE_SIZE // 4), 0)
    seen: list[PageFault] = []
    with DemandPager(seen.append, features=UffdFeature.UFFD_FEATURE_MINOR_SHMEM) as pager:
        pager.register(mapping.hva, mapping.size, UffdRegisterMode.UFFDIO_REGISTER_MODE_MINOR)
        pager.touch(mapping.hva, PAGE_SIZE)
    assert [fault.minor for fault in seen] == [True]
    assert content(mapping, 0) == b"file" * (PAGE_SIZE // 4)
    mapping.close()


def test_the_faulting_thread_is_named_on_request(area: Mapping) -> None:
    with DemandPager(zeroes, features=UffdFeature.UFFD_FEATURE_THREAD_ID) as pager:
        pager.register(area.hva, area.size)
        pager.touch(area.hva, PAGE_SIZE)
    assert [fault.thread_id for fault in pager.faults] == [threading.get_native_id()]


def test_a_handler_may_answer_by_itself(area: Mapping) -> None:
    def handler(fault: PageFault) -> object:
        pager.uffd.copy(fault.address, b"self" * (PAGES * PAGE_SIZE // 4))
        return DemandPager.DONE

    pager = DemandPager(handler)
    pager.register(area.hva, area.size)
    pager.touch(area.hva, area.size)
    pager.stop()
    assert len(pager.faults) == 1
    assert content(area, 7)[:4] == b"self"


def test_two_threads_at_one_page_both_go_on(area: Mapping) -> None:
    release = threading.Event()

    def handler(fault: PageFault) -> bytes:
        assert release.wait(10)
        return b"x" * PAGE_SIZE

    with DemandPager(handler) as pager:
        pager.register(area.hva, area.size)
        threads = [threading.Thread(target=pager.touch, args=(area.hva, PAGE_SIZE)) for _ in range(2)]
        for thread in threads:
            thread.start()
        release.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert content(area, 0) == b"x" * PAGE_SIZE


def test_a_page_that_is_there_already_wakes_who_waits_for_it(area: Mapping) -> None:
    def handler(fault: PageFault) -> bytes:
        pager.uffd.copy(fault.address, b"first" + bytes(PAGE_SIZE - 5), wake=False)
        return b"x" * PAGE_SIZE

    with DemandPager(handler) as pager:
        pager.register(area.hva, area.size)
        pager.touch(area.hva, PAGE_SIZE)
    assert content(area, 0)[:6] == b"first\0"


def test_an_error_in_the_handler_frees_the_thread_and_is_raised_by_stop(area: Mapping) -> None:
    def handler(fault: PageFault) -> bytes:
        raise LookupError("no such page")

    pager = DemandPager(handler)
    pager.register(area.hva, area.size)
    pager.touch(area.hva, PAGE_SIZE)
    with pytest.raises(LookupError, match="no such page"):
        pager.stop()
    pager.stop()


def test_a_reply_of_the_wrong_size_is_an_error(area: Mapping) -> None:
    pager = DemandPager(lambda _fault: b"short")
    pager.register(area.hva, area.size)
    pager.touch(area.hva, PAGE_SIZE)
    with pytest.raises(ValueError, match="returned 5 bytes for a page of 4096"):
        pager.stop()


def test_python_code_that_touches_the_memory_does_not_hang(area: Mapping) -> None:
    pager = DemandPager(lambda _fault: b"x" * PAGE_SIZE, patience=0.2)
    pager.register(area.hva, area.size)
    # Reading through a view keeps the interpreter lock, which the handler needs.
    assert area.view(0, 1)[0] == 0
    with pytest.raises(PagerStuckError, match=r"within 0.2 s"):
        pager.stop()


def test_after_stop_the_memory_is_ordinary_and_the_descriptor_closed(area: Mapping) -> None:
    pager = DemandPager(lambda _fault: b"x" * PAGE_SIZE)
    fd = pager.uffd.fd
    pager.register(area.hva, area.size)
    pager.stop()
    assert content(area, 3) == bytes(PAGE_SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ValueError, match="stopped"):
        pager.register(area.hva, area.size)


def test_copy_into_a_page_that_is_there_is_eexist(area: Mapping) -> None:
    with Userfaultfd() as uffd:
        uffd.register(area.hva, area.size, UffdRegisterMode.UFFDIO_REGISTER_MODE_MISSING)
        assert uffd.copy(area.hva, b"1" * PAGE_SIZE) == PAGE_SIZE
        with pytest.raises(FileExistsError, match="UFFDIO_COPY at"):
            uffd.copy(area.hva, b"2" * PAGE_SIZE)
        uffd.unregister(area.hva, area.size)
    assert content(area, 0) == b"1" * PAGE_SIZE


def test_poisoned_pages_are_refused_where_the_kernel_reads_them(area: Mapping) -> None:
    with Userfaultfd() as uffd:
        if UffdFeature.UFFD_FEATURE_POISON not in uffd.features:
            pytest.skip("userfaultfd without UFFD_FEATURE_POISON: it takes Linux 6.6")
        uffd.register(area.hva, area.size, UffdRegisterMode.UFFDIO_REGISTER_MODE_MISSING)
        assert uffd.poison(area.hva, PAGE_SIZE) == PAGE_SIZE
        fd = os.memfd_create("sink")
        with pytest.raises(OSError, match=r".") as caught:
            os.write(fd, area.view(0, PAGE_SIZE))
        os.close(fd)
    assert caught.value.errno in (errno.EFAULT, EHWPOISON)


@pytest.mark.parametrize(("shift", "size"), [(1, PAGE_SIZE), (0, 0), (0, 100)])
def test_ranges_that_are_no_whole_pages_are_refused(area: Mapping, shift: int, size: int) -> None:
    with DemandPager(zeroes) as pager, pytest.raises(ValueError, match="whole pages"):
        pager.register(area.hva + shift, size)


def test_memory_that_cannot_be_registered_is_an_oserror(tmp_path: object) -> None:
    with open(__file__, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as area:
        mapping = Mapping(area, PAGE_SIZE)
        with Userfaultfd() as uffd, pytest.raises(OSError, match="UFFDIO_REGISTER") as caught:
            uffd.register(mapping.hva, PAGE_SIZE, UffdRegisterMode.UFFDIO_REGISTER_MODE_MISSING)
        mapping.close()
    assert caught.value.errno in (errno.EINVAL, errno.EPERM)


def test_unknown_features_are_an_oserror_and_leave_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="UFFDIO_API with features 0x8000000000000000"):
        Userfaultfd(1 << 63)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_permission_names_the_sysctl() -> None:
    error = explain_open_failure(errno.EPERM)
    assert isinstance(error, MissingError)
    assert "vm.unprivileged_userfaultfd=1" in error.how


def test_no_support_names_the_kconfig_option() -> None:
    error = explain_open_failure(errno.ENOSYS)
    assert isinstance(error, MissingError)
    assert "CONFIG_USERFAULTFD" in error.how
