# SPDX-License-Identifier: Apache-2.0
"""What is said of tests that no host can run: the fewest labels that none has together."""

from __future__ import annotations

import pytest

from kvmpy.fleet.members import nobody


@pytest.mark.parametrize(
    ("needs", "offers", "words"),
    [
        (["protection:snp", "root"], ["root"], "snp"),
        (["protection:snp", "KVM_CAP_X"], ["root"], "KVM_CAP_X or snp"),
        (["a", "b"], ["a", "b"], "a together with b"),
        (["a", "b", "c"], ["ab", "bc"], "a together with c"),
        (["a", "b", "c"], ["ab", "bc", "ac"], "a together with b and c"),
    ],
)
def test_what_no_host_has_is_named(needs: list[str], offers: list[str], words: str) -> None:
    known = [frozenset(offer) if len(offer) < 4 else frozenset([offer]) for offer in offers]
    assert nobody(frozenset(needs), known) == f"no host of this fleet has {words}"
