"""Metrics that are read when somebody asks: the engine's statistics, and what the server holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from logitengine.link.messages import STEP_SECONDS
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from logitserve.telemetry.histogram import histogram

if TYPE_CHECKING:
    from logitserve.state import ServerState


class Readings(Collector):
    """Gauges of the server, and the engine's gauges and counters as it sent them last."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        yield from self._engine_gauges()
        yield from self._engine_counters()
        yield from self._server_gauges()

    def _engine_gauges(self) -> Iterable[Metric]:
        stats, info = self._state.engine.stats, self._state.engine.info
        num_blocks = 0 if info is None else info.num_blocks
        share = stats.num_used_blocks / num_blocks if num_blocks else 0.0
        gauge = GaugeMetricFamily
        yield gauge("vllm:num_requests_running", "Sequences in the engine's steps.", stats.num_running)
        yield gauge(
            "vllm:num_requests_waiting", "Sequences that wait for a place in them.", stats.num_waiting
        )
        yield gauge("logitserve:num_requests_parked", "Sequences whose readers lag behind.", stats.num_parked)
        yield gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", share)
        yield gauge("logitserve:kv_blocks_used", "KV blocks in use.", stats.num_used_blocks)
        yield gauge("logitserve:kv_blocks", "KV blocks of the engine.", num_blocks)

    def _engine_counters(self) -> Iterable[Metric]:
        engine = self._state.engine
        stats, counter = engine.stats, CounterMetricFamily
        yield counter("vllm:generation_tokens", "Tokens drawn.", stats.num_generated_tokens)
        yield counter(
            "vllm:num_preemptions", "Sequences that gave up their KV blocks.", stats.num_preemptions
        )
        yield counter(
            "vllm:prefix_cache_queries",
            "Tokens of prompts that were looked up in the prefix cache.",
            stats.num_prefix_query_tokens,
        )
        yield counter(
            "vllm:prefix_cache_hits", "Tokens that the prefix cache had.", stats.num_prefix_hit_tokens
        )
        yield counter("logitserve:engine_steps", "Steps that the engine computed.", stats.num_steps)
        yield counter(
            "logitserve:engine_restarts", "Engines started in place of one that ended.", engine.num_restarts
        )
        yield histogram(
            "logitserve:engine_step_seconds",
            "Duration of the engine's steps.",
            STEP_SECONDS,
            stats.step_counts,
            stats.step_seconds,
        )

    def _server_gauges(self) -> Iterable[Metric]:
        state = self._state
        gauge = GaugeMetricFamily
        yield gauge(
            "logitserve:requests_in_flight",
            "Requests under way, without probes and scrapes.",
            state.num_in_flight,
        )
        yield gauge("logitserve:queued_requests", "Requests that wait to be begun.", state.queue.num_requests)
        yield gauge("logitserve:queued_tokens", "Tokens of their prompts.", state.queue.num_tokens)
        held = gauge("logitserve:held_bytes", "Bytes of --max-held-bytes that are taken.", labels=["kind"])
        held.add_metric(["windows"], state.held_bytes.num_window_bytes)
        held.add_metric(["answers"], state.held_bytes.num_answer_bytes)
        yield held
        yield gauge(
            "logitserve:max_held_bytes",
            "--max-held-bytes: half for windows, half for answers.",
            state.config.max_held_bytes,
        )
        yield gauge(
            "logitserve:held_body_bytes", "Bytes of bodies that are being read.", state.held_bodies.nbytes
        )
        yield gauge("logitserve:open_connections", "Open connections.", state.num_connections())
        yield gauge("logitserve:ready", "1 where /ready is 200.", int(state.not_ready_reason() is None))
        yield gauge("logitserve:draining", "1 once the server is ending.", int(state.draining))
