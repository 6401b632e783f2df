# SPDX-License-Identifier: Apache-2.0
"""What others wrote is parsed, not trusted: JSON and values by a schema, with a place in every error.

It imports nothing of kvmpy, so that every room may use it.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class MalformedError(ValueError):
    """A value that is not what its format says; the text names the place, as in ``$.tests[3].id``."""


def _refuse(constant: str) -> NoReturn:
    raise MalformedError(f"{constant} is not a JSON number")


def parse_json(data: str | bytes) -> Any:
    """Return the values of a JSON document; raises MalformedError, also where it is no UTF-8 or too deep."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, parse_constant=_refuse)
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not JSON: {error}") from None


def conform(values: object, kind: type[T]) -> T:
    """Return *values* as *kind*, a msgspec.Struct or another type; raises MalformedError with the place."""
    import msgspec

    try:
        return msgspec.convert(values, kind)
    except (ValueError, RecursionError) as error:
        raise MalformedError(str(error)) from None
