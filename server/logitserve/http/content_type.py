"""The media types of a JSON body. A web page can send others without a preflight."""

from __future__ import annotations

import re

from starlette.types import Scope

from logitserve.errors import ApiError
from logitserve.http.scope import headers

JSON = re.compile(r"application/(?:[a-z0-9!#$&^_.+-]+\+)?json")

FORM = "application/x-www-form-urlencoded"
"""The type that curl -d always declares. A page's form declares it too, but with an Origin."""

LONGEST_TOLD = 100


def check_content_type(scope: Scope) -> None:
    """Refuse a body that is not sent as JSON, as curl's form, or without a type. Raises ApiError 415."""
    for value in headers(scope, b"content-type"):
        media_type = value.decode("latin-1").partition(";")[0].strip().lower()
        if not media_type or JSON.fullmatch(media_type):
            continue
        is_form = media_type == FORM
        if is_form and not headers(scope, b"origin"):
            continue
        why = " from a web page" if is_form else ""
        raise ApiError(
            415,
            f"The body's Content-Type is '{media_type[:LONGEST_TOLD]}', which is not taken{why}: "
            "send application/json.",
        )
