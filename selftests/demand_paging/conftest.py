# SPDX-License-Identifier: Apache-2.0
"""What the tests of demand paging share: pagers that are stopped, and a check of userfaultfd's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from kvmpy import PAGE_SIZE, DemandPager, MissingError, PageFault, UffdFeature, Userfaultfd

Handler = Callable[[PageFault], object]


@dataclass
class MakePager:
    """Makes pagers that need *features* of userfaultfd: a skip where the kernel lacks one."""

    pagers: list[DemandPager] = field(default_factory=list)

    def __call__(
        self, handler: Handler, *, features: UffdFeature | int = 0, page_size: int = PAGE_SIZE
    ) -> DemandPager:
        """Make a pager that is stopped when the test ends."""
        with Userfaultfd() as probe:
            lacking = UffdFeature(int(features) & ~int(probe.features))
        if lacking:
            raise MissingError(f"userfaultfd feature {lacking!r}", "a kernel whose userfaultfd offers it")
        self.pagers.append(DemandPager(handler, features=features, page_size=page_size))
        return self.pagers[-1]


@pytest.fixture
def make_pager() -> Iterator[MakePager]:
    make = MakePager()
    yield make
    for pager in make.pagers:
        pager.stop()
