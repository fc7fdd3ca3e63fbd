"""`GET /metrics`: Prometheus' text format (version 0.0.4). From this machine itself, or with the token that an
administrator has set; to all others it is not there."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from starlette.requests import Request
from starlette.responses import Response

from appliance.api.services import Services
from appliance.errors import NotFound

SHORTEST_TOKEN = 16
PROXIES = {"forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip"}
KIND = "text/plain; version=0.0.4; charset=utf-8"

# name of the engine's or the server's count → (metric, kind, help)
ENGINE = {
    "running": ("appliance_engine_running", "gauge", "Sequences that generate now."),
    "waiting": ("appliance_engine_waiting", "gauge", "Sequences that wait for a slot."),
    "slots": ("appliance_engine_slots", "gauge", "Sequences that may generate at the same time."),
    "kv_used": ("appliance_engine_kv_cells_used", "gauge", "KV cells in use."),
    "kv_cells": ("appliance_engine_kv_cells", "gauge", "KV cells in all."),
    "retained": ("appliance_engine_retained_prefixes", "gauge", "Prefixes in the cache that nobody uses now."),
    "parked": ("appliance_engine_parked_prefixes", "gauge", "Prefixes in main memory."),
    "prompt_tokens": ("appliance_engine_prompt_tokens_total", "counter", "Prompt tokens computed."),
    "cached_tokens": ("appliance_engine_cached_tokens_total", "counter", "Prompt tokens found computed."),
    "generated_tokens": ("appliance_engine_generated_tokens_total", "counter", "Tokens generated."),
    "finished": ("appliance_engine_finished_total", "counter", "Requests finished."),
    "cancelled": ("appliance_engine_cancelled_total", "counter", "Requests cancelled."),
    "failed": ("appliance_engine_failed_total", "counter", "Requests failed."),
    "preempted": ("appliance_engine_preempted_total", "counter", "Sequences preempted."),
    "steps": ("appliance_engine_steps_total", "counter", "Decode calls."),
    "decode_ms_p50": ("appliance_engine_decode_ms_p50", "gauge", "Median of the latest decode calls, milliseconds."),
    "decode_ms_p95": ("appliance_engine_decode_ms_p95", "gauge", "95th percentile of the latest decode calls."),
    "host_ms_p50": ("appliance_engine_host_ms_p50", "gauge", "Median time between two decode calls, milliseconds."),
    "host_ms_p95": ("appliance_engine_host_ms_p95", "gauge", "95th percentile of the time between decode calls."),
}


async def metrics(request: Request, services: Services) -> Response:
    """Every count at once."""
    if not (request.state.monitors or _is_here(request)):
        raise NotFound("There is no such endpoint.")
    return Response("".join(_lines(services)), media_type=KIND)


def _is_here(request: Request) -> bool:
    """Whether the peer is this machine; not a proxy on it that names itself, behind which anybody may stand."""
    if PROXIES.intersection(request.headers):
        return False
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _lines(services: Services) -> Iterator[str]:
    status = services.local.status()
    for count, (name, kind, help) in ENGINE.items():
        if count in status:
            yield from _family(name, kind, help, [({}, float(status[count]))])
    for name, kind, help, value in _server(services):
        yield from _family(name, kind, help, [({}, float(value))])
    others = [({"provider": name}, float(up)) for name, up in sorted(services.chat.available().items())]
    yield from _family("appliance_provider_available", "gauge", "Whether a server elsewhere may be asked.", others)
    for name, help, labels, counts in (
        ("appliance_calls_total", "Calls by route and status.", ("endpoint", "status"), services.calls.counts),
        ("appliance_refusals_total", "Calls over a limit.", ("reason",), services.admission.refusals),
        ("appliance_completions_total", "Completions begun.", ("provider",), services.chat.started),
    ):
        rows = [(key if isinstance(key, tuple) else (key,), n) for key, n in sorted(counts.items())]
        samples = [(dict(zip(labels, map(str, key), strict=True)), float(n)) for key, n in rows]
        yield from _family(name, "counter", help, samples)


def _server(services: Services) -> Iterator[tuple[str, str, str, float]]:
    """(name, kind, help, value) of what is counted outside the engine."""
    admission, store = services.admission, services.store
    yield "appliance_leases", "gauge", "Calls that hold a lease.", admission.leases.running
    yield "appliance_turns_waiting", "gauge", "Calls that wait their turn.", len(admission.leases)
    yield "appliance_payers", "gauge", "Accounts, keys and addresses counted.", len(admission.windows)
    yield "appliance_charges_owed", "gauge", "Charges that the store has not taken yet.", services.ledger.owed
    yield "appliance_log_rows_lost_total", "counter", "Calls that are missing in the log.", services.calls.lost
    yield "appliance_store_commits_total", "counter", "Transactions committed.", store.commits
    yield "appliance_store_commit_seconds_total", "counter", "Time in transactions.", store.commit_seconds
    yield "appliance_store_wal_bytes", "gauge", "Size of the write-ahead log.", store.wal_bytes


def _family(name: str, kind: str, help: str, samples: list[tuple[dict[str, str], float]]) -> Iterator[str]:
    yield f"# HELP {name} {help}\n# TYPE {name} {kind}\n"
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"{name}{{{shown}}} {value!r}\n" if shown else f"{name} {value!r}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
