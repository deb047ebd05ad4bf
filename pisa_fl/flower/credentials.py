"""`pisa-fl-credentials FOLDER --superlink HOST:PORT --clients N`: what a federation's hosts need, one folder a host.

FOLDER/ca.crt, ca.key                 the federation's certificate authority; its key goes to no host
FOLDER/superlink/                     for the SuperLink's host
    ca.crt, server.pem, server.key    the authority, the SuperLink's certificate and its key
    keys/client-K.pub                 the clients' public keys
    environment.sh                    what Flower's commands need in a shell that talks to this SuperLink
    register.sh                       makes the keys in keys/ known to the SuperLink
    start.sh                          starts the SuperLink, then register.sh
FOLDER/client-K/                      for the host of client K
    ca.crt, client-K, start.sh        the authority, the client's private key, and what keeps its SuperNode running
    policy.example.toml               what its owner may say it takes part in, in a policy.toml
    compose.yaml                      the same in a container
pisa-fl@.service                      in both: a unit of systemd that runs start.sh

A second call makes only what is missing, so it adds clients; scripts are written anew.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import NoReturn, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pisa_fl.flower.policy import TEMPLATE
from pisa_fl.flower.scripts import (
    COMPOSE,
    DIRECT,
    ENVIRONMENT,
    QUIET,
    REGISTER,
    START_CLIENT,
    START_ON_WINDOWS,
    START_SUPERLINK,
    UNIT,
)
from pisa_fl.system.files import replace
from pisa_fl.system.locks import locked

Made = TypeVar("Made")

LOCK = ".lock"
"""File that a call holds in the folder, and removes."""

WRONG = 2
"""Exit status when what was asked for cannot be done."""

PRIVATE, PUBLIC, SCRIPT, FOLDER = 0o600, 0o644, 0o755, 0o700
"""Modes of what is written."""

SUPERNODE_PORT = 9094
"""Port that client 0's SuperNode opens to its own host alone; client K's is K higher: one host may have many."""

CLOCKS = timedelta(days=1)
"""How far a host's clock may be behind this one's when a certificate is new."""

LONGEST = 36500
"""Days that a certificate may be valid, at most."""


@dataclass(frozen=True)
class Address:
    """Where clients reach the SuperLink.

    Attributes:
        host: A DNS name, or an IP address without brackets.
        port: TCP port.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `HOST:PORT`; an IPv6 address stands in brackets.

        Raises:
            argparse.ArgumentTypeError: It is no address that clients can connect to.
        """
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):([0-9]{1,5})", text)
        if match is None or not 1 <= int(match[3]) <= 65535:
            raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 192.0.2.1:9092")
        address = cls((match[1] or match[2]).lower(), int(match[3]))
        if address.ip is None:
            label = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
            if not re.fullmatch(rf"({label}\.)*(?![0-9]+$){label}", address.host):
                raise argparse.ArgumentTypeError(f"{address.host!r} is neither a DNS name nor an IP address")
        elif address.ip.is_unspecified:
            raise argparse.ArgumentTypeError(f"{address.host} is no address that clients can connect to")
        return address

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The host as an IP address, if it is one."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    @property
    def everywhere(self) -> str:
        """What the SuperLink listens on, so that it is reached there and from its own host."""
        return "::" if isinstance(self.ip, IPv6Address) else "0.0.0.0"

    @property
    def local(self) -> Address:
        """Where the SuperLink's own host reaches it."""
        return Address("::1" if isinstance(self.ip, IPv6Address) else "127.0.0.1", self.port)

    @property
    def name(self) -> x509.GeneralName:
        """The host as a certificate has it."""
        return x509.DNSName(self.host) if self.ip is None else x509.IPAddress(self.ip)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def make(folder: Path, address: Address, clients: int, name: str, days: int) -> list[Path]:
    """Make what is missing of a federation's credentials, and the scripts that use them.

    Nothing is written before what is there has been read and fits. No key is ever replaced. A call waits for
    another one in the same folder.

    Args:
        folder: Where they are, or will be.
        address: Where clients reach the SuperLink.
        clients: Number of clients, of whom some may be there.
        name: Name of the SuperLink in Flower's configuration.
        days: How long a new certificate is valid.

    Returns:
        The keys and certificates that are new.

    Raises:
        ValueError: What is there does not fit, or cannot be read.
    """
    with _locked(folder):
        _check(folder, address)
        return _make(folder, address, clients, name, days)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other calls out of a folder, which is made if it is not there."""
    if not folder.exists():
        folder.mkdir(mode=FOLDER, parents=True, exist_ok=True)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give another")
    with locked(folder / LOCK):
        yield


def _make(folder: Path, address: Address, clients: int, name: str, days: int) -> list[Path]:
    """Make what is missing in a folder that was checked, and that is ours alone; what is new."""
    there = _clients_in(folder)
    if clients < there:
        raise ValueError(f"{folder} has {there} clients: --clients {clients} would not remove any")
    folder.chmod(FOLDER)
    new = _make_certificates(folder, address, days)
    for client in range(clients):
        new += _make_client_keys(folder, client)

    superlink, authority = folder / "superlink", (folder / "ca.crt").read_bytes()
    values = {
        "address": address,
        "local": address.local,
        "name": name,
        "command": superlink_command(address),
        "direct": DIRECT,
        "quiet": " ".join(f"{name}={value}" for name, value in QUIET.items()),
    }
    _write(superlink / "ca.crt", authority, PUBLIC)
    _write(superlink / "environment.sh", ENVIRONMENT.format(**values).encode(), PUBLIC)
    _write(superlink / "register.sh", REGISTER.format(**values).encode(), SCRIPT)
    _write(superlink / "start.sh", START_SUPERLINK.format(**values).encode(), SCRIPT)
    _write(superlink / "pisa-fl@.service", UNIT.encode(), PUBLIC)
    for client in range(clients):
        home = _private_key(folder, client).parent
        if home.exists():  # it need not be kept here once it is on its host
            options = client_options(address, client, clients)
            start = START_CLIENT.format(client=client, options=options)
            windows = START_ON_WINDOWS.format(
                client=client, options=" ".join(options.replace("\\\n", "").split())
            )
            _write(home / "ca.crt", authority, PUBLIC)
            _write(home / "start.sh", start.encode(), SCRIPT)
            _write(home / "start.cmd", windows.replace("\n", "\r\n").encode(), PUBLIC)
            _write(home / "pisa-fl@.service", UNIT.encode(), PUBLIC)
            _write(home / "compose.yaml", COMPOSE.format(client=client).encode(), PUBLIC)
            _write(home / "policy.example.toml", TEMPLATE.encode(), PUBLIC)
    return new


def superlink_command(address: Address) -> str:
    """The SuperLink's command line, for its folder."""
    return (
        f"pisa-fl-superlink --host {address.everywhere} --port {address.port} \\\n"
        "    --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key \\\n"
        "    --enable-supernode-auth --database state.db --disable-runtime-dependency-installation"
    )


