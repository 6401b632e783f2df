# SPDX-License-Identifier: Apache-2.0
"""What the tests of demand paging share: pagers that are stopped, and a check of userfaultfd's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import pytest

from kvmpy import PAGE_SIZE, DemandPager, MissingError, PageFault, UffdFeature, Userfaultfd

Handler = Callable[[PageFault], object]


class MakePager(Protocol):
    """Makes a pager that is stopped when the test ends."""

    def __call__(
        self, handler: Handler, *, features: UffdFeature | int = 0, page_size: int = PAGE_SIZE
    ) -> DemandPager: ...


@pytest.fixture
def make_pager() -> Iterator[MakePager]:
    """Pagers that need *features* of userfaultfd: a skip where the kernel lacks one."""
    made: list[DemandPager] = []

    def make(handler: Handler, *, features: UffdFeature | int = 0, page_size: int = PAGE_SIZE) -> DemandPager:
        with Userfaultfd() as probe:
            lacking = UffdFeature(int(features) & ~int(probe.features))
        if lacking:
            raise MissingError(f"userfaultfd feature {lacking!r}", "a kernel whose userfaultfd offers it")
        pager = DemandPager(handler, features=features, page_size=page_size)
        made.append(pager)
        return pager

    yield make
    for pager in made:
        pager.stop()
