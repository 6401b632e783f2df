# SPDX-License-Identifier: Apache-2.0
"""The buffer of each command of the software AMD-SP, right in all that the scene's options leave alone."""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ec

from kvmpy import PAGE_SIZE, SIZE_2M, IdBlock, Message, MessageType, SnpPolicy
from kvmpy.coco import idblock
from kvmpy.coco.guest_message import report_request
from kvmpy.coco.sev_session import CERTIFICATE_SIZE, SESSION_SIZE
from selftests.sev.bench import ES_ASID, LARGE, OUTSIDE, SEV_ASID
from selftests.sev.bench_scene import CHAIN_SIZE, PLACES, POLICY_BITS, Scene, oca_certificate, sign
from selftests.sev.transport import HEADER_SIZE, Packet

Fields = dict[str, int]
Builder = Callable[[Scene], Fields]
TCB = 0x0700_0000_0000_0103
AMD_CERTS = 2 * 64 + 6 * 512
MEASUREMENT, REPORT = 48, 0xD0
# What a VMSA ends with that the software has encrypted (softsev_vmsa_seal()).
VMSA_MARK = bytes.fromhex("536f6674564d5341")


def _nothing(_: Scene) -> Fields:
    return {}


def _out(scene: Scene, **lengths: int) -> Fields:
    """Return the address of a page that the firmware fills, and how long it is."""
    return {"address": scene.memory("out", state="firmware"), **scene.numbers(**lengths)}


# The platform.


def _tmr(scene: Scene, flags: int) -> Fields:
    if not flags & 1:
        return {}
    state = scene.word("tmr", "firmware")
    if state != "hypervisor":
        scene.bench.page(0, state, large=True)
    address = scene.bench.base + scene.number("tmr_offset", 0)
    return {"tmr_address": address, **scene.numbers(tmr_len=SIZE_2M)}


def _init(scene: Scene) -> Fields:
    fields = scene.numbers(flags=1, reserved=0)
    return fields | _tmr(scene, fields["flags"])


def _init_ex(scene: Scene) -> Fields:
    fields = scene.numbers(len=36, flags=0, reserved=0)
    fields |= _tmr(scene, fields["flags"])
    if scene.word("nv", "firmware") == "tmr":
        nv = scene.bench.address(PLACES["nv"])
    else:
        nv = scene.memory("nv", state="firmware", pages=8)
    return fields | {"nv_address": nv, **scene.numbers(nv_len=32 << 10)}


def _with_guest(scene: Scene) -> Fields:
    if scene.word("guests", "none") == "one":
        scene.bench.guests.append(scene.bench.must("LAUNCH_START")["handle"])
    return {}


def _pek_cert_import(scene: Scene) -> Fields:
    bench = scene.bench
    key = ec.generate_private_key(ec.SECP384R1())
    oca, pek = bytearray(oca_certificate(key)), bytearray(scene.pdh()[1][:CERTIFICATE_SIZE])
    wrong = scene.word("pek", "hypervisor")
    if wrong == "other":
        pek[5] ^= 1
    pek = bytearray(sign(bytes(pek), key))
    if wrong == "forged":
        pek[0x41C] ^= 1
    if scene.word("oca", "hypervisor") == "forged":
        oca[0x41C] ^= 1
    if scene.word("oca", "hypervisor") == "unsigned":
        oca[0x414:0x41C] = (0x1000).to_bytes(8, "little")
    fields = scene.numbers(pek_len=CERTIFICATE_SIZE, oca_len=CERTIFICATE_SIZE)
    for name, data in (("pek", pek), ("oca", oca)):
        fields[f"{name}_address"] = scene.memory(
            {"pek": "pdh", "oca": "chain"}[name], bytes(data), state="hypervisor"
        )
    if scene.flag("owned", False):
        sizes = {"pek_len": CERTIFICATE_SIZE, "oca_len": CERTIFICATE_SIZE}
        bench.must("PEK_CERT_IMPORT", **(fields | sizes))
    return fields | _with_guest(scene)


