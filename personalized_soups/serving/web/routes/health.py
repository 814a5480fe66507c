"""Whether the server lives, whether it can answer, and what it counts."""

from __future__ import annotations

import time

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Response

from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.protocol.faults import ApiError
from personalized_soups.serving.protocol.metrics import CONTENT_TYPE, Metrics
from personalized_soups.users.profiles.store import ProfileStore

# So long a store that was there is taken to be there.
_LOOK_SECONDS = 0.5


def router(batcher: Batcher, store: ProfileStore | None, metrics: Metrics) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["operation"])
    alone = CapacityLimiter(1)
    looked_at = [-_LOOK_SECONDS]

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready")
    async def ready() -> dict[str, str]:
        """Say whether answers can be made, and the store be read."""
        if not batcher.is_alive:
            raise ApiError(503, "no answers are made any more", code="not_ready")
        if store is not None and time.monotonic() - looked_at[0] >= _LOOK_SECONDS:
            await to_thread.run_sync(store.check_reachable, limiter=alone)
            looked_at[0] = time.monotonic()
        return {"status": "ready"}

    @routes.get("/metrics")
    async def prometheus() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.page(batcher.load), media_type=CONTENT_TYPE)

    return routes
