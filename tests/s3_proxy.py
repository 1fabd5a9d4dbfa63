"""A proxy in front of an S3 server that injects faults."""

import http.client
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_NOT_PASSED = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_REFUSALS = {
    "throttle": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "deny": (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
    "conflict": (409, b"<Error><Code>ConditionalRequestConflict</Code><Message>Try again.</Message></Error>"),
    "expire": (400, b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"),
}


class Proxy:
    """Passes requests on to a server.

    Attributes:
        url: its address.
        faults: called with the method, the path and the number of earlier such requests; returns `throttle` (503),
            `deny` (403), `conflict` (409), `expire` (400), `slow` (one second later), `stall` (no answer), `cut`
            (the connection ends), `break off` (half of the body), or None.
        expired_keys: access keys whose requests get the fault `expire`.
        fault_counts: how often each fault occurred.
    """

    def __init__(self, target: str) -> None:
        self.faults = lambda method, path, before: None
        self.expired_keys: set[str] = set()
        self.fault_counts: Counter[str] = Counter()
        self._closed = threading.Event()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        proxy, host = self, urlsplit(target).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def _pass_on(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._next_fault(self.command, self.path)
                key = re.search("Credential=([^/]+)/", self.headers.get("Authorization", ""))
                if key and key[1] in proxy.expired_keys:
                    fault = "expire"
                if fault in _REFUSALS:
                    status, content = _REFUSALS[fault]
                    self._answer(status, {"Content-Type": "application/xml"}, content)
                    return
                if fault == "cut":
                    self.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(1)
                if fault == "stall":
                    proxy._closed.wait()
                    return
                upstream = http.client.HTTPConnection(host, timeout=60)
                try:
                    # The signature covers the Host header: pass it on unchanged.
                    upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() not in ("connection", "expect"):
                            upstream.putheader(name, value)
                    upstream.endheaders(body)
                    answer = upstream.getresponse()
                    content = answer.read()
                    headers = {name: value for name, value in answer.getheaders() if name.lower() not in _NOT_PASSED}
                    length = answer.getheader("Content-Length") or str(len(content))
                finally:
                    upstream.close()
                self._answer(answer.status, headers | {"Content-Length": length}, content, fault == "break off")

            def _answer(self, status, headers, content, broken=False):
                self.send_response_only(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":  # a body would be taken for the next answer
                    self.wfile.write(content[: len(content) // 2] if broken else content)
                self.close_connection = self.close_connection or broken

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815 - http.server's names

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _next_fault(self, method, path):
        with self._lock:
            before = self._requests[method, path]
            self._requests[method, path] += 1
            fault = self.faults(method, path, before)
            if fault:
                self.fault_counts[fault] += 1
            return fault

    def forget_requests(self) -> None:
        """Count the earlier requests of each kind from 0 again."""
        self._requests.clear()

    def close(self) -> None:
        """Stop listening."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
