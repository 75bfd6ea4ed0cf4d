"""OTLP over HTTP: OTel's own exporter resolves address, headers, TLS and timeout; the body and the answer are ours.

OTel's exporters take a `requests.Session`, a public argument. Ours receives the post with everything resolved,
replaces the (empty) body by our bytes, and keeps status, headers and body of the answer. So nothing private of the
SDK is touched, and none of its retries, drops and log lines come into play: it is told 200 every time.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import requests
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.metrics.export import MetricsData

from tracelet.addresses import without_credentials
from tracelet.exporters.otlp_wire import WIRE_HEADER, Options, Reply, redacted_headers, said, suppressed
from tracelet.exporters.retry_after import retry_after

__all__ = ["HttpSender", "accepted"]

_EXPORTERS: Mapping[str, Any] = {"metrics": OTLPMetricExporter, "traces": OTLPSpanExporter, "logs": OTLPLogExporter}
_NOTHING: Mapping[str, Any] = {"metrics": MetricsData(resource_metrics=()), "traces": (), "logs": ()}
_RESPONSES: Mapping[str, Any] = {
    "metrics": ExportMetricsServiceResponse,
    "traces": ExportTraceServiceResponse,
    "logs": ExportLogsServiceResponse,
}
_REJECTED = {"metrics": "rejected_data_points", "traces": "rejected_spans", "logs": "rejected_log_records"}
# Go's servers, and so some receivers, guess the type of an answer for which none was set.
_PROTOBUF = frozenset({"application/x-protobuf", "application/protobuf", "application/octet-stream", ""})
_JSON = frozenset({"application/json"})
_COMPRESSIONS = {"gzip": Compression.Gzip, "none": Compression.NoCompression}
_GZIP_LEVEL = 1  # 0.15 us a point for 15.5 bytes; OTel's level 9 takes 2.4 to 5.4 us for 15.0


class _Relay(requests.Session):
    """Posts our body where OTel's exporter would post its own, and keeps what came back."""

    def __init__(self, behind: requests.Session | None) -> None:
        super().__init__()
        self._behind = behind
        self.body = b""
        self.answer: requests.Response | Exception | None = None

    def request(self, method: str | bytes, url: str | bytes, *_: Any, **given: Any) -> requests.Response:
        """Called by OTel's exporter with its resolved url, headers and timeout."""
        headers = {**(given.get("headers") or {}), WIRE_HEADER[0]: WIRE_HEADER[1]}
        encoding = next((value for name, value in headers.items() if name.lower() == "content-encoding"), "")
        data = self.body
        if encoding == "gzip":
            data = gzip.compress(data, _GZIP_LEVEL, mtime=0)
        elif encoding == "deflate":
            data = zlib.compress(data, _GZIP_LEVEL)
        post: dict[str, Any] = {
            "headers": headers,
            "data": data,
            "timeout": given.get("timeout"),
            "allow_redirects": False,
        }
        if isinstance(self.verify, str):
            # Said here, since requests puts REQUESTS_CA_BUNDLE before a session's own.
            post["verify"] = self.verify
        try:
            self.answer = self._post(str(url), post)
        except Exception as error:  # noqa: BLE001 - a missing certificate file is an OSError, a bad header a ValueError,
            # a provider's session may raise anything: all of them are reasons to be told, none to lose data over
            self.answer = error
        told = requests.Response()
        told.status_code = 200
        return told

    def _post(self, url: str, post: dict[str, Any]) -> requests.Response:
        if self._behind is not None:
            # A credential provider's session signs what goes through it; TLS settings were put on us.
            self._behind.verify, self._behind.cert = self.verify, self.cert or self._behind.cert
            return self._behind.request("POST", url, **post)
        try:
            return super().request("POST", url, **post)
        except requests.exceptions.ConnectionError as error:
            if isinstance(error, (requests.exceptions.Timeout, requests.exceptions.SSLError)):
                raise
            # Mostly a kept connection that the server had closed meanwhile.
            return super().request("POST", url, **post)


