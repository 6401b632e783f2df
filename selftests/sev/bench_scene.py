# SPDX-License-Identifier: Apache-2.0
"""What a command of the software AMD-SP finds when a test runs it: guests, pages, and what lies in them.

A scene is made of options, ``name=value``, each of which makes one thing other than a right one.
"""

from __future__ import annotations

from functools import cached_property

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from kvmpy import GuestOwner, Message, SnpPolicy
from kvmpy.coco.sev_session import CERTIFICATE_SIZE, SESSION_SIZE, dh_certificate
from selftests.sev.bench import ES_ASID, LARGE, OUTSIDE, SEV_ASID, Bench

CHAIN_SIZE = 3 * CERTIFICATE_SIZE
OCA, PEK, PDH = 0x1001, 0x1002, 0x1003
ECDSA_SHA256 = 2
# Where each role of memory lies in the bench; some take several pages.
PLACES = {
    "out": 1,
    "session": 2,
    "pdh": 3,
    "chain": 4,
    "amd": 6,
    "header": 7,
    "packet": 8,
    "guest": 16,
    "vmsa": 24,
    "gctx": 25,
    "ma": 26,
    "secrets": 27,
    "request": 28,
    "response": 29,
    "id_block": 30,
    "id_auth": 31,
    "nv": 32,
    "tmr": 0,
}
POLICY_BITS = {"nodbg": 1, "noks": 2, "es": 4, "nosend": 8, "domain": 16, "sev": 32}


