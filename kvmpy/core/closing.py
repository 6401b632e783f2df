# SPDX-License-Identifier: Apache-2.0
"""What owns a file descriptor: closed by a with block, by close() or, with a warning, when it is dropped."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

_C = TypeVar("_C", bound="Closing")


class Closing(ABC):
    """A context manager that closes itself at its end.

    One that is dropped while it is open warns (ResourceWarning) and closes.
    """

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether there is nothing left to close."""

    @abstractmethod
    def close(self) -> None:
        """Close it; twice is harmless."""

    def __enter__(self: _C) -> _C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            if self.closed:
                return
        except AttributeError:
            return  # it was never made
        # What a VM owns is dropped with it: the VM is what somebody forgot, and closes all.
        owner = getattr(self, "vm", None)
        dropped = self if owner is None or owner.closed else owner
        try:
            warnings.warn(f"{dropped!r} was not closed", ResourceWarning, source=dropped, stacklevel=1)
        finally:
            dropped.close()
            self.close()
