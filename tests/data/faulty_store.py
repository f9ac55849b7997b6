"""A real S3 server (moto's) on loopback that can be slow, refuse, cut connections, or be away."""

from __future__ import annotations

import logging
import socket
import threading
import time
from pathlib import Path

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "shards"
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *args):
        pass

    def log(self, *args):
        pass


class FaultyStore:
    """Serves objects, and what goes wrong with them.

    Args:
        throttled: How many of the first requests for each shard file are answered by SlowDown.
        cut: How many of the answers that come next end in the middle of the body.
        latency_s: Before each answer.
        bytes_per_s: Of each connection; None for as fast as it goes.
    """

    def __init__(self, throttled=0, cut=0, latency_s=0.0, bytes_per_s=None):
        self.throttled, self.cut = throttled, cut
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.lock = threading.Lock()
        self.asked: list[str] = []
        self.faults = {"throttled": 0, "cut": 0}
        self.app = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        self.server = make_server(
            "127.0.0.1", self.port, self._answer, threaded=True, request_handler=_Quiet
        )
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        """Nobody listens any more; objects stay."""
        self.server.shutdown()
        self.server.server_close()

    def away(self, seconds: float):
        self.stop()
        time.sleep(seconds)
        self.start()

    def upload(self, folder: Path, prefix: str) -> str:
        client = boto3.client("s3", endpoint_url=self.url)
        client.create_bucket(Bucket=BUCKET)
        for path in folder.iterdir():
            client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
        return f"s3://{BUCKET}/{prefix}/manifest.json"

    def _answer(self, environ, start_response):
        name = environ["PATH_INFO"].rpartition("/")[2]
        if environ["REQUEST_METHOD"] == "PUT" or not name.startswith("shard-"):
            return self.app(environ, start_response)
        with self.lock:
            before = self.asked.count(name)
            self.asked.append(name)
        time.sleep(self.latency_s)
        if before < self.throttled:
            self.faults["throttled"] += 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [SLOW_DOWN]
        data = b"".join(self.app(environ, start_response))
        end = len(data) // 2 if before < self.throttled + self.cut else len(data)
        return self._body(data, end, environ["werkzeug.socket"])

    def _body(self, data: bytes, end: int, connection: socket.socket):
        chunk = 1 << 16
        for start in range(0, end, chunk):
            piece = data[start : min(start + chunk, end)]
            if self.bytes_per_s:
                time.sleep(len(piece) / self.bytes_per_s)
            yield piece
        if end < len(data):
            self.faults["cut"] += 1
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
