"""A copy of the shipped nginx.conf or haproxy.cfg with other addresses, for use without Docker.

    python docker/render_balancer.py nginx --listen 127.0.0.1:8080 --directory /run/logitserve \
        --replica 127.0.0.1:8001 --replica 127.0.0.1:8002
    nginx -c /run/logitserve/nginx.conf -g 'daemon off;'          # haproxy -f /run/logitserve/haproxy.cfg

Nothing but addresses and paths differs from the shipped file.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

DOCKER = Path(__file__).parent
SHIPPED = {"nginx": DOCKER / "nginx" / "nginx.conf", "haproxy": DOCKER / "haproxy" / "haproxy.cfg"}


def render(
    balancer: str,
    *,
    listen: str,
    replicas: tuple[str, str],
    directory: Path,
    changes: Mapping[str, str] | None = None,
) -> Path:
    """Write the configuration of ``balancer``, "nginx" or "haproxy", into ``directory`` and return its path.

    Addresses are ``host:port``. nginx keeps its pid, log (``access.log``) and temporary files there too.
    ``changes`` maps further pieces of the shipped text to what stands in their place.

    Raises ValueError when the shipped file lacks a piece that is to be replaced.
    """
    shipped = SHIPPED[balancer]
    # In haproxy `server server-1 server-1:8000` has a name, which stays, and an address.
    replaced = {f"server-{number}:8000": address for number, address in enumerate(replicas, 1)}
    if balancer == "nginx":
        replaced |= {
            " /tmp/": f" {directory}/",  # first, since the directory may lie there itself
            "/dev/stdout": f"{directory}/access.log",
            "listen 8080;": f"listen {listen};",
        }
    else:
        replaced |= {"bind :8080": f"bind {listen}"}
    text = shipped.read_text()
    for old, new in {**replaced, **(changes or {})}.items():
        if old not in text:
            msg = f"{shipped} has no {old!r}"
            raise ValueError(msg)
        text = text.replace(old, new)
    written = directory / shipped.name
    written.write_text(text)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("balancer", choices=SHIPPED)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--replica", required=True, action="append", metavar="HOST:PORT", help="twice")
    parser.add_argument(
        "--directory", required=True, type=Path, help="existing directory for the file, and for nginx's own"
    )
    options = parser.parse_args()
    if len(options.replica) != 2:
        parser.error("--replica: exactly two are needed; write the file by hand for more")
    render(
        options.balancer,
        listen=options.listen,
        replicas=(options.replica[0], options.replica[1]),
        directory=options.directory.resolve(),
    )


if __name__ == "__main__":
    main()
