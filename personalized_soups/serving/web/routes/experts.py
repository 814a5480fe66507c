"""/v1/experts: list and reload experts. /v1/scores: score answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from pydantic import Field

from personalized_soups.adapters.library import Expert
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import SoupError
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.scales import Scales
from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.engine.queue import ClosedError
from personalized_soups.serving.protocol.expert_files import ExpertFiles
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.protocol.key_user import key_user
from personalized_soups.serving.protocol.requests import RequestBody
from personalized_soups.serving.protocol.strict_json import StrictRoute
from personalized_soups.serving.protocol.user_questions import UserQuestions

# The weight of each expert in the playground's presets. The quickstart uses the same weight.
_PRESET_WEIGHT = 0.6

# Maximum number of characters of all answers in one request for scores.
_MAX_CHARACTERS = 65_536

_log = logging.getLogger(__name__)


class ScoresRequest(RequestBody):
    """The body of POST /v1/scores."""

    prompt: str
    answers: Annotated[list[str], Field(min_length=1, max_length=64)]


def router(
    base: str,
    *,
    model: SoupModel,
    batcher: Batcher,
    files: ExpertFiles,
    catalogue: Catalogue | None,
    scales: Scales,
    has_store: bool,
    questions: UserQuestions | None = None,
    started_with: Sequence[str],
) -> APIRouter:
    """Return the routes of this module."""
    routes = APIRouter(route_class=StrictRoute, tags=["soups"])
    reloading = _Reloading(model, batcher, files, questions)
    scoring = CapacityLimiter(1)  # scoring is pure Python and competes with the batcher's thread

    def listing() -> dict[str, Any]:
        experts = [_expert(expert, files, catalogue) for expert in list(model.experts.values())]
        return {
            "object": "list",
            "base": base,
            "has_store": has_store,
            "has_questions": questions is not None,
            "started_with": list(started_with),
            "preset_weight": _PRESET_WEIGHT,
            "data": experts,
            "dimensions": _dimensions(experts, catalogue, scales),
        }

    @routes.get("/v1/experts")
    def list_experts(request: Request) -> dict[str, Any]:
        """List the experts and their dimensions, and the user to whom the API key is bound."""
        return {**listing(), "user": key_user(request.scope)}

    @routes.post("/v1/experts/reload")
    async def reload_experts() -> dict[str, Any]:
        """Reload new and changed experts after the running answers have finished, and list all experts."""
        await reloading.done()
        return listing()

    @routes.post("/v1/scores")
    async def scores(body: ScoresRequest) -> dict[str, Any]:
        """Score answers in each dimension that has a scorer."""
        if not scales.dimensions:
            raise ApiError(404, "the server's preference catalogue has no scorers", code="no_scorers")
        if sum(map(len, body.answers)) > _MAX_CHARACTERS:
            raise ApiError(400, f"the answers have more than {_MAX_CHARACTERS} characters in total", param="answers")

        def score() -> list[Any]:
            return [scales.scores(body.prompt, answer) for answer in body.answers]

        return {"object": "list", "data": await to_thread.run_sync(score, limiter=scoring)}

    return routes


class _Reloading:
    """Reloads the experts. All requests that arrive before a reload starts share this reload."""

    def __init__(self, model: SoupModel, batcher: Batcher, files: ExpertFiles, questions: UserQuestions | None) -> None:
        self._model = model
        self._batcher = batcher
        self._files = files
        self._questions = questions
        self._pending: Future[None] | None = None

    async def done(self) -> None:
        """Wait until the experts are reloaded.

        Raises:
            ApiError: 409 if an expert cannot be loaded; 503 if the server is about to shut down.
        """
        if self._pending is None or self._pending.running() or self._pending.done():
            self._pending = self._batcher.run_when_idle(self._reload)
        try:
            await asyncio.shield(asyncio.wrap_future(self._pending))
        except ClosedError as fault:
            raise api_error(fault) from fault
        except SoupError as fault:
            _log.error("the experts cannot be reloaded", exc_info=fault)
            expert = next((name for name in Path(fault.where).parts[::-1] if name in self._model.experts), None)
            prefix = "" if expert is None else f"{expert}: "
            message = f"{prefix}{fault.what}; the server keeps the experts loaded before; its log has the details"
            raise ApiError(409, message, code="experts_at_fault") from fault

    def _reload(self) -> None:
        library, stamps = self._files.look()
        self._model.experts.change(*self._files.difference(library, stamps))
        self._files.serve(stamps)
        if self._questions is not None:
            self._questions.use_experts(self._model.experts)


def _expert(expert: Expert, files: ExpertFiles, catalogue: Catalogue | None) -> dict[str, Any]:
    side = expert.side or expert.name
    declared = None if catalogue is None else catalogue.sides.get(side)
    dimension = expert.dimension
    if dimension is None and catalogue is not None:
        dimension = catalogue.dimension_of(side)
    return {
        "name": expert.name,
        "object": "expert",
        "dimension": dimension,
        "side": side if dimension is not None else None,
        "about": None if declared is None else declared.instruction,
        "rank": expert.adapter.config.rank,
        "is_changed": files.is_changed(expert.name),
    }


def _dimensions(experts: Sequence[dict[str, Any]], catalogue: Catalogue | None, scales: Scales) -> list[dict[str, Any]]:
    """Return the dimensions in the catalogue's order. Experts are sorted from the low to the high end."""
    declared = {} if catalogue is None else catalogue.dimensions
    names = sorted(
        {each["dimension"] for each in experts} - {None},
        key=lambda name: (list(declared).index(name) if name in declared else len(declared), name),
    )
    dimensions = []
    for name in names:
        declared_sides = declared[name].sides if name in declared else {}
        sides = sorted(
            declared_sides, key=lambda side: declared_sides[side].end == "high"
        )  # the sort is stable, so sides of the same end keep the catalogue's order
        own = sorted(
            (each for each in experts if each["dimension"] == name),
            key=lambda each: (sides.index(each["side"]) if each["side"] in sides else len(sides), each["name"]),
        )
        dimensions.append(
            {
                "name": name,
                "about": declared[name].about if name in declared else None,
                "sides": list(dict.fromkeys(each["side"] for each in own)),
                "experts": [each["name"] for each in own],
                "first": next((side for side in declared_sides if any(each["side"] == side for each in own)), None),
                "is_scored": name in scales.dimensions,
            }
        )
    return dimensions
