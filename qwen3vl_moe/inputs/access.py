"""What the images and videos of a request may be read from: which files, which hosts, which addresses.

Whoever writes a request chooses its paths and URLs. Requests of one's own may read anything; for those of others there
are limits, and one :class:`MediaAccess` carries them to every place that opens a file or a connection.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_moe.errors import OptionError, PromptError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Public by the book, but answered within a cloud: Azure's and Oracle's metadata. (169.254.169.254, which most clouds
# use, is link-local, and Alibaba's 100.100.100.200 is of the range that carriers share.)
_METADATA = {ipaddress.ip_address("168.63.129.16"), ipaddress.ip_address("192.0.0.192")}
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class MediaAccess:
    """Limits on where images come from; the default sets none. Bytes, PIL images and data URLs are always taken.

    Attributes:
        media_root: the directory that paths and file:// URLs have to lie in, links followed; None: anywhere. It means
            nothing for http and https, which ``allow_hosts`` limits.
        allow_hosts: the hosts that http and https may reach, redirects included: ``"example.org"`` is that host alone,
            ``".example.org"`` it and all below; None: any, ``()``: none.
        private_hosts: whether http and https may reach addresses that are not on the public internet: this machine,
            the local network, a cloud's metadata service.

    Raises:
        OptionError: the root is no directory, or a host is not the bare name of one.
    """

    media_root: Path | None = None
    allow_hosts: tuple[str, ...] | None = None
    private_hosts: bool = True

    def __post_init__(self):
        if self.media_root is not None:
            try:
                root = Path(self.media_root).resolve(strict=True)
            except (OSError, ValueError, TypeError, RuntimeError):
                root = None
            if root is None or not root.is_dir():
                raise OptionError(f"media_root {str(self.media_root)!r} is not a directory")
            object.__setattr__(self, "media_root", root)
        if self.allow_hosts is not None:
            object.__setattr__(self, "allow_hosts", _host_rules(self.allow_hosts))

    def check_path(self, path: Path, where: str) -> Path:
        """``path`` with every link followed, so that what was checked is what will be opened.

        Raises:
            PromptError: it lies outside of ``media_root``; whether it exists there is not told.
        """
        if self.media_root is None:
            return path
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(self.media_root):
            raise PromptError(f"{where} is not within media_root, {str(self.media_root)!r}, as local files have to be")
        return real

    def check_host(self, host: str, where: str) -> None:
        """Refuse a host that ``allow_hosts`` does not name.

        Raises:
            PromptError: as said.
        """
        if self.allow_hosts is None:
            return
        name = host_name(host)
        if name is None or not any(
            name == rule or (rule.startswith(".") and f".{name}".endswith(rule)) for rule in self.allow_hosts
        ):
            raise PromptError(f"{where} cannot be downloaded: the host {host[:80]!r} is not one of allow_hosts")

    def check_address(self, address: str, host: str, where: str) -> None:
        """Refuse an address (of ``host``) that is not on the public internet, unless ``private_hosts`` is set.

        Raises:
            PromptError: as said; the address itself is not told.
        """
        if not self.private_hosts and not _is_public(address):
            raise PromptError(
                f"{where} cannot be downloaded: the host {host[:80]!r} has an address of this machine or of a private "
                "network; allow_private_hosts lets such be reached"
            )


def media_access(
    media_root: str | os.PathLike[str] | None = None,
    allow_hosts: str | Iterable[str] | None = None,
    allow_private_hosts: bool = True,
) -> MediaAccess:
    """The access that options describe, as they come from a program or from :class:`LLM`'s caller.

    Args:
        allow_hosts: names, or one text with commas between them; an empty one allows none.

    Raises:
        OptionError: the root is no directory, a host is not the bare name of one, or one of them is of another type.
    """
    if media_root is not None and not isinstance(media_root, str | os.PathLike):
        raise OptionError(f"media_root={media_root!r:.80}: a directory is needed")
    if allow_hosts is not None and not isinstance(allow_hosts, Iterable):
        raise OptionError(f"allow_hosts={allow_hosts!r:.80}: names of hosts are needed")
    if not isinstance(allow_private_hosts, bool):  # "no" would be a yes
        raise OptionError(f"allow_private_hosts={allow_private_hosts!r:.80}: True or False is needed")
    hosts = None
    if allow_hosts is not None:
        text = isinstance(allow_hosts, str)
        hosts = tuple(host.strip() for host in allow_hosts.split(",") if host.strip()) if text else tuple(allow_hosts)
    return MediaAccess(None if media_root is None else Path(media_root), hosts, allow_private_hosts)


def host_name(host: str) -> str | None:
    """A host's name in the one spelling that names are compared in, lower case ASCII; None if it is none."""
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        # A final dot only says that the name is complete.
        name = host.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        return None
    return name if _NAME.fullmatch(name) else None


def _host_rules(hosts: Iterable[str]) -> tuple[str, ...]:
    rules = []
    for host in hosts:
        name = host_name(host.removeprefix(".")) if isinstance(host, str) else None
        if name is None:
            raise OptionError(
                f"allow_hosts has {host!r}; the name of a host is needed, such as example.org, or .example.org for it "
                "and all below it"
            )
        rules.append(f".{name}" if host.startswith(".") else name)
    return tuple(rules)


def _is_public(address: str) -> bool:
    ip: Address = ipaddress.ip_address(address.partition("%")[0])  # without the scope of a link-local address
    if isinstance(ip, ipaddress.IPv6Address):
        # Addresses that carry one of IPv4, which is where the packets go in the end.
        within = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in _NAT64:
            within = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if within is not None:
            ip = within
    return ip.is_global and not ip.is_multicast and ip not in _METADATA
