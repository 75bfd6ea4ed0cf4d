"""The gateway's certificate, for both its servers, read again when it changes."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import grpc

from tracelet.errors import ConfigError
from tracelet.guard import guard, logger

__all__ = ["Certificate"]


class Certificate:
    """Certificate, key and, where clients have to show one, their authority.

    Raises:
        ConfigError: a file that can't be read, or a key that isn't the certificate's.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key = cert, key
        self._seen = self._state()
        try:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            """For HTTP; new handshakes see what `refresh` has read."""
            self.context.minimum_version = ssl.TLSVersion.TLSv1_2
            self.context.load_cert_chain(cert, key)
            if client_ca is not None:
                self.context.load_verify_locations(client_ca)
                self.context.verify_mode = ssl.CERT_REQUIRED
            # Read once: a context forgets no authority, so both servers keep the one of the start.
            self._authority = None if client_ca is None else client_ca.read_bytes()
            self._pem = self._read()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the certificate {cert} with the key {key} can't be used: {error}") from None
        self._told = self._pem

    def refresh(self) -> None:
        """Read the files again if they have changed; what can't be used is logged, and the old one stays."""
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            # Tried on a context of its own first: half of a rotation must not end up in the one in use.
            trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            trial.load_cert_chain(self._cert, self._key)
            self.context.load_cert_chain(self._cert, self._key)
            self._pem = self._read()
        except (OSError, ssl.SSLError) as error:
            guard.limited(
                "certificate", "the changed certificate %s can't be used, the old one stays: %s", self._cert, error
            )
        else:
            logger.info("read the certificate %s again", self._cert)

    def for_grpc(self) -> Any:
        """Credentials that ask here at each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._fetch, require_client_authentication=self._authority is not None
        )

    def _fetch(self) -> Any:
        if self._told is self._pem:
            return None  # no news
        self._told = self._pem
        return self._configuration()

    def _configuration(self) -> Any:
        cert, key = self._pem
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=self._authority)

    def _read(self) -> tuple[bytes, bytes]:
        return self._cert.read_bytes(), self._key.read_bytes()

    def _state(self) -> list[object]:
        found: list[object] = []
        for path in (self._cert, self._key):
            try:
                stat = os.stat(path)
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
            except OSError as error:
                found.append(error.errno)
        return found
