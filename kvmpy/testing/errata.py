# SPDX-License-Identifier: Apache-2.0
"""Known bugs of given KVMs: which selftest fails on which host, why, and where that is written.

An entry is strict both ways: its test must fail where the entry applies, and a pass is reported as stale.
The format is described in docs/errata.md. Pure: no KVM, no pytest.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILTIN = Path(__file__).with_name("errata.toml")
_VERSION_LENGTH = 100
CONDITIONS = frozenset({"kernel", "module", "cpu", "platform", "protection"})
# "param:kvm_amd.npt", as the marker requires has it.
_PARAMETER = re.compile(r"param:(\w+\.\w+)")


class ErrataError(ValueError):
    """An errata file that cannot be used; the message names file and entry."""


@dataclass(frozen=True)
class HostFacts:
    """What an entry's condition can ask about: kernel release, vendor module, CPU model and platform.

    ``parameters`` are those of KVM's modules, by names such as ``kvm_amd.npt``.
    """

    kernel: str
    module: str
    cpu: str
    platform: str = "host"
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Erratum:
    """One known bug. ``test`` and the text conditions are patterns with ``*`` and ``?``.

    A condition may have several, with ``|`` between them.
    """

    test: str
    reason: str
    origin: str
    when: Mapping[str, str]
    message: str = ""
    source: str = ""

    def covers(self, identifier: str) -> bool:
        """Whether the test with this suite id is meant."""
        return glob_match(self.test, identifier)

    def applies(self, facts: HostFacts, protection: str | None) -> bool:
        """Whether the condition holds on this host and under *protection*."""
        for key, wanted in self.when.items():
            if key == "kernel":
                if not kernel_in_range(facts.kernel, wanted):
                    return False
            elif key == "protection":
                if not _one_of(wanted, protection or ""):
                    return False
            elif key == "module":
                # A kernel may have several vendor modules built in.
                if not any(_one_of(wanted, name) for name in (facts.module, *facts.module.split())):
                    return False
            elif parameter := _PARAMETER.fullmatch(key):
                # A parameter that is not there has no value: no pattern holds.
                value = facts.parameters.get(parameter[1])
                if value is None or not _one_of(wanted, value):
                    return False
            elif not _one_of(wanted, getattr(facts, key)):
                return False
        return True

    def explains(self, failure: str) -> bool:
        """Whether a failure with this text is the known one: any, or the one that holds ``message``."""
        return self.message in failure


def _one_of(patterns: str, text: str) -> bool:
    return any(glob_match(pattern, text) for pattern in patterns.split("|"))


def glob_match(pattern: str, text: str) -> bool:
    """Match a pattern where ``*`` and ``?`` are wild and brackets stand for themselves."""
    return _compiled(pattern).fullmatch(text) is not None


# Every test is compared with every entry.
@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    # fnmatch's expressions take no exponential time, whatever the pattern.
    return re.compile(fnmatch.translate(pattern.replace("[", "[[]")))


def _version(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", text)
    if not match:
        raise ErrataError(f"not a kernel version: {text!r}")
    if len(match[0]) > _VERSION_LENGTH:
        raise ErrataError(f"not a kernel version: {match[0][:_VERSION_LENGTH]}...")
    return tuple(int(part) for part in match[0].split("."))


def kernel_in_range(release: str, wanted: str) -> bool:
    """Whether *release* (``6.18.44-foo``) fulfils every comparison of *wanted* (``>=6.18,<6.19``).

    A comparison looks at as many numbers as it gives: ``==6.18`` holds for every 6.18.y.
    """
    here = _version(release)
    for part in wanted.split(","):
        matched = re.fullmatch(r"\s*(<=|>=|==|<|>)\s*([\d.]+)\s*", part)
        if not matched:
            raise ErrataError(f"kernel condition {wanted!r}: write comparisons such as '>=6.18,<6.19'")
        bound = _version(matched[2])
        have = (here + (0,) * len(bound))[: len(bound)]
        holds = {
            "<": have < bound,
            "<=": have <= bound,
            ">": have > bound,
            ">=": have >= bound,
            "==": have == bound,
        }[matched[1]]
        if not holds:
            return False
    return True


def _entry(raw: object, where: str) -> Erratum:
    if not isinstance(raw, dict):
        raise ErrataError(f"{where}: an entry is a table, [[erratum]]")
    unknown = set(raw) - {"test", "reason", "origin", "when", "message"}
    if unknown:
        raise ErrataError(f"{where}: unknown keys {', '.join(sorted(unknown))}")
    for key in ("test", "reason", "origin"):
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise ErrataError(f"{where}: '{key}' is needed, as text")
    when = raw.get("when", {})
    known = ", ".join([*sorted(CONDITIONS), "param:MODULE.NAME"])
    if not isinstance(when, dict) or not when:
        raise ErrataError(f"{where}: 'when' is needed, a condition on {known}")
    if odd := sorted(key for key in when if key not in CONDITIONS and not _PARAMETER.fullmatch(key)):
        raise ErrataError(f"{where}: unknown conditions {', '.join(odd)}; known are {known}")
    if not isinstance(raw.get("message", ""), str):
        raise ErrataError(f"{where}: 'message' is text")
    if not all(isinstance(value, str) for value in when.values()):
        raise ErrataError(f"{where}: conditions are text")
    if "kernel" in when:
        try:
            kernel_in_range("0", when["kernel"])
        except ErrataError as error:
            raise ErrataError(f"{where}: {error}") from None
    return Erratum(raw["test"], raw["reason"], raw["origin"], when, str(raw.get("message", "")), where)


def load(paths: Iterable[Path]) -> list[Erratum]:
    """Read errata files; ErrataError for one that is not TOML or has an entry that says too little."""
    entries = []
    for path in paths:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ErrataError(f"{path}: {error}") from error
        if set(data) - {"erratum"}:
            raise ErrataError(f"{path}: only [[erratum]] entries belong here")
        listed = data.get("erratum", [])
        if not isinstance(listed, list):
            raise ErrataError(f"{path}: only [[erratum]] entries belong here")
        for number, raw in enumerate(listed, 1):
            entries.append(_entry(raw, f"{path.name} entry {number}"))
    return entries


def find(
    entries: Iterable[Erratum], identifier: str, facts: HostFacts, protection: str | None
) -> Erratum | None:
    """Return the first entry that covers this test on this host."""
    return next((e for e in entries if e.covers(identifier) and e.applies(facts, protection)), None)
