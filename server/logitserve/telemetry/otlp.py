"""The option --otlp-endpoint: its check, and the check for the packages that it needs. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec
from urllib.parse import urlsplit

TRACES_PATH = "/v1/traces"
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class MissingPackageError(Exception):
    """An option needs packages that are not installed."""


def check_endpoint(url: str) -> str:
    """Return the URL that traces are sent to: a collector's address, with OTLP's path for traces unless it has it.

    Raises ValueError for what is no http URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        msg = "must be the address of a collector such as http://127.0.0.1:4318"
        raise ValueError(msg)
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith(TRACES_PATH) else path + TRACES_PATH).geturl()


def check_packages() -> None:
    """Raise MissingPackageError where a package for traces is not installed."""
    try:
        is_installed = all(find_spec(name) for name in PACKAGES)
    except ModuleNotFoundError:
        is_installed = False
    if not is_installed:
        msg = "--otlp-endpoint needs packages that are not installed: pip install 'logitserve[otel]'"
        raise MissingPackageError(msg)