def _pdh_cert_export(scene: Scene) -> Fields:
    return {
        "pdh_address": scene.memory("pdh", state="firmware"),
        "chain_address": scene.memory("chain", state="firmware", pages=2),
        **scene.numbers(pdh_len=CERTIFICATE_SIZE, chain_len=CHAIN_SIZE),
    }


# Guests of the SEV API.


def _handle(scene: Scene, state: str = "LUPDATE", *, active: bool = True) -> Fields:
    return {"handle": scene.guest(state, active=active)}


def _activate(scene: Scene) -> Fields:
    bench = scene.bench
    handle = scene.guest("LUPDATE", active=scene.flag("bound", False), asid=SEV_ASID - 1)
    asid = scene.number("asid", SEV_ASID)
    if scene.flag("owned", False):
        other = bench.must("LAUNCH_START")["handle"]
        bench.guests.append(other)
        bench.must("ACTIVATE", handle=other, asid=SEV_ASID)
    if scene.flag("dirty", False):
        _leave_dirty(scene, asid)
    return {"handle": handle, "asid": asid}


def _leave_dirty(scene: Scene, asid: int) -> None:
    """Let a guest run with an ASID, and leave it."""
    bench, out = scene.bench, PLACES["out"]
    policy = POLICY_BITS["es"] if asid <= ES_ASID else 0
    other = bench.must("LAUNCH_START", policy=policy)["handle"]
    bench.guests.append(other)
    bench.must("ACTIVATE", handle=other, asid=asid)
    bench.page(out, "firmware")
    bench.must("LAUNCH_MEASURE", handle=other, address=bench.address(out), len=MEASUREMENT)
    bench.must("LAUNCH_FINISH", handle=other)
    bench.must("DEACTIVATE", handle=other)


def _shared(scene: Scene, policy: int) -> int:
    """Return the handle of the guest whose key is shared: none, one that is not there, or one of a policy."""
    shared = scene.word("shared", "0")
    if shared in ("0", "none"):
        return {"0": 0, "none": 0xFFF}[shared]
    bits = {"same": policy, "other": policy ^ 1, "noks": policy}[shared]
    handle = scene.bench.must("LAUNCH_START", policy=bits)["handle"]
    scene.bench.guests.append(handle)
    return handle


def _start(scene: Scene, cert: str, role: str) -> Fields:
    policy = scene.policy()
    shared = _shared(scene, policy)
    if scene.flag("full", False):
        scene.fill()
    session = scene.session(policy)
    fields = {
        f"{cert}_address": scene.memory(role, scene.certificate()),
        f"{cert}_len": scene.number("certificate_len", CERTIFICATE_SIZE),
        "session_address": scene.memory("session", session),
        "session_len": scene.number("session_len", SESSION_SIZE),
    }
    return fields | {"handle": shared, "policy": policy}


def _update(scene: Scene, policy: str = "0") -> Fields:
    handle = scene.guest("LUPDATE", policy=policy)
    return {
        "handle": handle,
        "address": scene.memory("guest", state="firmware"),
        **scene.numbers(len=PAGE_SIZE),
    }


def _guest_out(scene: Scene, state: str, length: int) -> Fields:
    return {"handle": scene.guest(state), **_out(scene, len=length)}


def _debug(scene: Scene) -> Fields:
    fields = {"handle": scene.guest("RUNNING"), "src": scene.memory("guest")}
    return fields | {"dst": scene.memory("out", state="firmware"), **scene.numbers(len=32)}


def _copy(scene: Scene, handle: int, states: dict[str, str], header: bytes, data: bytes) -> Fields:
    fields = {"handle": handle}
    for name, role, text in (("hdr", "header", header), ("guest", "guest", b""), ("trans", "packet", data)):
        fields[f"{name}_address"] = scene.memory(role, text, state=states.get(role, "hypervisor"))
        fields[f"{name}_len"] = scene.number(f"{name}_len", len(header) if name == "hdr" else len(data))
    return fields


def _launch_secret(scene: Scene) -> Fields:
    handle = scene.guest("LSECRET", session=True)
    measurement = getattr(scene, "measurement", bytes(MEASUREMENT))
    flags = int(scene.flag("compressed", False))
    header, data = scene.owner.secret(b"sixteen bytes ok", measurement, flags=flags)
    if scene.word("mac", "right") == "wrong":
        header = header[:-1] + bytes([header[-1] ^ 1])
    return _copy(scene, handle, {"guest": "firmware"}, header, data)


