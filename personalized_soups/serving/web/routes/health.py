"""/health, /ready and /metrics."""

from __future__ import annotations

import time

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Response

from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.protocol.faults import ApiError
from personalized_soups.serving.protocol.metrics import CONTENT_TYPE, Metrics
from personalized_soups.users.profiles.store import ProfileStore

# Seconds for which a successful check of the store is not repeated.
_CHECK_SECONDS = 0.5


def router(batcher: Batcher, store: ProfileStore | None, metrics: Metrics) -> APIRouter:
    """Return the routes of this module."""
    routes = APIRouter(tags=["operation"])
    alone = CapacityLimiter(1)
    checked_at = [-_CHECK_SECONDS]

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Report that the server process responds."""
        return {"status": "ok"}

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready")
    async def ready() -> dict[str, str]:
        """Report whether the server can generate answers and read the profile store."""
        if not batcher.is_alive:
            raise ApiError(503, "the server no longer generates answers", code="not_ready")
        if store is not None and time.monotonic() - checked_at[0] >= _CHECK_SECONDS:
            await to_thread.run_sync(store.check_reachable, limiter=alone)
            checked_at[0] = time.monotonic()
        return {"status": "ready"}

    @routes.get("/metrics")
    async def prometheus() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.page(batcher.load), media_type=CONTENT_TYPE)

    return routes
