# SPDX-License-Identifier: Apache-2.0
"""Sequences of VMRUN that nobody thought of."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE
from selftests.nested import machine
from selftests.nested.conftest import Notes

pytestmark = [
    pytest.mark.protections("none"),
    pytest.mark.requires("cpuid:svm"),
    pytest.mark.timeout(600),
]


def test_any_sequence(notes: Notes, seed: int) -> None:
    """After any sequence of runs, intercepts, events, saves and changes of memory L1 sees what it must.

    AMD APM volume 2, chapter 15.
    """
    vm = notes.l2.vm
    pages = vm.alloc(PAGE_SIZE), vm.alloc(PAGE_SIZE)
    vm.map(machine.WHERE, vm.gva_to_gpa(pages[0]), PAGE_SIZE, page_size=PAGE_SIZE, nx=True)
    table = vm.pages.walk(machine.WHERE).steps[-1].table
    # L1 sees the table that maps the page at the address behind it.
    window = machine.WHERE + PAGE_SIZE
    vm.map(window, vm.from_raw(table)[0], PAGE_SIZE, page_size=PAGE_SIZE, nx=True)
    machine.run(notes, pages, seed, examples=30, steps=30)