def _forged(certificate: bytes) -> bytes:
    """Return it with another last byte of the first signature, and what follows it."""
    last = 0x41C
    return certificate[:last] + bytes([certificate[last] ^ 1]) + certificate[last + 1 :]


def _send_start(scene: Scene) -> Fields:
    handle = scene.guest("RUNNING")
    pdh, chain = scene.pdh()
    wrong = scene.word("chain_of", "own")
    if wrong == "forged":
        chain = chain[:CERTIFICATE_SIZE] + _forged(chain[CERTIFICATE_SIZE:])
    elif wrong == "forged-pek":
        chain = _forged(chain)
    elif wrong == "forged-pdh":
        pdh = _forged(pdh)
    elif wrong == "other":
        key = ec.generate_private_key(ec.SECP384R1())
        pek = sign(chain[:CERTIFICATE_SIZE], key)
        chain = pek + oca_certificate(key) + chain[2 * CERTIFICATE_SIZE :]
    domain = scene.policy() & 16
    return {
        "handle": handle,
        "pdh_address": scene.memory("pdh", pdh if domain else scene.certificate()),
        "plat_address": scene.memory("chain", chain, pages=2),
        "amd_address": scene.memory("amd"),
        "session_address": scene.memory("session", state="firmware"),
        **scene.numbers(
            pdh_len=CERTIFICATE_SIZE, plat_len=CHAIN_SIZE, amd_len=AMD_CERTS, session_len=SESSION_SIZE
        ),
    }


def _send_update(scene: Scene, policy: str = "0") -> Fields:
    handle = scene.guest("SUPDATE", policy=policy)
    size = PAGE_SIZE if policy == "es" else 32
    return _copy(scene, handle, {"header": "firmware", "packet": "firmware"}, bytes(HEADER_SIZE), bytes(size))


def _send_update_vmsa(scene: Scene) -> Fields:
    fields = _send_update(scene, "es")
    mark = VMSA_MARK if scene.flag("sealed", True) else bytes(8)
    scene.bench.write(PLACES["guest"], bytes(PAGE_SIZE - len(mark)) + mark)
    return fields


def _receive_update(scene: Scene, policy: str = "0") -> Fields:
    handle = scene.guest("RUPDATE", policy=policy)
    packet = Packet.seal(scene.owner, bytes(PAGE_SIZE if policy == "es" else 32))
    header = bytearray(packet.header)
    if scene.flag("compressed", False):
        header[0] |= 1
        mac = hmac.new(scene.owner.tik, b"\2" + header[:20], "sha256")
        mac.update(struct.pack("<II", len(packet.sealed), len(packet.sealed)) + packet.sealed)
        header[20:] = mac.digest()
    if scene.word("mac", "right") == "wrong":
        header[-1] ^= 1
    return _copy(scene, handle, {"guest": "firmware"}, bytes(header), packet.sealed)


# The SNP platform.


def _snp_init_ex(scene: Scene) -> Fields:
    bits = scene.number("init_rmp", 0) | scene.number("bits", 0)
    return {"bits": bits, "list_address": scene.memory("out", b"")}


def _snp_shutdown_ex(scene: Scene) -> Fields:
    bench = scene.bench
    if scene.flag("bound", False):
        bench.page(PLACES["gctx"], "context")
        gctx = bench.address(PLACES["gctx"])
        bench.must("SNP_LAUNCH_START", gctx=gctx, policy=int(SnpPolicy()))
        bench.must("SNP_ACTIVATE", gctx=gctx, asid=ES_ASID)
    return scene.numbers(len=8, bits=0)


def _snp_vlek_load(scene: Scene) -> Fields:
    data = bytes(400) + scene.number("tcb", TCB).to_bytes(8, "little") + bytes(24)
    return {"address": scene.memory("out", data), **scene.numbers(len=16, version=0, reserved=0)}


# SNP guests and their pages.


def _snp_gctx_create(scene: Scene) -> Fields:
    return {"gctx": scene.memory("gctx", state="firmware")}


