"""Whether the server lives, whether it can answer, and what it counts."""

from __future__ import annotations

from fastapi import APIRouter, Response

from personalized_soups.errors import SoupError
from personalized_soups.serving.batching.batcher import Batcher
from personalized_soups.serving.metrics import CONTENT_TYPE, Metrics
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.users.store import ProfileStore


def router(batcher: Batcher, store: ProfileStore | None, metrics: Metrics) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["operation"])

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @routes.get("/ready")
    def ready() -> dict[str, str]:
        """Say whether answers can be made, and the store be read."""
        if not batcher.is_alive:
            raise ApiError(503, "no answers are made any more", code="not_ready")
        if store is not None:
            try:
                store.check_reachable()
            except SoupError as fault:
                raise api_error(fault) from fault
        return {"status": "ready"}

    @routes.get("/metrics")
    async def prometheus() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.page(batcher.load), media_type=CONTENT_TYPE)

    return routes
