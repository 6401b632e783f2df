# SPDX-License-Identifier: Apache-2.0
"""The AES-GCM that guests have, run in a guest, against OpenSSL's."""

from __future__ import annotations

import random

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvmpy.testing.fixtures import MakeVm

GUEST = """
#include <kvmpy/guest.h>
#include <kvmpy/gcm.h>

GUEST_SHARED u8 key[32], iv[12], known[64], text[512], tag[16];
GUEST_SHARED u64 known_size, size, opens;

void guest_main(void)
{
	for (;;) {
		u64 answer = 1;

		if (opens)
			answer = gcm_open(key, iv, known, known_size, text, size, tag);
		else
			gcm_seal(key, iv, known, known_size, text, size, tag);
		GUEST_SYNC(answer);
	}
}
"""
SIZES = [(0, 1), (48, 96), (1, 15), (16, 16), (17, 33), (64, 512)]


@pytest.mark.requires("kvm")
@pytest.mark.protections("none")
@pytest.mark.parametrize(("known_size", "size"), SIZES)
def test_what_a_guest_seals_and_opens(make_vm: MakeVm, known_size: int, size: int, seed: int) -> None:
    """Ciphertext and tag are OpenSSL's; it opens again, and not after any bit was flipped."""
    generator = random.Random(f"{seed} {size}")
    key, iv, known, text = (generator.randbytes(length) for length in (32, 12, known_size, size))
    sealed = AESGCM(key).encrypt(iv, text, known)
    vm = make_vm(GUEST)
    vm.launch()

    def put(**values: bytes) -> None:
        for name, data in values.items():
            vm.symbol(name).bytes = data.ljust(vm.symbol(name).size, b"\0")

    put(key=key, iv=iv, known=known, text=text)
    vm.symbol("known_size").u64, vm.symbol("size").u64 = known_size, size
    vm.vcpus[0].sync()
    assert vm.symbol("text").bytes[:size] + vm.symbol("tag").bytes == sealed
    vm.symbol("opens").u64 = 1
    assert vm.vcpus[0].sync().args == (1,)
    assert vm.symbol("text").bytes[:size] == text
    for name, data in (("text", sealed[:size]), ("tag", sealed[size:]), ("known", known), ("iv", iv)):
        if not data:
            continue
        put(text=sealed[:size], tag=sealed[size:], known=known, iv=iv)
        flipped = bytearray(data)
        bit = generator.randrange(8 * len(data))
        flipped[bit // 8] ^= 1 << bit % 8
        put(**{name: bytes(flipped)})
        assert vm.vcpus[0].sync().args == (0,)
        assert vm.symbol("text").bytes[:size] == (bytes(flipped) if name == "text" else sealed[:size])
