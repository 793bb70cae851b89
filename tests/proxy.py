"""An object store over HTTP, and a proxy before it that injects faults by a plan.

Clients speak real HTTP with both: nothing of theirs is patched.
"""

import json
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import httpx
import pytest
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

KINDS = ("error", "throttle", "hang", "short", "reset", "lost", "wrong", "cut", "conflict", "unable")
"""What a plan can do to a request.

* `error`: a 500, 502 or 504 without asking the server.
* `throttle`: a 429, or a 503 with the code SlowDown.
* `hang`: no answer until the client has given up.
* `short`: half of a body of which the whole length was announced.
* `reset`: the connection is reset, in the middle of a body if there is one.
* `lost`: what was sent is stored, the connection is reset instead of a reply.
* `wrong`: status 200, right length, and one bit of an object's bytes is another.
* `cut`: half of an object's bytes, announced as if that were all.
* `conflict`: a 409 to a conditional write, as if another were on its way.
* `unable`: a 501 to a conditional write.
"""
ORDINARY = {"error": 6, "throttle": 4, "hang": 1, "short": 4, "reset": 5, "lost": 5, "wrong": 2}
"""Weights of what networks and services do to clients that have to live with it."""
HIDDEN = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")
"""Headers that are between two parties, not passed on."""


@dataclass
class Plan:
    """Which requests fail, and how. The same requests have the same faults in any order.

    A request's fate is drawn from the seed, what is asked for, and how often it was asked before.
    """

    share: float
    """Probability that a request fails."""
    weights: Mapping[str, float] = field(default_factory=lambda: ORDINARY)
    """How often each kind of fault is chosen, of those that the request can have."""
    seed: int = 0
    hang: float = 2.0
    """Seconds for which `hang` says nothing; more than the client waits."""
    ranges: bool = False
    """Whether `wrong` also strikes reads of a part of an object, which the client has no hash for."""
    checksums: bool = True
    """Whether the server's checksum comes with wrong bytes."""
    only: str = ""
    """Requests whose method and path hold this text."""
    limit: int = 1_000_000
    """Faults that the same request has at most."""
    injected: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fate(self, method: str, path: str, headers: Message) -> tuple[str, int]:
        """The fault of this request, or "", and a number that is as good as random."""
        part = headers.get("Range", "")
        # The name of an upload is drawn by the store: it must not decide what happens to it.
        key = re.sub(r"uploadId=[^&]*", "uploadId=", f"{method} {path} {part}".rstrip())
        kinds = {kind: w for kind, w in self.weights.items() if self._can(kind, method, path, headers)}
        with self.lock:
            number = self.asked[key]
            self.asked[key] += 1
            draw = random.Random(f"{self.seed} {key} {number}")
            hit = draw.random() < self.share and self.only in key and self.struck[key] < self.limit
            if not hit or not kinds:
                return "", 0
            (kind,) = draw.choices(list(kinds), list(kinds.values()))
            self.struck[key] += 1
            self.injected[kind] += 1
            return kind, draw.getrandbits(31)

    def _can(self, kind: str, method: str, path: str, headers: Message) -> bool:
        if kind in ("wrong", "cut"):
            return method == "GET" and "?" not in path and (self.ranges or "Range" not in headers)
        if kind in ("conflict", "unable"):
            return "If-None-Match" in headers
        return (kind != "short" or method == "GET") and (
            kind != "lost" or method in ("PUT", "POST", "DELETE")
        )

    @property
    def requests(self) -> int:
        """Requests so far, those that failed included."""
        return self.asked.total()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line."""

    def forward(self) -> None:
        plan = self.server.plan
        kind, number = "", 0
        if plan is not None:
            kind, number = plan.fate(self.command, self.path, self.headers)
        body = self._body()
        if kind == "error":
            self._refuse((500, 502, 504)[number % 3], "InternalError")
        elif kind == "throttle":
            self._refuse(*((429, "TooManyRequests") if number % 2 else (503, "SlowDown")))
        elif kind == "conflict":
            self._refuse(409, "ConditionalRequestConflict")
        elif kind == "unable":
            self._refuse(501, "NotImplemented")
        elif kind == "hang":
            assert plan is not None
            self.server.stopped.wait(plan.hang)
            self._reset()
        elif kind == "reset" and self.command != "GET":
            self._reset()
        else:
            self._answer(kind, number, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _answer(self, kind: str, number: int, body: bytes) -> None:
        """The server's answer, spoilt as `kind` says."""
        upstream = HTTPConnection("127.0.0.1", self.server.upstream)
        try:
            dropped = HIDDEN + self.server.withheld
            headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        if kind == "lost":
            self._reset()
            return
        if kind == "wrong" and data and answer.status < 300:
            at = number % len(data)
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if kind == "cut":
            data = data[: len(data) // 2]
        if answer.status == 412:
            data = data.replace(*self.server.rewritten)
        checked = self.server.plan is None or self.server.plan.checksums
        self._send_head(answer, len(data), "" if checked else "x-amz-checksum")
        if self.command == "HEAD":
            return
        if kind in ("short", "reset"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._reset() if kind == "reset" else self._close()
        else:
            self.wfile.write(data)

    def _send_head(self, answer: HTTPResponse, size: int, left_out: str) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HIDDEN and not (left_out and name.lower().startswith(left_out)):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(size)
        self.send_header("Content-Length", length)
        self.end_headers()

    def _refuse(self, status: int, code: str) -> None:
        text = b"<Error><Code>%s</Code><Message>injected</Message></Error>" % code.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _close(self) -> None:
        self.close_connection = True

    def _reset(self) -> None:
        """Close such that the other side sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.plan: Plan | None = None
        self.withheld: tuple[str, ...] = ()
        """Request headers that the server does not get to see."""
        self.rewritten = (b"", b"")
        """What is replaced by what in the body of a 412."""
        self.stopped = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in the middle are what this is for."""


class Silent(WSGIRequestHandler):
    def log(self, type, message, *args):
        """Requests are not worth a line."""


@contextmanager
def object_store() -> Iterator[int]:
    """The port on which moto answers as S3, without a bucket."""
    moto, turns = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def application(environ, start):
        # S3 checks and writes in one step. moto does one after the other, so requests take turns.
        with turns:
            return moto(environ, start)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Silent)
    with _serving(server):
        # What moto holds is of the process, not of the server: another one may have left buckets.
        httpx.post(f"http://127.0.0.1:{server.port}/moto-api/reset").raise_for_status()
        yield server.port


@contextmanager
def proxy(upstream: int) -> Iterator[_Server]:
    """A proxy before the server on port `upstream`; set its `plan`. Its port is `server_port`."""
    server = _Server(upstream)
    with _serving(server):
        try:
            yield server
        finally:
            server.stopped.set()


@contextmanager
def _serving(server) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(port: int, **config: float) -> dict[str, str]:
    """Variables with which clients find the object store on `port`; `config` is botocore's."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3": json.dumps({"config_kwargs": config}),
    }


@contextmanager
def pointed(port: int, **config: float) -> Iterator[None]:
    """fsspec of this process finds the object store on `port`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(port).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": config})
        try:
            s3fs.S3FileSystem.clear_instance_cache()
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
