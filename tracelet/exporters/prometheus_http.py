"""OTLP over HTTP to Prometheus: one address, our own headers, and advice in that server's words."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from typing import Any

import requests

from tracelet.exporters.headers_file import file_here, headers_in
from tracelet.exporters.otlp_http import HttpSender
from tracelet.exporters.otlp_wire import WIRE_HEADER, Reply, suppressed
from tracelet.sieve import Sieve

__all__ = ["PrometheusSender"]

TIMEOUT_S = 30.0
_FILES = ("headers_file", "certificate", "client_certificate", "client_key")
_GZIP_LEVEL = 1


class PrometheusSender(HttpSender):
    """Posts metrics to `url`, which may hold `user:password@`; answers are read as any OTLP receiver's.

    Not OTel's exporter below it: that one takes its headers and certificates from the OTEL_EXPORTER_OTLP_* variables,
    and a collector's token is none of this server's business. `certificate` is the authority's file, else that of
    REQUESTS_CA_BUNDLE; `client` is the file of our certificate with its key, or the two files. Of
    `environ` only secrets are read, so that they stand in no message.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        timeout_s: float,
        *,
        certificate: str | None = None,
        client: str | tuple[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        # On purpose without HttpSender's own beginning: see above.
        self._signal = "metrics"
        self._url = url
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.cert = client
        self._certificate = certificate
        self._sent = {
            "Content-Type": "application/x-protobuf",
            "Content-Encoding": "gzip",
            WIRE_HEADER[0]: WIRE_HEADER[1],
            **headers,
        }
        self._sieve = Sieve(environ or {}, [{"headers": headers, "url": url}])

    @classmethod
    def of(cls, spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> PrometheusSender:
        """The sender of a destination as `tracelet.destinations` makes it, with the headers that its file has now.

        Raises:
            ValueError, OSError: the file with the headers can't be read.
        """
        files = cls.files(spec, environ)
        written = {} if files["headers_file"] is None else headers_in(files["headers_file"])
        certificate, key = files["client_certificate"], files["client_key"]
        return cls(
            str(secrets.get("url") or spec["url"]),
            written | {name.lower(): value for name, value in (secrets.get("headers") or {}).items()},
            float(spec.get("timeout_s") or TIMEOUT_S),
            certificate=files["certificate"],
            client=(certificate, key) if certificate and key else certificate,
            environ=environ,
        )

    @staticmethod
    def files(spec: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str | None]:
        """The files that this destination is sent with, by the names that its specification has for them."""
        return {name: file_here(spec.get(name), f"TRACELET_PROMETHEUS_{name.upper()}", environ) for name in _FILES}

    def send(self, body: bytes) -> Reply:
        """Post one encoded request, once."""
        post: dict[str, Any] = {
            "data": gzip.compress(body, _GZIP_LEVEL, mtime=0),
            "headers": self._sent,
            "timeout": self._timeout_s,
            "allow_redirects": False,
        }
        if self._certificate is not None:
            post["verify"] = self._certificate  # here, since requests puts REQUESTS_CA_BUNDLE before a session's own
        with suppressed():
            try:
                try:
                    answer = self._session.post(self._url, **post)
                except requests.exceptions.ConnectionError as error:
                    if isinstance(error, (requests.exceptions.Timeout, requests.exceptions.SSLError)):
                        raise
                    # Mostly a kept connection that the server had closed meanwhile.
                    answer = self._session.post(self._url, **post)
            except (requests.RequestException, OSError, ValueError) as error:
                return self._unreachable(error)
        return self._advised(answer)

    def close(self) -> None:
        """Let the connection go."""
        self._session.close()

    def _advised(self, answer: requests.Response) -> Reply:
        reply = self._read(answer)
        if answer.status_code == 404:
            return Reply(
                "later",
                f"{reply.reason.partition(';')[0]}; start Prometheus with --web.enable-otlp-receiver, and see that the"
                " address is its own",
                loud=True,
            )
        if answer.status_code in (401, 403):
            said = reply.reason.partition("; check the headers")[0]
            return Reply(
                "later",
                f"{said}; put user:password@ into the address, or give tracelet.Prometheus(headers=...), or a"
                " headers_file",
                loud=True,
                credentials=True,
            )
        return reply
