"""compose.yaml agrees with itself, with the balancers' configurations and with the server's options."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed_replica import check_limits, settings_of
from logitengine.config import EngineConfig
from logitserve.config import ENV_PREFIX, ServerConfig

DOCKER = Path(__file__).parents[2] / "docker"
NGINX = (DOCKER / "nginx" / "nginx.conf").read_text()
HAPROXY = (DOCKER / "haproxy" / "haproxy.cfg").read_text()
REPLICAS = {"server-1", "server-2"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """Return compose.yaml with its variables' defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DOCKER / "compose.yaml").read_text())
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def options_of(service: dict[str, Any]) -> dict[str, str]:
    return {name.removeprefix(ENV_PREFIX).lower(): value for name, value in service["environment"].items()}


def test_the_replicas_are_those_of_the_balancers(compose: dict[str, Any]) -> None:
    assert {name for name in compose["services"] if name.startswith("server")} == REPLICAS
    upstreams = re.findall(r"upstream \w+ \{(.*?)\n    \}", NGINX, re.DOTALL)
    backends = HAPROXY.split("\nbackend ")[1:]
    assert len(upstreams) == len(backends) == 2
    for servers in upstreams:
        assert set(re.findall(r"server (\S+):8000 max_fails=0;", servers)) == REPLICAS
    for backend in backends:
        assert set(re.findall(r"server \S+ (\S+):8000", backend)) == REPLICAS


def test_every_option_is_one_of_the_server(compose: dict[str, Any]) -> None:
    known = set(ServerConfig.model_fields) | set(EngineConfig.model_fields)
    for name in REPLICAS:
        assert set(options_of(compose["services"][name])) <= known


def test_whoever_stops_a_replica_waits_until_it_has_drained(compose: dict[str, Any]) -> None:
    for name in REPLICAS:
        options = options_of(compose["services"][name])
        grace = float(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert grace >= float(options.get("drain_delay", "0")) + float(options["drain_timeout"]) + 10


def test_the_balancers_have_the_bounds_of_the_servers(compose: dict[str, Any]) -> None:
    bounds = ServerConfig()
    assert f"client_max_body_size        {bounds.max_body_bytes >> 20}m;" in NGINX
    assert f"req.body_size gt {bounds.max_body_bytes} " in HAPROXY
    assert f"large_client_header_buffers 4 {bounds.max_header_bytes >> 10}k;" in NGINX
    patience = {
        float(match)
        for match in re.findall(r"(?:proxy_read_timeout|timeout server) +(\d+)s", NGINX + HAPROXY)
    }
    assert len(patience) == 1
    assert float(options_of(compose["services"]["server-1"])["request_timeout"]) < patience.pop()


def test_files_that_are_mounted_exist(compose: dict[str, Any]) -> None:
    mounted = [volume for service in compose["services"].values() for volume in service["volumes"]]
    files = [volume.split(":")[0] for volume in mounted if volume.startswith("./")]
    assert [file for file in files if not (DOCKER / file).exists()] == []


def test_nginx_sees_a_changed_configuration_since_its_directory_is_mounted(compose: dict[str, Any]) -> None:
    (volume,) = compose["services"]["nginx"]["volumes"]
    source, target, access = volume.split(":")
    assert ((DOCKER / source / "nginx.conf").read_text(), access) == (NGINX, "ro")
    assert f"{target}/nginx.conf" in compose["services"]["nginx"]["command"]


def test_nginx_starts_without_the_replicas(compose: dict[str, Any]) -> None:
    assert "depends_on" not in compose["services"]["nginx"]


def test_the_replicas_are_checked_by_the_images_own_command(compose: dict[str, Any]) -> None:
    for name in REPLICAS:
        assert "test" not in compose["services"][name]["healthcheck"]


def test_what_a_replica_may_use_fits_its_limits(compose: dict[str, Any], tmp_path: Path) -> None:
    for name in REPLICAS:
        service = compose["services"][name]
        keys = tmp_path / "keys"
        keys.write_text("key")
        given = {**service["environment"], f"{ENV_PREFIX}API_KEY_FILE": keys}
        variables = {name: str(value) for name, value in given.items()}
        gibibytes = float(service["mem_limit"].removesuffix("g"))
        check_limits(settings_of([], variables), float(service["cpus"]), gibibytes * (1 << 30))


def test_nothing_is_published_but_the_balancer_and_grafana_on_loopback(compose: dict[str, Any]) -> None:
    ports = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert ports == {"nginx": ["127.0.0.1:8080:8080"], "grafana": ["127.0.0.1:3000:3000"]}


def test_no_service_may_more_than_it_needs(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_addresses_that_nginx_resolves_are_the_replicas(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services["nginx"]["extra_hosts"]) == {
        f"{name}:{services[name]['networks']['inner']['ipv4_address']}" for name in REPLICAS
    }
    nginx = services["nginx"]["networks"]["inner"]["ipv4_address"]
    assert options_of(services["server-1"])["forwarded_allow_ips"] == nginx


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
@pytest.mark.parametrize("overrides", [[], ["compose.cuda.yaml"]], ids=["cpu", "cuda"])
def test_docker_compose_takes_the_files(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFANA_PASSWORD", "for a test")
    files = [flag for name in ("compose.yaml", *overrides) for flag in ("-f", str(DOCKER / name))]
    result = subprocess.run(
        ["docker-compose", *files, "config", "-q"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