def _snp_activate(scene: Scene) -> Fields:
    bench = scene.bench
    gctx = scene.context("LAUNCH", active=False)
    asid = scene.number("asid", ES_ASID)
    if scene.flag("owned", False):
        bench.page(PLACES["ma"], "context")
        other = bench.address(PLACES["ma"])
        bench.must("SNP_LAUNCH_START", gctx=other, policy=int(SnpPolicy()))
        bench.must("SNP_ACTIVATE", gctx=other, asid=ES_ASID)
    if scene.flag("bound", False):
        bench.must("SNP_ACTIVATE", gctx=gctx, asid=ES_ASID - 1)
    if scene.flag("dirty", False):
        _leave_dirty(scene, asid)
    if scene.flag("pages", False):
        bench.page(PLACES["guest"], "guest-invalid", asid=ES_ASID)
    return {"gctx": gctx, "asid": asid}


def _gctx(scene: Scene) -> Fields:
    return {"gctx": scene.context("LAUNCH")}


def _snp_launch_start(scene: Scene) -> Fields:
    bench = scene.bench
    gctx = scene.context("INIT")
    agent = scene.word("agent", "none")
    ma = bench.address(PLACES["ma"], scene.number("agent_offset", 0))
    if agent in ("plain", "bound"):
        bench.page(PLACES["ma"], "context")
        bound = {}
        if agent == "bound":
            bench.page(PLACES["out"], "context")
            bound = {"ma_gctx": bench.address(PLACES["out"]), "bits": 1}
            bench.must("SNP_LAUNCH_START", gctx=bound["ma_gctx"], policy=int(SnpPolicy()))
        policy = int(SnpPolicy(migrate_ma=agent == "bound"))
        bench.must("SNP_LAUNCH_START", gctx=bench.address(PLACES["ma"]), policy=policy, **bound)
    elif agent == "absent":
        bench.page(PLACES["ma"], "firmware")
    return {
        "gctx": gctx,
        "policy": scene.snp_policy(),
        "ma_gctx": ma,
        "bits": int(agent != "none") | scene.number("bits", 0),
    }


def _snp_launch_update(scene: Scene) -> Fields:
    bench = scene.bench
    gctx = scene.context("LAUNCH")
    kind = scene.number("type", 1)
    large = scene.flag("large", False)
    size = int(large ^ scene.flag("wrong_size", False))
    state = scene.word("page", "pre-guest")
    place = LARGE if large else PLACES["guest"]
    address = bench.address(place, scene.number("page_offset", 0))
    if state == "outside":
        address = OUTSIDE
    elif state != "hypervisor":
        owner = ES_ASID - 1 if scene.word("owner", "guest") == "other" else ES_ASID
        bench.page(place, state, asid=owner, large=large)
    cpuid = {
        "right": bytes(16),
        "reserved": b"\0\0\0\0\1".ljust(16, b"\0"),
        "count": b"\x41".ljust(16, b"\0"),
    }
    boast = b"\1\0\0\0".ljust(16, b"\0") + struct.pack(
        "<IIQQIIIIQ", 0x80000008, 0, 0, 0, *[0xFFFFFFFF] * 4, 0
    )
    bench.write(place, (cpuid | {"boast": boast})[scene.word("cpuid", "right")].ljust(PAGE_SIZE, b"\0"))
    return {
        "gctx": gctx,
        "bits": size | kind << 1 | scene.number("imi_page", 0) << 4 | scene.number("reserved", 0) << 5,
        "address": address,
    }


def _snp_launch_finish(scene: Scene) -> Fields:
    gctx = scene.context("LAUNCH")
    policy = SnpPolicy.from_int(scene.snp_policy())
    digest = bytes([int(scene.word("digest", "right") == "wrong")]) + bytes(47)
    asked = policy if scene.word("block_policy", "same") == "same" else SnpPolicy(single_socket=True)
    key, author = idblock.generate_key(), idblock.generate_key()
    block = IdBlock(digest, int(asked), bytes(16), bytes(16), scene.number("version", 1), 1)
    auth = bytearray(block.sign(key, author).to_bytes())
    _spoil(scene, auth)
    bits = 1 | int(scene.flag("author", True)) << 1 | scene.number("reserved", 0) << 3
    return {
        "gctx": gctx,
        "id_block": scene.memory("id_block", block.to_bytes()),
        "id_auth": scene.memory("id_auth", bytes(auth)),
        "bits": bits,
    }


