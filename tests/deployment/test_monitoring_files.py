"""The dashboard, the alert rules and their configuration, as files that must agree with each other."""

from __future__ import annotations

import re

from monitoring import ALERTS, DOCKER, METRIC, SCRAPE_CONFIG, dashboard, dashboard_queries

PROVISIONING = DOCKER / "grafana" / "provisioning"
DATASOURCE = (PROVISIONING / "datasources" / "prometheus.yml").read_text()
PROVIDER = (PROVISIONING / "dashboards" / "logitserve.yml").read_text()
COMPOSE = DOCKER / "compose.yaml"
KUBERNETES = DOCKER / "kubernetes"
DOCS = DOCKER.parent / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
DEPLOYMENT = (DOCS / "deployment.md").read_text()

COLUMNS = 24
SCREEN = 24
"""Rows of Grafana's grid that a usual screen shows."""


def value_of(name: str, text: str) -> str:
    """Return the value of the only line of YAML that sets ``name``."""
    (value,) = re.findall(rf"^[ -]*{name}: *(\S+)", text, re.MULTILINE)
    return str(value)


def test_every_panel_has_an_id_a_place_and_a_unit_of_its_own() -> None:
    panels = dashboard()["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= COLUMNS, panel["title"]
        assert grid["y"] + grid["h"] <= SCREEN, f"{panel['title']} is below the screen"
        cells = {
            (column, row)
            for column in range(grid["x"], grid["x"] + grid["w"])
            for row in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        if panel["type"] == "timeseries":
            assert "unit" in panel["fieldConfig"]["defaults"], panel["title"]


def test_every_query_of_the_dashboard_obeys_its_variables() -> None:
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert variables == {"datasource", "model_name", "instance"}
    for name, query in dashboard_queries().items():
        selectors = re.findall(r":\w+(\{.*?\})", query)
        assert selectors, name
        assert all('{model_name=~"$model_name", instance=~"$instance"' in selector for selector in selectors)
        assert len(selectors) == len(re.findall(r"\b(?:vllm|logitserve):", query)), name


def test_the_page_explains_every_metric_and_names_every_alert() -> None:
    explained = set(METRIC.findall(DEPLOYMENT))
    used = set(METRIC.findall(" ".join([*dashboard_queries().values(), ALERTS.read_text()])))
    assert {name.removesuffix("_bucket") for name in used} <= explained
    assert re.findall(r"- alert: (\w+)", ALERTS.read_text()) == re.findall(
        r"^\| (Logit\w+) ", DEPLOYMENT, re.MULTILINE
    )


def test_the_dashboard_finds_the_provisioned_datasource() -> None:
    document = dashboard()
    (source,) = [item for item in document["templating"]["list"] if item["type"] == "datasource"]
    assert source["current"]["value"] == value_of("uid", DATASOURCE)
    users = [*document["panels"], *(item for item in document["templating"]["list"] if item is not source)]
    assert all(user["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for user in users)


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    interval = value_of("scrape_interval", SCRAPE_CONFIG.read_text())
    assert value_of("timeInterval", DATASOURCE) == interval


def test_the_alerts_name_the_job_that_is_scraped() -> None:
    job = value_of("job_name", SCRAPE_CONFIG.read_text())
    assert set(re.findall(r'job="(\w+)"', ALERTS.read_text())) == {job}
    # The operator would call the job after the PodMonitor and its namespace, without a label to take it from.
    label = value_of("jobLabel", (KUBERNETES / "pod-monitor.example.yaml").read_text())
    labels = re.findall(
        rf"^ +{re.escape(label)}: (\S+)", (KUBERNETES / "deployment.yaml").read_text(), re.MULTILINE
    )
    assert set(labels) == {job}


def test_every_alert_points_to_a_heading_that_exists() -> None:
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", OPERATIONS, re.MULTILINE)
    }
    rules = ALERTS.read_text().count("- alert: ")
    links = re.findall(r"runbook: docs/operations\.md#(\S+)", ALERTS.read_text())
    assert len(links) == rules
    assert set(links) <= headings


def test_compose_mounts_what_the_configuration_names() -> None:
    compose = COMPOSE.read_text()
    mounts = dict(re.findall(r"(\./[\w./-]+):(/[\w./-]+)", compose))
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    provided = value_of("path", PROVIDER)
    assert mounts["./grafana/dashboard.json"].startswith(f"{provided}/")
    assert mounts["./prometheus"] == "/etc/prometheus"
    for target in re.findall(r'"(server-\d):8000"', SCRAPE_CONFIG.read_text()):
        assert re.search(rf"^  {target}:$", compose, re.MULTILINE), target
    assert re.search(r"^  prometheus:$", compose, re.MULTILINE), value_of("url", DATASOURCE)
    secret = value_of("credentials_file", SCRAPE_CONFIG.read_text())
    prometheus = compose.split("\n  prometheus:\n")[1].split("\n\n")[0]
    assert f"secrets: [{secret.removeprefix('/run/secrets/')}]" in prometheus
