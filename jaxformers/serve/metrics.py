"""What `/metrics` tells, in Prometheus' text format: under our own names, or vLLM's for its dashboards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxformers.infer.request import EngineStats
from jaxformers.serve.driver import Trace

Names = Literal["jaxformers", "vllm"]

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_FINISH_IN_VLLM = {"stop": "stop", "length": "length", "cancelled": "abort", "abort": "abort", "error": "error"}


class _Gauge(NamedTuple):
    ours: str
    vllm: str | None
    means: str
    read: Callable[[EngineStats], float]
    counts: bool = False


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


_OF_ENGINE = (
    _Gauge("requests_running", "num_requests_running", "Requests being decoded.", lambda s: s.running),
    _Gauge("requests_waiting", "num_requests_waiting", "Requests in the queue.", lambda s: s.waiting),
    _Gauge("tokens_waiting", None, "Prompt tokens in the queue.", lambda s: s.waiting_tokens),
    _Gauge(
        "cache_usage",
        "kv_cache_usage_perc",
        "Share of the cache's pages in use, 0 to 1.",
        lambda s: _share(s.pages_used, s.pages_total),
    ),
    _Gauge(
        "cache_kept",
        None,
        "Share of the cache's pages kept for prompts to come, 0 to 1.",
        lambda s: _share(s.pages_cached, s.pages_total),
    ),
    _Gauge("prompt_tokens", "prompt_tokens", "Prompt tokens read.", lambda s: s.prompt_tokens, True),
    _Gauge("new_tokens", "generation_tokens", "Tokens generated.", lambda s: s.new_tokens, True),
    _Gauge("prefix_queries", "prefix_cache_queries", "Prompt tokens looked for.", lambda s: s.prompt_tokens, True),
    _Gauge("prefix_hits", "prefix_cache_hits", "Prompt tokens found.", lambda s: s.cached_prompt_tokens, True),
    _Gauge("compilations", None, "Programs compiled after warming up.", lambda s: s.compilations_after_ready, True),
    # What runs is never put back into the queue; dashboards look for the number all the same.
    _Gauge("preemptions", "num_preemptions", "Requests put back into the queue.", lambda s: 0, True),
    _Gauge("drafted_tokens", "spec_decode_num_draft_tokens", "Tokens guessed ahead.", lambda s: s.drafted_tokens, True),
    _Gauge(
        "accepted_tokens", "spec_decode_num_accepted_tokens", "Guesses that held.", lambda s: s.accepted_tokens, True
    ),
)


class Metrics:
    """Counts and times of a server's requests. `stats` is asked each time the metrics are read."""

    def __init__(self, stats: Callable[[], EngineStats], *, model: str, names: Names = "jaxformers"):
        self._stats, self._model, self._vllm = stats, model, names == "vllm"
        self._registry = CollectorRegistry()
        self._first = self._times("time_to_first_token", "time_to_first_token", "From arrival to the first token.")
        self._between = self._times("inter_token", "inter_token_latency", "Between two tokens of a request.")
        self._whole = self._times("request", "e2e_request_latency", "From arrival to the last token.")
        self._ended = Counter(
            self._named("requests_finished", "request_success"),
            "Requests that are over, by why.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = Counter(
            self._named("requests_refused", "requests_refused"),
            "Requests that found the queue full.",
            ["model_name"],
            registry=self._registry,
        ).labels(model)
        self._registry.register(self)

    def _named(self, ours: str, vllm: str) -> str:
        return f"vllm:{vllm}" if self._vllm else f"jaxformers_{ours}"

    def _times(self, ours: str, vllm: str, means: str) -> Histogram:
        name = f"{self._named(ours, vllm)}_seconds"
        return Histogram(name, means, ["model_name"], buckets=_SECONDS, registry=self._registry).labels(self._model)

    def collect(self) -> Iterator[Metric]:
        """What the engine says of itself, for the registry."""
        stats = self._stats()
        for gauge in _OF_ENGINE:
            if self._vllm and gauge.vllm is None:
                continue
            family = CounterMetricFamily if gauge.counts else GaugeMetricFamily
            metric = family(self._named(gauge.ours, gauge.vllm or ""), gauge.means, labels=["model_name"])
            metric.add_metric([self._model], gauge.read(stats))
            yield metric

    def describe(self) -> list[Metric]:
        """Nothing, so that registering asks the engine nothing."""
        return []

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def progressed(self, trace: Trace, new_tokens: int, at: float) -> None:
        """Tokens came. Those of one step came together, so their share of its time is told for each."""
        if trace.last is None:
            self._first.observe(at - trace.submitted)
            return
        for _ in range(new_tokens):
            self._between.observe((at - trace.last) / new_tokens)

    def ended(self, trace: Trace, reason: str, at: float) -> None:
        self._whole.observe(at - trace.submitted)
        self._ended.labels(self._model, _FINISH_IN_VLLM[reason] if self._vllm else reason).inc()

    def refused(self) -> None:
        self._refused.inc()