def _spoil(scene: Scene, auth: bytearray) -> None:
    """Make one thing of an ID authentication wrong."""
    for name, offset in (
        ("id_algorithm", 0),
        ("author_algorithm", 4),
        ("id_signature", 0x40),
        ("id_key", 0x244),
        ("author_signature", 0x680),
        ("author_key", 0x884),
    ):
        if scene.word(name, "right") == "wrong":
            auth[offset] ^= 0x10


def _snp_debug(scene: Scene, guest: str, other: str) -> Fields:
    bench = scene.bench
    gctx = scene.context("LAUNCH")
    place = PLACES["guest"]
    state = scene.word("page", "pre-guest")
    owner = ES_ASID - 1 if scene.word("owner", "guest") == "other" else ES_ASID
    if state != "hypervisor":
        bench.page(place, state, asid=owner)
    fields = {"gctx": gctx, guest: bench.address(place, scene.number("page_offset", 0))}
    return fields | {other: scene.memory("out", state="firmware" if other == "dst" else "hypervisor")}


def _snp_page_reclaim(scene: Scene) -> Fields:
    place, state = PLACES["guest"], scene.word("page", "firmware")
    address = OUTSIDE if state == "outside" else scene.bench.address(place)
    if scene.flag("large", False):
        scene.bench.page(0, "firmware", large=True)
    elif state != "outside":
        scene.bench.page(place, state, asid=ES_ASID)
    return {"address": address | scene.number("bits", 0)}


def _snp_page_unsmash(scene: Scene) -> Fields:
    bench = scene.bench
    gpa = scene.number("gpa", 0)
    for page in range(512):
        bench.page(page, "pre-guest", asid=ES_ASID, gpa=gpa + page * PAGE_SIZE)
    wrong = scene.word("wrong", "nothing")
    if wrong != "nothing":
        other = {
            "state": {"state": "guest-invalid", "asid": ES_ASID},
            "asid": {"state": "pre-guest", "asid": ES_ASID - 1},
            "address": {"state": "pre-guest", "asid": ES_ASID, "gpa": 1 << 30},
            "owner": {"state": "firmware"},
        }[wrong]
        bench.page(7, **other)  # type: ignore[arg-type]
    return {"address": bench.base + scene.number("offset", 0)}


# Guest messages.


def _request(scene: Scene, kind: int, payload: bytes) -> Fields:
    gctx = scene.context("RUNNING")
    keys = getattr(scene, "vmpcks", [bytes(32)] * 4)
    number = scene.number("key", 0)
    message = Message(
        kind, payload, scene.number("sequence", 1), vmpck=number, version=scene.number("version", 1)
    )
    sealed = bytearray(message.seal(keys[number % 4]))
    for name, offset in (("algorithm", 0x30), ("header_version", 0x31), ("header_size", 0x32)):
        sealed[offset] ^= scene.number(name, 0)
    if scene.word("tag", "right") == "wrong":
        sealed[0] ^= 1
    if (size := scene.number("size", -1)) >= 0:
        sealed[0x36:0x38] = size.to_bytes(2, "little")
    offset = scene.number("request_offset", 0)
    request = scene.memory("request", (bytes(offset) + bytes(sealed))[:PAGE_SIZE])
    return {"gctx": gctx, "request": request, "response": scene.memory("response", state="firmware")}


def _report_request(scene: Scene) -> Fields:
    payload = bytearray(report_request(b"question", scene.number("vmpl", 0), scene.number("select", 0)))
    payload[-1] = scene.number("reserved", 0)
    payload[69] |= scene.number("reserved_bits", 0)
    return _request(scene, int(MessageType.REPORT_REQ), bytes(payload))


