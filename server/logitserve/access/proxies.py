"""Checks of the options about proxies: --root-path and --forwarded-allow-ips."""

from __future__ import annotations

import ipaddress
import re

_ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")

OWN_PREFIX = "/v1/"
OWN_PATHS = frozenset(
    {
        "/detokenize",
        "/health",
        "/metrics",
        "/openapi.json",
        "/pooling",
        "/ready",
        "/tokenize",
        "/tokenizer_info",
        "/version",
    }
)


def check_root_path(root_path: str) -> str:
    """Return --root-path without the slash at its end.

    Raises ValueError for a prefix that looks like our own paths.
    """
    root_path = root_path.removesuffix("/")
    if _ROOT_PATH.fullmatch(root_path) is None:
        msg = "must be a path such as /models/small: letters, digits, '-', '.', '_' and '~' between slashes"
        raise ValueError(msg)
    if f"{root_path}/".startswith(OWN_PREFIX) or root_path in OWN_PATHS:
        # With the prefix /v1 a path like /v1/models would not show whether the proxy has taken the prefix
        # off.
        msg = f"must not be one of the server's own paths, nor begin with {OWN_PREFIX}"
        raise ValueError(msg)
    return root_path


def check_trusted_proxies(addresses: list[str]) -> list[str]:
    """Return --forwarded-allow-ips.

    Raises ValueError for an entry that is no address or network, because it would never match.
    """
    if "*" in addresses:
        if len(addresses) > 1:
            msg = "'*' trusts everybody and stands alone"
            raise ValueError(msg)
        return addresses
    for address in addresses:
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            raise ValueError(str(error)) from None
    return addresses