class HttpSender:
    """Posts requests of one signal.

    Raises:
        RuntimeError: OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER names one that isn't installed.
    """

    def __init__(self, options: Options) -> None:
        self._signal = options.signal
        self._relay = _Relay(_provided_session(options))
        self._sieve = options.sieve()
        with redacted_headers():
            self._exporter = _EXPORTERS[options.signal](
                endpoint=options.endpoint,
                headers=dict(options.headers) or None,
                timeout=options.timeout_s,
                compression=None if options.compression is None else _COMPRESSIONS[options.compression],
                session=self._relay,
            )

    def send(self, body: bytes) -> Reply:
        """Post one encoded request, once."""
        self._relay.body, self._relay.answer = body, None
        with suppressed():
            self._exporter.export(_NOTHING[self._signal])
        answer, self._relay.answer = self._relay.answer, None
        self._relay.body = b""
        if answer is None:
            return Reply(
                "later",
                "the installed opentelemetry-exporter-otlp-proto-http did not post through its session:"
                " install a version that tracelet-otel was tested with",
                loud=True,
            )
        if isinstance(answer, Exception):
            return self._unreachable(answer)
        return self._read(answer)

    def close(self) -> None:
        """Let the connections go."""
        self._relay.close()

    def _unreachable(self, error: Exception) -> Reply:
        request = getattr(error, "request", None)
        address = "" if request is None or not request.url else f" at {without_credentials(request.url)}"
        if isinstance(error, requests.exceptions.InvalidHeader):
            # The error's own text would show the value.
            return Reply("later", "a header's name or value isn't legal in HTTP (a line break in a token?)", loud=True)
        if isinstance(error, requests.exceptions.Timeout):
            return Reply("later", self._clean(f"no answer in time from the OTLP receiver{address}"))
        passing = isinstance(error, requests.RequestException) and not isinstance(
            error, (requests.exceptions.SSLError, ValueError)
        )
        return Reply(
            "later", self._clean(f"the OTLP receiver{address} can't be reached: {_cause(error)}"), loud=not passing
        )

    def _read(self, answer: requests.Response) -> Reply:
        status = answer.status_code
        if 200 <= status < 300:
            return self._accepted(answer)
        words = self._clean(f"HTTP {status} from {_place(answer)}: {_message(answer)}")
        if 300 <= status < 400:
            target = self._clean(answer.headers.get("Location", "nowhere"))
            return Reply("later", f"{words}; it points to {target}: set that as the endpoint", loud=True)
        if status in (400, 422):
            return Reply("refused", words)
        if status == 413:
            return Reply("too_large", words)
        if status in (401, 403):
            hint = "check the headers (OTEL_EXPORTER_OTLP_HEADERS)"
            return Reply("later", f"{words}; {hint}", loud=True, credentials=True)
        if status in (404, 405):
            hint = f"is the address right, and does the receiver take {self._signal}?"
            return Reply("later", f"{words}; {hint}", loud=True, elsewhere=True)
        if status == 500:
            return Reply("fault", words, after_s=retry_after(answer.headers.get("Retry-After")))
        # 408, 429, other 5xx; and what no rule of OTLP covers is kept, not dropped.
        passing = status in (408, 429) or status > 500
        return Reply("later", words, after_s=retry_after(answer.headers.get("Retry-After")), loud=not passing)

    def _accepted(self, answer: requests.Response) -> Reply:
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return accepted(self._signal, answer.content, kind, self._clean, _place(answer))

    def _clean(self, text: str) -> str:
        return said(text, self._sieve)


def _provided_session(options: Options) -> requests.Session | None:
    """The session of a credential provider, found as OTel's exporter finds it when it is given none."""
    names = (
        "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
        f"OTEL_PYTHON_EXPORTER_OTLP_HTTP_{options.signal.upper()}_CREDENTIAL_PROVIDER",
    )
    name = next((options.environ[n] for n in names if options.environ.get(n)), None)
    if name is None:
        return None
    from importlib.metadata import entry_points

    for point in entry_points(group="opentelemetry_otlp_credential_provider", name=name):
        session = point.load()()
        if isinstance(session, requests.Session):
            return session
        raise RuntimeError(f"credential provider {name!r} gave a {type(session).__name__}, no requests.Session")
    raise RuntimeError(f"credential provider {name!r} (in {names[0]}) is not installed")


def accepted(signal: str, content: bytes, kind: str, clean: Callable[[str], str], place: str) -> Reply:
    """What a 2xx, or gRPC's OK, says: all taken, some items rejected; or, by its body, that no OTLP receiver said it.

    Only a receiver's own answer counts as delivery. A proxy's log-in page, a health check's "ok" or a service that
    takes any POST would otherwise swallow a run without a word. No body at all is a success: some receivers say 204.
    """
    response = _RESPONSES[signal]()
    try:
        if kind in _JSON:
            from google.protobuf.json_format import ParseDict

            parsed = json.loads(content or b"{}")
            if not isinstance(parsed, dict):
                raise ValueError(kind)
            ParseDict(parsed, response, ignore_unknown_fields=True)
        elif kind in _PROTOBUF or (not content and kind != "text/html"):
            response.ParseFromString(content)
        else:
            raise ValueError(kind)
    except Exception:  # noqa: BLE001 - two parsers with several kinds of error, differing between protobuf's runtimes
        what = "a web page" if kind == "text/html" else f"{len(content)} bytes of {kind or 'no named type'}"
        return Reply(
            "later",
            f"{place} answered with success, but with {what} where OTLP has its own answer: it is no OTLP receiver"
            f" (a proxy's log-in page, another service?): is the address right, and does it take {signal}?",
            loud=True,
            elsewhere=True,
        )
    partial = response.partial_success
    return Reply("accepted", clean(partial.error_message), rejected=int(getattr(partial, _REJECTED[signal])))


def _place(answer: requests.Response) -> str:
    parts = urlsplit(answer.url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _cause(error: Exception) -> str:
    """The last cause of a chain of errors, which alone says something: "[Errno 111] Connection refused"."""
    inner = error.args[0] if error.args else error
    text = str(getattr(inner, "reason", None) or inner)
    text = re.sub(r"^\w*(Connection|Pool)\w*\(.*?\): ", "", text)
    return text.removeprefix("Failed to establish a new connection: ")


def _message(answer: requests.Response) -> str:
    """The server's own words: OTLP answers errors with a google.rpc.Status, proxies with text."""
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind == "application/x-protobuf":
        from google.rpc.status_pb2 import Status

        try:
            return str(Status.FromString(answer.content).message) or answer.reason
        except Exception:  # noqa: BLE001 - protobuf's DecodeError differs between its runtimes
            return answer.reason
    if kind == "text/html":
        return answer.reason
    return answer.content[:64_000].decode("utf-8", "replace") or answer.reason or ""