def client_options(address: Address, client: int, clients: int) -> str:
    """Arguments of a client's SuperNode, for its folder."""
    return (
        f"--superlink {address} --root-certificates ca.crt \\\n"
        f"    --auth-supernode-private-key client-{client} --port {SUPERNODE_PORT + client} \\\n"
        f'    --node-config "partition-id={client} num-partitions={clients}"'
    )


# --- the folder


def _private_key(folder: Path, client: int) -> Path:
    return folder / f"client-{client}" / f"client-{client}"


def _public_key(folder: Path, client: int) -> Path:
    return folder / "superlink" / "keys" / f"client-{client}.pub"


def _clients_in(folder: Path) -> int:
    """Number of clients that a folder has: the highest of theirs, and one for client 0."""
    names = [
        path.stem for pattern in ("client-*", "superlink/keys/client-*.pub") for path in folder.glob(pattern)
    ]
    return max((int(name[7:]) + 1 for name in names if name[7:].isdecimal()), default=0)


def _check(folder: Path, address: Address) -> None:
    """Read all that will be used of what is there.

    Raises:
        ValueError: It does not fit, or cannot be read.
    """
    authority, certificate = folder / "ca.crt", folder / "superlink" / "server.pem"
    key = _read(folder / "ca.key", _pem)
    ca = _read(authority, x509.load_pem_x509_certificate)
    server = _read(certificate, x509.load_pem_x509_certificate)
    _read(folder / "superlink" / "server.key", _pem)
    for client in range(_clients_in(folder)):
        _read(_private_key(folder, client), _ssh)
    ours = (folder / LOCK, _unfinished(folder / "ca.key"))
    others = [path for path in folder.iterdir() if path not in ours]
    if key is None and ca is None and others:
        raise ValueError(f"{folder} holds other files: give a new folder")
    if key is not None and ca is not None and key.public_key() != ca.public_key():
        raise ValueError(f"{folder / 'ca.key'} is not the key of {authority}")
    if key is None and ca is not None and server is None:
        raise ValueError(f"{folder / 'ca.key'} is missing: it has to sign {certificate}")
    if (
        server is not None
        and address.name not in server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ):
        raise ValueError(f"{certificate} is not for {address.host}: remove it, and it is made again")


def _make_certificates(folder: Path, address: Address, days: int) -> list[Path]:
    """Make the authority and the SuperLink's certificate, as far as they are missing; what is new."""
    new: list[Path] = []
    authority, certificate = folder / "ca.crt", folder / "superlink" / "server.pem"
    if not authority.exists():
        key = _key(folder / "ca.key", new)
        _write(authority, _authority(key, days).public_bytes(Encoding.PEM), PUBLIC)
        new.append(authority)
    if not certificate.exists():
        signer, key = _key(folder / "ca.key", new), _key(certificate.with_suffix(".key"), new)
        ca = x509.load_pem_x509_certificate(authority.read_bytes())
        _write(certificate, _server(key, address, ca, signer, days).public_bytes(Encoding.PEM), PUBLIC)
        new.append(certificate)
    return new


