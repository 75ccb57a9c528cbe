"""Certificates and keys of a fleet: a CA of its own for trying out, the server's certificate, and a key per node."""

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtalos.errors import InputError
from fedtalos.files import write_atomic

DAYS = 365


def make_certificates(folder: Path, host: str) -> None:
    """Write ca.crt, server.crt and server.key for a server that nodes reach as ``host``.

    The CA's own key is thrown away: nothing else can be signed in its name.

    >>> make_certificates(Path("fleet/certificates"), "192.168.1.20")
    """
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtalos fleet")])
    ca = (
        _certificate(ca_name, ca_name, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(ca_key, hashes.SHA384())
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    names = {alternative(text): None for text in (host, "localhost", "127.0.0.1")}
    server = (
        _certificate(name, ca_name, server_key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    write_atomic(folder / "ca.crt", ca.public_bytes(serialization.Encoding.PEM))
    write_atomic(folder / "server.crt", server.public_bytes(serialization.Encoding.PEM))
    write_secret(folder / "server.key", _private(server_key, serialization.PrivateFormat.PKCS8))


def check_pair(certificate: bytes, key: bytes, ca: bytes) -> None:
    """Refuse, with an InputError, other than a certificate, its own key and a CA's certificate, in PEM and unlocked."""
    try:
        mine = x509.load_pem_x509_certificate(certificate).public_key()
        private = serialization.load_pem_private_key(key, password=None)
        x509.load_pem_x509_certificates(ca)
    except (ValueError, TypeError) as error:
        raise InputError(f"server_certificate, server_key, ca: expected unlocked PEM files ({error})") from error
    if mine != private.public_key():
        raise InputError("server_key: is not the key of server_certificate")


def make_node_key(folder: Path, client: int) -> None:
    """Write client_K, the key by which a node proves itself, and client_K.pub, which the server is told of."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(folder / f"client_{client}", _private(key, serialization.PrivateFormat.OpenSSH))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_atomic(folder / f"client_{client}.pub", public + b"\n")


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read."""
    before = os.umask(0o077)
    try:
        write_atomic(path, content)
    finally:
        os.umask(before)


def alternative(host: str) -> x509.GeneralName:
    """Write an address or a name as certificates do."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    content: bytes = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return content
