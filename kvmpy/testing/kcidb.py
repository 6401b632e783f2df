# SPDX-License-Identifier: Apache-2.0
"""JSON reports as a submission to KCIDB, the kernel CI's common database, in version 5.3 of its schema. Pure.

A test whose process or kernel died did not complete, and says nothing of KVM: ERROR.  A failure that is
expected is one, of code that is at fault: FAIL, with an incident of a known issue.  What was selected and not
started is MISS.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvmpy.testing.verdicts import Verdict, once, suite_id

VERSION = {"major": 5, "minor": 3}
ORIGIN = re.compile(r"[a-z0-9_]+")
_STATUS = {
    Verdict.PASS: "PASS",
    Verdict.FAIL: "FAIL",
    Verdict.SKIP: "SKIP",
    Verdict.XFAIL: "FAIL",
    Verdict.LOST: "ERROR",
}
_NOT_STARTED = "MISS"
_ROOT = "kvmpy"
_NOT_IN_PATH = re.compile(r"[^a-zA-Z0-9_-]+")
_MOST = 16384
_DIGITS = 20


@dataclass
class Submission:
    """What is told of *reports* by *origin*; *build* is the id of a build that KCIDB knows already."""

    origin: str
    build: str = ""
    _objects: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def add(self, report: Mapping[str, Any]) -> None:
        """Add all tests of a report. Added twice, it is the same: its ids come from what it says."""
        digest = _digest(report)
        build = self.build or self._own_build(report)
        for number, test in enumerate(_tests(report)):
            identifier = f"{self.origin}:{digest}-{number}"
            status = _STATUS[Verdict(test["verdict"])] if "verdict" in test else _NOT_STARTED
            text = _excerpt(test)
            self._put(
                "tests",
                identifier,
                build_id=build,
                status=status,
                path=path_of(test["id"]),
                comment=_text(test.get("reason") or test.get("promise") or "not started"),
                environment=_environment(report, test),
                misc=_about(report, test),
                **({"log_excerpt": text} if text else {}),
                **({"duration": test["duration"]} if "duration" in test else {}),
            )
            if test.get("verdict") == Verdict.XFAIL:
                self._known_issue(identifier, str(test["reason"]))

    def _own_build(self, report: Mapping[str, Any]) -> str:
        kernel = _text(str(report["host"]["kernel"]))
        identifier = f"{self.origin}:kernel-{_digest(kernel)}"
        self._put("checkouts", identifier, comment=kernel)
        self._put(
            "builds", identifier, checkout_id=identifier, architecture=kernel.split()[-1], comment=kernel
        )
        return identifier

    def _known_issue(self, test: str, reason: str) -> None:
        issue = f"{self.origin}:xfail-{_digest(reason)}"
        self._put("issues", issue, version=1, comment=_text(reason), culprit={"code": True})
        incident = f"{self.origin}:{_digest([issue, test])}"
        self._put("incidents", incident, issue_id=issue, issue_version=1, test_id=test, present=True)

    def _put(self, kind: str, identifier: str, **values: Any) -> None:
        known = self._objects.setdefault(kind, {})
        known.setdefault(identifier, {"id": identifier, "origin": self.origin, **values})

    def document(self) -> dict[str, Any]:
        """Return the submission as JSON-ready values."""
        return {
            "version": VERSION,
            **{kind: list(objects.values()) for kind, objects in self._objects.items()},
        }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _text(text: str) -> str:
    return text.replace("\0", "")[:_MOST]


def path_of(identifier: str) -> str:
    """Return where a test stands in KCIDB's tree of tests: ``kvmpy.memory.test_a.test_b.none-1``."""
    file, _, name = once(identifier).partition("::")
    function, _, parameters = name.partition("[")
    nodes = [_ROOT, *file.removesuffix(".py").split("/"), *function.split("::"), parameters.removesuffix("]")]
    plain = (_NOT_IN_PATH.sub("_", node).strip("_") for node in nodes)
    return ".".join(node for node in plain if node)


def _tests(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from report["tests"]
    for nodeid in report.get("not_run", ()):
        yield {"id": suite_id(nodeid)}


def _excerpt(test: Mapping[str, Any]) -> str:
    parts = (test.get("details"), test.get("postmortem"))
    return _text("\n\n".join(part for part in parts if part))


def _host_of(report: Mapping[str, Any], test: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a fleet's report says of the host that ran a test."""
    hosts: Iterable[Mapping[str, Any]] = report.get("hosts", ())
    return next((host for host in hosts if test.get("host") and host["name"] == test["host"]), {})


def _environment(report: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    summary, host = report["host"], _host_of(report, test)
    platform = str(test.get("platform") or report["platform"])
    misc = {
        "platform": platform,
        "emulated": platform != "host",
        "kernel": host.get("kernel") or summary["kernel"],
        "cpu": host.get("cpu") or summary["cpu"],
        "accelerator": summary.get("accelerator", ""),
        "configuration": host.get("configuration") or summary.get("configuration", ""),
        "host": str(test.get("host") or ""),
        "vendor_modules": summary["vendor_modules"],
        **{name: host[name] for name in ("firmware", "microcode", "class", "labels") if name in host},
    }
    comment = " ".join(word for word in (misc["host"], misc["cpu"]) if word)
    if misc["emulated"]:
        comment = f"emulated platform {platform}, which says nothing of hardware"
    return {"comment": _text(comment), "misc": {name: value for name, value in misc.items() if value != ""}}


def _about(report: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    protection = test.get("protection")
    label = report["host"]["protections"].get(protection, {}).get("label", "") if protection else ""
    misc = {
        "id": test["id"],
        "kvmpy": report["kvmpy"],
        "seed": report["seed"],
        "verdict": str(test.get("verdict", "")),
        "promise": test.get("promise", ""),
        "protection": protection or "",
        # An encryption bit that is emulated encrypts nothing.
        "protection_is": label,
        "missing": test.get("missing", []),
    }
    return {name: value for name, value in misc.items() if value not in ("", [])}