def _key_request(scene: Scene) -> Fields:
    options = scene.numbers(root=0, reserved=0, fields=0, vmpl=0, svn=0, tcb=0)
    payload = struct.pack("<IIQIIQ", *options.values())
    if scene.flag("masked", False):
        scene.bench.must("SNP_CONFIG", tcb=TCB, bits=2)
    return _request(scene, int(MessageType.KEY_REQ), payload)


BUILDERS: dict[str, Builder] = {
    "INIT": _init,
    "INIT_EX": _init_ex,
    "SHUTDOWN": _nothing,
    "FACTORY_RESET": _nothing,
    "PEK_GEN": _with_guest,
    "PEK_CSR": lambda scene: _out(scene, len=CERTIFICATE_SIZE),
    "PEK_CERT_IMPORT": _pek_cert_import,
    "PDH_CERT_EXPORT": _pdh_cert_export,
    "PDH_GEN": _nothing,
    "DF_FLUSH": _nothing,
    "GET_ID": lambda scene: _out(scene, len=64),
    "DECOMMISSION": lambda scene: _handle(scene, active=False),
    "ACTIVATE": _activate,
    "DEACTIVATE": _handle,
    "GUEST_STATUS": _handle,
    "LAUNCH_START": lambda scene: _start(scene, "dh", "pdh"),
    "LAUNCH_UPDATE_DATA": _update,
    "LAUNCH_UPDATE_VMSA": lambda scene: _update(scene, "es"),
    "LAUNCH_MEASURE": lambda scene: _guest_out(scene, "LUPDATE", MEASUREMENT),
    "LAUNCH_SECRET": _launch_secret,
    "LAUNCH_FINISH": lambda scene: _handle(scene, "LSECRET", active=False),
    "ATTESTATION": lambda scene: _guest_out(scene, "RUNNING", REPORT),
    "DBG_DECRYPT": _debug,
    "DBG_ENCRYPT": _debug,
    "SEND_START": _send_start,
    "SEND_UPDATE_DATA": _send_update,
    "SEND_UPDATE_VMSA": _send_update_vmsa,
    "SEND_FINISH": lambda scene: _handle(scene, "SUPDATE"),
    "SEND_CANCEL": lambda scene: _handle(scene, "SUPDATE"),
    "RECEIVE_START": lambda scene: _start(scene, "pdh", "pdh"),
    "RECEIVE_UPDATE_DATA": _receive_update,
    "RECEIVE_UPDATE_VMSA": lambda scene: _receive_update(scene, "es"),
    "RECEIVE_FINISH": lambda scene: _handle(scene, "RUPDATE", active=False),
    "SNP_INIT_EX": _snp_init_ex,
    "SNP_SHUTDOWN_EX": _snp_shutdown_ex,
    "SNP_PLATFORM_STATUS": _out,
    "SNP_DF_FLUSH": _nothing,
    "SNP_CONFIG": lambda scene: scene.numbers(tcb=TCB, bits=0, reserved=0),
    "SNP_COMMIT": lambda scene: scene.numbers(len=4),
    "SNP_VLEK_LOAD": _snp_vlek_load,
    "SNP_FEATURE_INFO": lambda scene: _out(scene, len=16, ecx=1),
    "SNP_GCTX_CREATE": _snp_gctx_create,
    "SNP_ACTIVATE": _snp_activate,
    "SNP_DECOMMISSION": _gctx,
    "SNP_GUEST_STATUS": lambda scene: _gctx(scene) | _out(scene),
    "SNP_LAUNCH_START": _snp_launch_start,
    "SNP_LAUNCH_UPDATE": _snp_launch_update,
    "SNP_LAUNCH_FINISH": _snp_launch_finish,
    "SNP_DBG_DECRYPT": lambda scene: _snp_debug(scene, "src", "dst"),
    "SNP_DBG_ENCRYPT": lambda scene: _snp_debug(scene, "dst", "src"),
    "SNP_PAGE_RECLAIM": _snp_page_reclaim,
    "SNP_PAGE_UNSMASH": _snp_page_unsmash,
    "SNP_GUEST_REQUEST": lambda scene: _request(
        scene, scene.number("type", int(MessageType.REPORT_REQ)), report_request(b"question")
    ),
    "MSG_REPORT_REQ": _report_request,
    "MSG_KEY_REQ": _key_request,
}
