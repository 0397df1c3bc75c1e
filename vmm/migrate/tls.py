"""TLS for migrations: the files of one side, and its context."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmm.errors import ConfigError

if TYPE_CHECKING:
    import ssl

CONNECT_SECONDS = 10.0  # to connect, and for a TLS handshake


class Tls(NamedTuple):
    """Files in PEM: this side's ``certificate`` and ``key``, and the ``authority`` that must have issued the peer's.

    Both sides present a certificate. Its subject is not compared with a host name: the authority must certify only
    hosts that may receive machines.
    """

    certificate: str
    key: str
    authority: str

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Return the context of one side. Raises :class:`~vmm.errors.ConfigError` for files that cannot be used."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except OSError as error:  # ssl.SSLError is a subclass
            raise ConfigError(f"TLS: {error}: give certificate, key and authority in PEM that fit") from error
        return context
