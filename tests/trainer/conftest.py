"""What several tests of the trainer share."""

from __future__ import annotations

import http.client
import logging
import secrets
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dtp_trainer.s3 import S3Storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    """A prefix of a bucket of its own, also for the processes that the test starts."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "2",
        "AWS_RETRY_MODE": "standard",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    storage = S3Storage(f"bucket-{secrets.token_hex(6)}", "team/jobs")
    storage._client.create_bucket(Bucket=storage._bucket)
    return storage


class FaultyS3:
    """Stands before an S3 server and passes requests on, those apart that `fault` picks.

    fault: method and path of a request → None, a status to refuse it with, or a negative number:
        its content breaks off after so many bytes.
    """

    def __init__(self, server: str) -> None:
        self.fault: Callable[[str, str], int | None] = lambda _method, _path: None
        self.refused: list[str] = []
        self._server = urlsplit(server).netloc
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.close_connection = True
                self.raw_requestline = self.rfile.readline(65537)
                if self.raw_requestline and self.parse_request():
                    faulty.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        fault = self.fault(request.command, request.path)
        if fault is not None:
            self.refused.append(f"{request.command} {request.path}")
        if fault is not None and fault > 0:
            code = {403: "AccessDenied", 503: "SlowDown"}[fault]
            answer = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self._send(request, fault, {"Content-Type": "application/xml"}, answer, len(answer))
            return
        status, headers, answer = self._forward(request, body)
        self._send(request, status, headers, answer, len(answer) if fault is None else -fault)

    def _forward(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        server = http.client.HTTPConnection(self._server)
        try:
            headers = {**request.headers, "Host": self._server}
            server.request(request.command, request.path, body, headers)
            found = server.getresponse()
            return found.status, dict(found.getheaders()), found.read()
        finally:
            server.close()

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        body: bytes,
        upto: int,
    ) -> None:
        kept = {n: v for n, v in headers.items() if n.lower() not in _OF_THE_CONNECTION}
        size = headers.get("Content-Length") if request.command == "HEAD" else len(body)
        request.send_response_only(status)
        for name, value in {**kept, "Content-Length": size, "Connection": "close"}.items():
            request.send_header(name, str(value))
        request.end_headers()
        request.wfile.write(body[:upto])

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


_OF_THE_CONNECTION = ("connection", "content-length", "transfer-encoding")


@pytest.fixture
def faulty(s3_server: str) -> Iterator[FaultyS3]:
    """Requests to its `url` reach the S3 server, or fail as the test says."""
    started = FaultyS3(s3_server)
    yield started
    started.close()
