"""The manifests in docker/kubernetes: against Kubernetes' schemas, the server's options, and each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deployed_replica import Settings, check_limits, settings_of

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "docker" / "kubernetes"
KUBERNETES_VERSIONS = ("1.27", "1.37")
"""The oldest version that knows all fields, and the latest that the validator knows."""

SUFFIXES = {"Mi": 1 << 20, "Gi": 1 << 30}

Manifest = dict[str, Any]


def read(name: str) -> Manifest:
    manifest: Manifest = yaml.safe_load((MANIFESTS / name).read_text())
    return manifest


FOREIGN = {"kustomization.yaml", "pod-monitor.example.yaml", "prometheus-adapter.example.yaml"}
"""Files of other programs, whose schemas are not Kubernetes' own."""

MANIFEST_NAMES = [path.name for path in sorted(MANIFESTS.glob("*.yaml")) if path.name not in FOREIGN]


@pytest.fixture(scope="module")
def deployment() -> Manifest:
    return read("deployment.yaml")


@pytest.fixture(scope="module")
def pod(deployment: Manifest) -> Manifest:
    spec: Manifest = deployment["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: Manifest) -> Manifest:
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container


@pytest.fixture(scope="module")
def settings(container: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The options that the pod's server has: its arguments and variables, as the command line reads them."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(read("secret.example.yaml")["stringData"]["keys"])
    word, model, *flags = container["args"]
    assert (word, model.startswith("-")) == ("serve", False)
    given = [flag.replace("/etc/logitserve/keys", str(keys)) for flag in flags]
    return settings_of(given, {variable["name"]: variable["value"] for variable in container.get("env", [])})


def number_of(quantity: str) -> float:
    suffix = quantity[-2:]
    return float(quantity.removesuffix(suffix)) * SUFFIXES[suffix] if suffix in SUFFIXES else float(quantity)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", MANIFEST_NAMES)
def test_a_manifest_has_only_fields_that_kubernetes_knows(name: str, version: str) -> None:
    kubernetes_validate.validate(read(name), version, strict=True)


def test_everything_but_the_examples_is_applied() -> None:
    applied = {name for name in MANIFEST_NAMES if not name.endswith(".example.yaml")}
    assert set(read("kustomization.yaml")["resources"]) == applied


def test_the_server_listens_where_probes_and_the_service_reach_it(
    settings: Settings,
) -> None:
    assert settings[0].host == "0.0.0.0"  # noqa: S104 - the pod's own address is not known before


def test_a_pod_has_more_time_to_end_than_its_server_needs(pod: Manifest, settings: Settings) -> None:
    server, _ = settings
    assert server.drain_delay >= 5
    assert pod["terminationGracePeriodSeconds"] >= server.drain_delay + server.drain_timeout + 10


def test_no_replica_is_taken_away_before_another_is_ready(deployment: Manifest) -> None:
    strategy = deployment["spec"]["strategy"]
    assert strategy["type"] == "RollingUpdate"
    assert (strategy["rollingUpdate"]["maxUnavailable"], strategy["rollingUpdate"]["maxSurge"]) == (0, 1)
    assert read("autoscaler.yaml")["spec"]["minReplicas"] >= 2
    assert "replicas" not in deployment["spec"], "an apply would undo what the autoscaler did"


def test_probes_use_the_open_paths_and_are_patient(container: Manifest) -> None:
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    patience = {kind: probe["periodSeconds"] * probe["failureThreshold"] for kind, probe in probes.items()}
    assert patience["startup"] >= 300
    assert patience["liveness"] >= 60
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}


def test_ports_and_labels_agree(deployment: Manifest, container: Manifest, settings: Settings) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings[0].port}
    (service_port,) = read("service.yaml")["spec"]["ports"]
    assert service_port["targetPort"] == "http"
    (rule,) = read("network-policy.yaml")["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == ["http"]
    assert read("pod-monitor.example.yaml")["spec"]["podMetricsEndpoints"][0]["port"] == "http"

    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
        read("service.yaml")["spec"]["selector"],
        read("disruption-budget.yaml")["spec"]["selector"]["matchLabels"],
        read("network-policy.yaml")["spec"]["podSelector"]["matchLabels"],
        read("pod-monitor.example.yaml")["spec"]["selector"]["matchLabels"],
    ]
    assert selectors == [labels] * len(selectors)
    target = read("autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])


def test_the_autoscalers_metric_is_the_one_that_the_adapter_makes(
    settings: Settings,
) -> None:
    (metric,) = read("autoscaler.yaml")["spec"]["metrics"]
    (rule,) = read("prometheus-adapter.example.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"] == "vllm_num_requests_running"
    assert '__name__="vllm:num_requests_running"' in rule["seriesQuery"]
    target = int(metric["pods"]["target"]["averageValue"])
    assert target <= settings[1].max_num_seqs / 2, "the metric ends at --max-num-seqs"


def test_the_server_writes_to_its_volumes_alone_and_may_do_nothing_else(
    pod: Manifest, container: Manifest
) -> None:
    assert pod["enableServiceLinks"] is False, "LOGITSERVE_PORT would become tcp://..."
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    writable = {
        mount["mountPath"]: volumes[mount["name"]]["emptyDir"]["sizeLimit"]
        for mount in container["volumeMounts"]
        if not mount.get("readOnly")
    }
    assert writable.keys() == {"/cache", "/tmp"}  # noqa: S108 - a volume of the pod's own


def test_keys_come_from_a_secret_and_none_is_in_the_repository(pod: Manifest, container: Manifest) -> None:
    (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
    (item,) = volume["secret"]["items"]
    assert f"--api-key-file={mount['mountPath']}/{item['path']}" in container["args"]
    example = read("secret.example.yaml")
    assert (example["metadata"]["name"], item["key"]) == (volume["secret"]["secretName"], "keys")
    keys = [line for line in example["stringData"]["keys"].splitlines() if not line.startswith("#")]
    assert all(key.startswith("REPLACE-THIS-") for key in keys)
    credentials = read("pod-monitor.example.yaml")["spec"]["podMetricsEndpoints"][0]["authorization"][
        "credentials"
    ]
    assert credentials["name"] == example["metadata"]["name"]
    assert example["stringData"][credentials["key"]] in keys


def test_what_the_server_may_use_fits_the_limits_of_the_pod(container: Manifest, settings: Settings) -> None:
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits, "no other quality of service keeps the CPUs"
    check_limits(settings, number_of(limits["cpu"]), number_of(limits["memory"]))


def test_only_the_ingress_and_prometheus_reach_the_server_and_it_reaches_nobody() -> None:
    spec = read("network-policy.yaml")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == []
    (rule,) = spec["ingress"]
    assert all(peer.keys() == {"namespaceSelector"} and peer["namespaceSelector"] for peer in rule["from"])