def _make_client_keys(folder: Path, client: int) -> list[Path]:
    """Make a client's key pair unless it has one; the SuperLink's half tells, the other may be on its host alone."""
    private, public = _private_key(folder, client), _public_key(folder, client)
    if public.exists():
        return []
    new = []
    key = _read(private, _ssh)
    if key is None:
        key = generate_private_key(SECP384R1())
        _write(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), PRIVATE)
        new.append(private)
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write(public, line + f" {private.name}\n".encode(), PUBLIC)
    return [*new, public]


def _key(path: Path, new: list[Path]) -> EllipticCurvePrivateKey:
    """The private key in a file, which is made if it is not there."""
    key = _read(path, _pem)
    if key is None:
        key = generate_private_key(SECP384R1())
        _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), PRIVATE)
        new.append(path)
    return key


def _read(path: Path, parse: Callable[[bytes], Made]) -> Made | None:
    """What a file holds; None if it is not there.

    Raises:
        ValueError: It holds something else.
    """
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} is not the key or certificate that this command wrote") from error


def _pem(content: bytes) -> EllipticCurvePrivateKey:
    key = load_pem_private_key(content, None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("another kind of key")
    return key


def _ssh(content: bytes) -> EllipticCurvePrivateKey:
    key = load_ssh_private_key(content, None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("another kind of key")
    return key


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file that is either complete or not there, into a folder that is its owner's alone."""
    path.parent.mkdir(mode=FOLDER, parents=True, exist_ok=True)
    temporary = _unfinished(path)
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as file:
            file.write(content)
        temporary.chmod(mode)
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _unfinished(path: Path) -> Path:
    """Where a file is written before it is complete; a call that is killed leaves it, and the next one takes it."""
    return path.with_name(f".{path.name}.new")


# --- certificates


def _authority(key: EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    """A certificate authority, signed by itself."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pisa-fl federation")])
    start = datetime.now(UTC) - CLOCKS
    return (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + CLOCKS + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: EllipticCurvePrivateKey,
    address: Address,
    ca: x509.Certificate,
    signer: EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    """The SuperLink's certificate, for its address and for its own host."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pisa-fl SuperLink")])
    local = [x509.DNSName("localhost"), *(x509.IPAddress(ip_address(ip)) for ip in ("127.0.0.1", "::1"))]
    names = [address.name, *(other for other in local if other != address.name)]
    start = datetime.now(UTC) - CLOCKS
    return (
        x509.CertificateBuilder(ca.subject, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(min(start + CLOCKS + timedelta(days=days), ca.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA384())
    )


def _usage(certificates: bool) -> x509.KeyUsage:
    """What a key may sign: certificates, or the handshake of a connection."""
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# --- the command


class _Parser(argparse.ArgumentParser):
    """A parser that says in one sentence what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message}\n")


def _count(longest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= longest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {longest}")
        return int(text)

    return parse


def _connection(text: str) -> str:
    # Flower's configuration keeps the name of the default connection under `default`
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text) or text == "default":
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name: use letters, digits, - and _, but not 'default'"
        )
    return text


def main() -> None:
    """Entry point of `pisa-fl-credentials`."""
    parser = _Parser(
        prog="pisa-fl-credentials",
        description="Certificates, keys and start scripts of a federation over TLS, one folder a host."
        " Run again, it makes only what is missing: --clients 4 on a folder of 3 adds one.",
    )
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument(
        "--superlink",
        type=Address.parse,
        required=True,
        metavar="HOST:PORT",
        help="where clients reach the SuperLink",
    )
    most = 65535 - SUPERNODE_PORT
    parser.add_argument(
        "--clients", type=_count(most), required=True, metavar="N", help="number of clients, old and new"
    )
    parser.add_argument(
        "--name",
        type=_connection,
        default="federation",
        metavar="CONNECTION",
        help="for engine.connection=CONNECTION",
    )
    parser.add_argument(
        "--days", type=_count(LONGEST), default=3650, help="how long a new certificate is valid; 3650"
    )
    arguments = parser.parse_args()
    folder, address, clients = arguments.folder, arguments.superlink, arguments.clients
    try:
        new = make(folder, address, clients, arguments.name, arguments.days)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    names = ", ".join(str(path.relative_to(folder)) for path in new)
    print(f"new in {folder}: {names or 'nothing but scripts'}")
    print("Copy each folder to its host, keeping its modes, and start it there:\n")
    print(f"superlink/start.sh, or in superlink/\n  {superlink_command(address)}\n")
    for client in range(clients):
        options = client_options(address, client, clients)
        print(f"client-{client}/start.sh, or in client-{client}/\n  pisa-fl-supernode {options}\n")


if __name__ == "__main__":
    main()
