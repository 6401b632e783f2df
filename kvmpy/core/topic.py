# SPDX-License-Identifier: Apache-2.0
"""Topics: what belongs together of all that a KVM object can do stands behind one attribute of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

_Topic = TypeVar("_Topic")


class Topic:
    """A part of what its owner can do, such as ``vcpu.lapic``; its ioctls are the owner's.

    A method is named after its ioctl, less what the topic says already: KVM_GET_LAPIC is ``vcpu.lapic.get``.
    """

    _owner: Any

    def __init__(self, owner: object) -> None:
        self._owner = owner


class topic(Generic[_Topic]):
    """An attribute that holds the object's own *kind* of topic, made at first use."""

    def __init__(self, kind: Callable[[Any], _Topic]) -> None:
        self.kind = kind

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, cls: type) -> topic[_Topic]: ...
    @overload
    def __get__(self, owner: object, cls: type) -> _Topic: ...
    def __get__(self, owner: object | None, cls: type) -> _Topic | topic[_Topic]:
        if owner is None:
            return self
        return owner.__dict__.setdefault(self._name, self.kind(owner))  # type: ignore[no-any-return]
