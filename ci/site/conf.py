# SPDX-License-Identifier: Apache-2.0
"""Sphinx: the documentation and the docstrings of the public names as a site (`make site`)."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import kvmpy
from kvmpy import version as _version

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "build" / "reference.rst"

project = "kvmpy"
author = project_copyright = "The kvmpy authors"
version = kvmpy.__version__
release = _version.exact()
extensions = ["myst_parser", "sphinx.ext.autodoc"]
# The repository is the source: links between its files are those of the site.
root_doc = "ci/site/index"
include_patterns = [
    "ci/site/index.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "build/*.rst",
]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"kvmpy {version}"
html_copy_source = False
# Text without a language is what kvmpy prints.
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"


def _directives() -> list[str]:
    stub = Path(kvmpy.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    lines = ["Reference", "=========", "", "What ``from kvmpy import ...`` offers.", ""]
    for topic, name in re.findall(r"(?m)^# ([A-Z]\w+)$|^from \S+ import (\w+) as \w+$", stub):
        if topic:
            lines += [topic, "-" * len(topic), ""]
            continue
        value = getattr(kvmpy, name)
        if inspect.ismodule(value):
            continue
        if not str(getattr(value, "__module__", "kvmpy")).startswith("kvmpy"):
            # An alias: autodoc would take the docstring of what it stands for.
            lines += [f".. py:data:: kvmpy.{name}", ""]
            continue
        kind, members = "data", list[str]()
        if inspect.isclass(value):
            kind = "exception" if issubclass(value, BaseException) else "class"
            members = ["   :members:"]
        elif callable(value):
            kind = "function"
        lines += [f".. auto{kind}:: kvmpy.{name}", *members, ""]
    return lines


REFERENCE.parent.mkdir(exist_ok=True)
REFERENCE.write_text("\n".join(_directives()), encoding="utf-8")
