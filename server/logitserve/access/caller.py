"""The caller of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from starlette.types import Scope


@dataclass(frozen=True, slots=True)
class Caller:
    """A request's caller, identified by its key.

    Attributes:
        tenant: the key's digest; empty where no key is needed.
    """

    tenant: str = ""

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """Return the caller that the key gate put into the scope."""
        caller: Self = scope["logitserve.caller"]
        return caller

    def enter(self, scope: Scope) -> None:
        """Put the caller into the scope."""
        scope["logitserve.caller"] = self

    def cache_salt(self, chosen: str | None) -> str | None:
        """Return the salt of a request's prefixes, made from its own choice. Two keys never share a prefix.

        Digests have one length, so no choice of one caller makes the salt of another.
        """
        return f"{self.tenant}:{chosen or ''}" if self.tenant else chosen
