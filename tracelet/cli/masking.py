"""What may be shown of a variable; and the sieve for the words of others, which is `tracelet.sieve`."""

from __future__ import annotations

import re

from tracelet.addresses import MASK, shown_address, shown_names
from tracelet.sieve import Sieve, open_text

__all__ = ["Sieve", "open_text", "shown"]

# Variables whose value says where things go, not who may: all others are shown as set, without their value.
_OPEN = re.compile(
    r"OTEL_(?:SERVICE_NAME|SDK_DISABLED|EXPORTER_OTLP_(?:\w+_)?(?:ENDPOINT|PROTOCOL|COMPRESSION|TIMEOUT|INSECURE))"
    r"|MLFLOW_(?:TRACKING_URI|EXPERIMENT_NAME|TRACKING_INSECURE_TLS|HTTP_REQUEST_TIMEOUT"
    r"|TRACKING_SERVER_CERT_PATH|TRACKING_CLIENT_CERT_PATH)"
    r"|(?:HTTPS?|ALL|NO)_PROXY"
    r"|TRACELET_(?:BACKEND|PROJECT|EXPERIMENT_NAME|DIR|SHIPPER|RUN_ID|KEEP|MAX_BYTES|GRACE)",
    re.IGNORECASE,
)
# An address and nothing else; it may lack its scheme.
_ADDRESS = re.compile(r"(?:ENDPOINT|URI|(?:HTTPS?|ALL)_PROXY)$", re.IGNORECASE)


def shown(name: str, value: str) -> str:
    """What may be printed of the variable `name`: an address without credentials, or only that it is set.

    Examples:
        >>> from tracelet.cli.masking import shown
        >>> shown("OTEL_EXPORTER_OTLP_HEADERS", "api-key=s3cret"), shown("MLFLOW_TRACKING_TOKEN", "abc")
        ('set (api-key=***)', 'set')
    """
    if name.upper().endswith("_HEADERS"):
        names = [part.partition("=")[0].strip() for part in value.split(",") if "=" in part]
        return f"set ({', '.join(f'{header}={MASK}' for header in names)})" if names else "set"
    if name.upper() == "TRACELET_BACKEND":
        return shown_names(value)
    if _OPEN.fullmatch(name):
        return shown_address(value) if _ADDRESS.search(name) else open_text(value)
    return "set"
