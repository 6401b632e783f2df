# SPDX-License-Identifier: Apache-2.0
"""Downloads from a Debian suite of this machine's own making: one that was cut goes on where it stopped."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvmpy.lab import debian
from kvmpy.lab.errors import LabError

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get, on a Debian system")

NAME = "linux-source-9.9"
PACKAGES = """\
Package: {name}
Version: 9.9.1-1
Architecture: all
Maintainer: Nobody <nobody@example.org>
Filename: pool/{name}_9.9.1-1_all.deb
Size: {size}
SHA256: {sha256}
Description: for a test

"""
RELEASE = """\
Suite: sid
Codename: sid
Date: Thu, 01 Jan 2026 00:00:00 UTC
Architectures: all amd64
Components: main
SHA256:
 {sha256} {size} main/binary-amd64/Packages
"""
# Compressible by nobody, and large enough that half of it does not fit into a socket's buffers.
CONTENT = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(1 << 18))
MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"


class Mirror:
    """A mirror with one package.

    *cut* and *stall* are after how many bytes of it the next answer ends, or goes on only when told so;
    *down*: after that answer there is none.
    """

    def __init__(self) -> None:
        self.content = CONTENT
        self.cut: int | None = None
        self.stall: int | None = None
        self.stalled = threading.Event()
        self.moving = threading.Event()
        self.down = False
        self.starts: list[int] = []
        sha256 = hashlib.sha256(self.content).hexdigest()
        packages = PACKAGES.format(name=NAME, size=len(self.content), sha256=sha256).encode()
        release = RELEASE.format(sha256=hashlib.sha256(packages).hexdigest(), size=len(packages)).encode()
        self.files = {"dists/sid/Release": release, "dists/sid/main/binary-amd64/Packages": packages}
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                if path.endswith(".deb"):
                    self.package()
                elif path in mirror.files:
                    self.answer(200, mirror.files[path])
                else:
                    self.answer(404, b"")

            def package(self) -> None:
                if mirror.down and mirror.cut is None:
                    self.answer(503, b"")
                    return
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(asked[1]) if asked else 0
                mirror.starts.append(start)
                rest = mirror.content[start:]
                self.send_response(206 if asked else 200)
                if asked:
                    end = len(mirror.content)
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
                self.send_header("Content-Length", str(len(rest)))
                self.send_header("Last-Modified", MODIFIED)
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                cut, mirror.cut = mirror.cut, None
                stall, mirror.stall = mirror.stall, None
                if stall is not None:
                    self.wfile.write(rest[:stall])
                    mirror.stalled.set()
                    mirror.moving.wait()
                    cut = 0
                self.wfile.write(rest[:cut])
                self.close_connection = cut is not None

            def answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def go_on(self) -> None:
        """Let an answer that stalls come to its end."""
        self.moving.set()


# Downloads in a process of its own, as a build does.
CHILD = """
import sys
from kvmpy.lab import debian

debian.source_line = lambda suite: f"deb [trusted=yes] {sys.argv[1]} {suite} main\\n"
suite = debian.Suite("sid")
suite.download(suite.package(), print)
"""


@pytest.fixture
def mirror(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    del cache
    fresh = Mirror()
    monkeypatch.setattr(debian, "source_line", lambda suite: f"deb [trusted=yes] {fresh.url} {suite} main\n")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=fresh.server.serve_forever)
    thread.start()
    try:
        yield fresh
    finally:
        fresh.go_on()
        fresh.server.shutdown()
        thread.join()
        fresh.server.server_close()


@pytest.fixture
def suite(mirror: Mirror) -> debian.Suite:
    del mirror
    sid = debian.Suite("sid")
    sid.update(lambda _: None)
    return sid


def test_a_package_is_found_and_verified(suite: debian.Suite, mirror: Mirror) -> None:
    package = suite.package()
    assert (package.origin, package.size) == (f"{NAME} 9.9.1-1", len(CONTENT))
    assert suite.download(package, lambda _: None).read_bytes() == CONTENT
    assert mirror.starts == [0]


def test_a_cut_connection_is_no_failure(suite: debian.Suite, mirror: Mirror) -> None:
    mirror.cut = len(CONTENT) // 2
    assert suite.download(suite.package(), lambda _: None).read_bytes() == CONTENT
    assert (mirror.starts[0], mirror.starts[1] > 0) == (0, True)


def test_the_next_build_goes_on_where_a_download_failed(suite: debian.Suite, mirror: Mirror) -> None:
    package = suite.package()
    mirror.cut = len(CONTENT) // 2
    mirror.down = True
    with pytest.raises(LabError, match=f"downloading {NAME} 9.9.1-1 failed"):
        suite.download(package, lambda _: None)
    mirror.down = False
    mirror.starts.clear()
    assert suite.download(package, lambda _: None).read_bytes() == CONTENT
    assert mirror.starts[0] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_the_next_build_goes_on_where_kvmpy_was_killed(
    suite: debian.Suite, mirror: Mirror, number: signal.Signals
) -> None:
    package = suite.package()
    mirror.stall = len(CONTENT) // 2
    with subprocess.Popen([sys.executable, "-c", CHILD, mirror.url], stdout=subprocess.PIPE) as child:
        assert mirror.stalled.wait(60)
        child.send_signal(number)
        child.communicate(timeout=60)
    mirror.go_on()
    mirror.starts.clear()
    assert suite.download(package, lambda _: None).read_bytes() == CONTENT
    assert mirror.starts[0] > 0