class Scene:
    """The options of one run, and what was made of them."""

    def __init__(self, bench: Bench, options: dict[str, str]) -> None:
        self.bench = bench
        self._options = dict(options)
        self._left = set(options)

    @cached_property
    def owner(self) -> GuestOwner:
        """The guest's owner: one for all that this scene signs and wraps."""
        return GuestOwner()

    # Options.

    def word(self, name: str, default: str) -> str:
        """Return an option as it stands."""
        self._left.discard(name)
        return self._options.get(name, default)

    def number(self, name: str, default: int) -> int:
        """Return an option that is a number."""
        return int(self.word(name, str(default)), 0)

    def numbers(self, **defaults: int) -> dict[str, int]:
        """Return fields of a command, each an option of the same name."""
        return {name: self.number(name, default) for name, default in defaults.items()}

    def flag(self, name: str, default: bool) -> bool:
        """Return an option that is yes or no."""
        return {"yes": True, "no": False}[self.word(name, "yes" if default else "no")]

    def check(self) -> None:
        """Raise AssertionError for an option that nobody asked for: it would change nothing."""
        assert not self._left, f"no such option: {', '.join(sorted(self._left))}"

    def memory(self, role: str, data: bytes = b"", *, state: str = "hypervisor", pages: int = 1) -> int:
        """Return the address of memory that holds *data*; its option is a page's state, or ``outside``.

        With ``large`` it begins a firmware page of 2 MiB.

        ``<role>_offset`` moves the address within the page.
        """
        wanted = self.word(role, state)
        offset = self.number(f"{role}_offset", 0)
        if wanted == "outside":
            return OUTSIDE + offset
        place = PLACES[role]
        if wanted == "large":
            place = LARGE
            self.bench.page(place, "firmware", large=True)
        elif wanted != "as-is":
            for page in range(place, place + pages):
                self.bench.page(page, wanted)
        self.bench.write(place, data)
        return self.bench.address(place, offset)

    # Keys and certificates of the SEV API.

    def pdh(self) -> tuple[bytes, bytes]:
        """Return this platform's PDH certificate and its chain."""
        bench = self.bench
        first, second = PLACES["pdh"], PLACES["chain"]
        for page in (first, second, second + 1):
            bench.page(page, "firmware")
        bench.must(
            "PDH_CERT_EXPORT",
            pdh_address=bench.address(first),
            pdh_len=CERTIFICATE_SIZE,
            chain_address=bench.address(second),
            chain_len=CHAIN_SIZE,
        )
        pair = bench.read(first, CERTIFICATE_SIZE), bench.read(second, CHAIN_SIZE)
        for page in (first, second, second + 1):
            bench.release(page)
        return pair

    def certificate(self) -> bytes:
        """Return the owner's Diffie-Hellman certificate, whole, or as the option ``certificate`` says."""
        data = bytearray(self.owner.certificate())
        wrong = self.word("certificate", "right")
        if wrong == "version":
            data[0] = 2
        elif wrong == "usage":
            data[8:12] = PEK.to_bytes(4, "little")
        elif wrong == "algorithm":
            data[12:16] = (0x103).to_bytes(4, "little")
        elif wrong == "point":
            data[0x14] ^= 1
        else:
            assert wrong == "right"
        return bytes(data)

    def session(self, policy: int) -> bytes:
        """Return the owner's session for *policy*, or one that the option ``mac`` makes wrong."""
        wrong = self.word("mac", "right")
        data = bytearray(self.owner.session(self.pdh()[0], policy ^ (wrong == "policy")))
        if wrong == "wrap":
            data[64] ^= 1
        assert wrong in ("right", "wrap", "policy")
        return bytes(data)

    # Guests.

    def policy(self, default: str = "0") -> int:
        """Return the option ``policy``: names of bits joined with +, or a number."""
        text = self.word("policy", default)
        if text[0].isdigit():
            return int(text, 0)
        return sum(POLICY_BITS[name] for name in text.split("+"))

    def guest(
        self, state: str, *, policy: str = "0", active: bool = True, session: bool = False, asid: int = 0
    ) -> int:
        """Return the handle of a guest; options ``handle``, ``state``, ``policy`` and ``active`` change it.

        With *session* its keys are the owner's; its ASID is *asid*, or the highest one of its kind.
        """
        bench = self.bench
        state, bits = self.word("state", state), self.policy(policy)
        active = self.flag("active", active)
        handle = self._begin(bits, state, session)
        if active:
            highest = ES_ASID if bits & POLICY_BITS["es"] else SEV_ASID
            bench.must("ACTIVATE", handle=handle, asid=asid or highest)
        self._lead(handle, state)
        return {"guest": handle, "none": 0xFFF}[self.word("handle", "guest")]

    def _begin(self, policy: int, state: str, session: bool) -> int:
        bench = self.bench
        keys = {}
        if session or state == "RUPDATE":
            data = self.owner.session(self.pdh()[0], policy)
            bench.write(PLACES["session"], data)
            bench.write(PLACES["pdh"], self.owner.certificate())
            keys = {"session_address": bench.address(PLACES["session"]), "session_len": SESSION_SIZE}
            cert = "pdh" if state == "RUPDATE" else "dh"
            keys |= {f"{cert}_address": bench.address(PLACES["pdh"]), f"{cert}_len": CERTIFICATE_SIZE}
        start = "RECEIVE_START" if state == "RUPDATE" else "LAUNCH_START"
        handle = bench.must(start, policy=policy, **keys)["handle"]
        bench.guests.append(handle)
        return handle

    def _lead(self, handle: int, state: str) -> None:
        bench = self.bench
        if state in ("LUPDATE", "RUPDATE"):
            return
        out = PLACES["out"]
        bench.page(out, "firmware")
        bench.must("LAUNCH_MEASURE", handle=handle, address=bench.address(out), len=48)
        self.measurement = bench.read(out, 48)
        bench.release(out)
        if state == "LSECRET":
            return
        bench.must("LAUNCH_FINISH", handle=handle)
        if state == "RUNNING":
            return
        bench.page(out, "firmware")
        bench.write(PLACES["pdh"], self.owner.certificate())
        bench.must(
            "SEND_START",
            handle=handle,
            pdh_address=bench.address(PLACES["pdh"]),
            pdh_len=CERTIFICATE_SIZE,
            session_address=bench.address(out),
            session_len=SESSION_SIZE,
        )
        bench.release(out)
        if state == "SENT":
            bench.must("SEND_FINISH", handle=handle)
        else:
            assert state == "SUPDATE"

    def fill(self) -> None:
        """Take all handles."""
        while True:
            status, after = self.bench.run("LAUNCH_START")
            if status:
                return
            self.bench.guests.append(after["handle"])

    # SNP guests.

    def snp_policy(self) -> int:
        """Return the option ``policy``, names of bits joined with +, over what every platform meets."""
        text = self.word("policy", "debug")
        if text[0].isdigit():
            return int(text, 0)
        return int(SnpPolicy(**{name: True for name in text.split("+") if name != "none"}))

    def context(self, state: str, *, active: bool = True, role: str = "gctx") -> int:
        """Return the address of a guest context.

        Options: ``state``, ``policy``, ``active``, ``imi``, ``vcek``; ``gctx`` is another state of the page
        than context, ``outside``, or ``unaligned``.
        """
        bench = self.bench
        page = PLACES[role]
        state = self.word("state", state)
        active = self.flag("active", active)
        imi = self.flag("imi", False)
        finish = 0 if self.flag("vcek", True) else 1 << 2
        policy = self.snp_policy()
        kind = self.word(role, "context")
        if kind == "outside":
            return OUTSIDE
        bench.page(page, "context" if kind == "unaligned" else kind)
        if kind in ("context", "unaligned") and state != "INIT":
            bench.must("SNP_LAUNCH_START", gctx=bench.address(page), policy=policy, bits=imi << 1)
            if active:
                bench.must("SNP_ACTIVATE", gctx=bench.address(page), asid=ES_ASID)
            if state == "RUNNING":
                self._secrets(page)
                bench.must("SNP_LAUNCH_FINISH", gctx=bench.address(page), bits=finish)
        return bench.address(page, 8 if kind == "unaligned" else 0)

    def open(self, response: bytes) -> Message:
        """Open the response to a guest message, sealed with the key that its header names."""
        number = response[0x3C]
        return Message.open(response, self.vmpcks[number])

    def _secrets(self, context: int) -> None:
        """Launch a secrets page, and read the guest's keys in it."""
        bench, page = self.bench, PLACES["secrets"]
        bench.page(page, "pre-guest", asid=ES_ASID)
        bench.must("SNP_LAUNCH_UPDATE", gctx=bench.address(context), bits=5 << 1, address=bench.address(page))
        bench.changed(page, "guest-invalid")
        raw = bench.read(page)
        self.vmpcks = [raw[offset : offset + 32] for offset in range(0x20, 0xA0, 32)]


# Certificates that an owner of the platform signs.


def _number(value: int) -> bytes:
    return value.to_bytes(72, "little")


def sign(certificate: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the certificate with the signature of an OCA in its first place, and none in the second."""
    body = certificate[:0x414]
    r, s = decode_dss_signature(key.sign(body, ec.ECDSA(hashes.SHA256())))
    first = OCA.to_bytes(4, "little") + ECDSA_SHA256.to_bytes(4, "little") + _number(r) + _number(s)
    second = (0x1000).to_bytes(4, "little")
    return (body + first.ljust(0x208, b"\0") + second.ljust(0x208, b"\0"))[:CERTIFICATE_SIZE]


def oca_certificate(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the self-signed certificate of an owner's key."""
    body = bytearray(dh_certificate(key.public_key()))
    body[8:16] = OCA.to_bytes(4, "little") + ECDSA_SHA256.to_bytes(4, "little")
    return sign(bytes(body), key)
