"""Throw-away certificates for 127.0.0.1, of an authority that nobody else trusts."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


class Certificates:
    """An authority and what it issues, as PEM files in a folder. `authority` is the path of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        may_sign = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.authority, _ = self._write("authority", self._key, x509.BasicConstraints(True, None), may_sign)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Return the paths of a new certificate for 127.0.0.1 and of its key."""
        where = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
        return self._write(name, ec.generate_private_key(ec.SECP256R1()), where)

    def context(self, name: str) -> ssl.SSLContext:
        """Return a client's context that has a certificate of its own and trusts the authority."""
        context = ssl.create_default_context(cafile=str(self.authority))
        context.load_cert_chain(*self.issue(name))
        return context

    def _write(
        self, name: str, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType
    ) -> tuple[Path, Path]:
        now = datetime.now(timezone.utc)
        public, issuer = key.public_key(), self._key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        certificate = builder.sign(self._key, SHA256())
        paths = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return paths
