"""TLS of the serving port: the server's certificate, and whose clients may come in. Replaced without a restart.

New connections are shaken hands with using the files as they are at that moment; a new certificate that is broken, or
does not belong to its key, is told in the log and the one before stays. Connections that are open keep theirs until
they are renewed, at the latest when the server asks them to (`grpc.max_connection_age_ms`).
"""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path
from typing import Any, NoReturn

import grpc

from service.reloading import Reloaded
from worker.config import ConfigError

logger = logging.getLogger(__name__)


class ServerCertificate:
    """A certificate chain with its key, in PEM; with `client_ca`, clients must show a certificate that it signed.

    Raises:
        ConfigError: a file is missing or broken, or the key is another certificate's.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._files = Reloaded([cert, key, *([client_ca] if client_ca else [])], self._parse)
        self._lock = threading.Lock()
        self._used = self._files.now()

    @property
    def is_mutual(self) -> bool:
        return self._client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        fetch: Any = self._fetch  # its type stubs forget the None
        return grpc.dynamic_ssl_server_credentials(self._used, fetch, require_client_authentication=self.is_mutual)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks at each handshake, on its own threads; None: as before."""
        with self._lock:
            now = self._files.now()
            if now is self._used:
                return None
            self._used = now
            return now

    def _parse(self, contents: list[bytes]) -> grpc.ServerCertificateConfiguration:
        cert, key, *ca = contents
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ConfigError(
                f"{self._cert} and {self._key} are not a certificate and its key (PEM, no passphrase): {_why(error)}"
            ) from error
        if ca:
            try:
                context.load_verify_locations(cadata=ca[0].decode("ascii", "replace"))
            except (ssl.SSLError, ValueError) as error:
                raise ConfigError(f"{self._client_ca} is not a certificate (PEM): {_why(error)}") from error
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca[0] if ca else None)


def _no_password() -> NoReturn:
    """Otherwise OpenSSL would ask on the terminal."""
    raise ValueError("the key has a passphrase")


def _why(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
