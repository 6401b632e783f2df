# SPDX-License-Identifier: Apache-2.0
"""``with refused(errno.EINVAL):`` for what KVM must not do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmpy.core.errors import KvmError


@contextmanager
def refused(
    *errnos: int, match: str | None = None, by: type[OSError] = KvmError, about: object = None
) -> Iterator[pytest.ExceptionInfo[OSError]]:
    """Expect that the block's call fails with one of *errnos*.

    *match* is a regular expression for the message; *by* is OSError where another system call than KVM's
    ioctl refuses; *about* is shown when the test fails, to tell the cases of a loop apart.  The value is
    the exception, to be looked at behind the block.  The test fails when the call succeeds, and when it
    fails with another errno.
    """
    __tracebackhide__ = True
    expected = " or ".join(errno.errorcode.get(number, str(number)) for number in errnos)
    case = "" if about is None else f"{about}: "
    with pytest.raises(by, match=match) as caught:  # noqa: PT012 - the block is the caller's
        yield caught
        pytest.fail(f"{case}accepted, expected {expected}")
    number = caught.value.errno
    if number not in errnos:
        name = errno.errorcode.get(number or 0, str(number))
        pytest.fail(f"{case}refused with {name}, expected {expected}: {caught.value}")
