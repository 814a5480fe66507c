"""/v1/experts: what can be mixed, and serving what is in the folders now; /v1/scores: how answers are seen."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import SoupError
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.batching.batcher import Batcher, ClosedError
from personalized_soups.serving.expert_files import ExpertFiles
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.protocol.requests import Asked
from personalized_soups.serving.protocol.strict_json import StrictRoute
from personalized_soups.serving.scales import Scales

# Of each expert in a preset: what the tiny base's quickstart chooses, and a good beginning elsewhere.
_PRESET_WEIGHT = 0.6


class ScoresRequest(Asked):
    """POST /v1/scores."""

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
) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(route_class=StrictRoute, tags=["soups"])

    def told() -> dict[str, Any]:
        experts = [_expert(name, model, files, catalogue) for name in model.experts]
        return {
            "object": "list",
            "base": base,
            "has_store": has_store,
            "preset_weight": _PRESET_WEIGHT,
            "data": experts,
            "dimensions": _dimensions(experts, catalogue, scales),
        }

    @routes.get("/v1/experts")
    def list_experts() -> dict[str, Any]:
        """List experts and dimensions."""
        return told()

    @routes.post("/v1/experts/reload")
    async def reload_experts() -> dict[str, Any]:
        """Serve what is in the experts' folders now, once the answers that are being made are done."""

        def reload() -> None:
            library, stamps = files.look()
            model.change_experts(*files.difference(library, stamps))
            files.serve(stamps)

        try:
            await asyncio.wrap_future(batcher.between(reload))
        except ClosedError as fault:
            raise api_error(fault) from fault
        except SoupError as fault:
            message = f"{fault.where}: {fault.what}; {fault.mend}; those that were loaded are served on"
            raise ApiError(409, message, code="experts_at_fault") from fault
        return told()

    @routes.post("/v1/scores")
    def scores(asked: ScoresRequest) -> dict[str, Any]:
        """Score answers in every dimension that has a scorer."""
        if not scales.dimensions:
            raise ApiError(404, "this server's catalogue has no scorers; start it with --dimensions", code="no_scorers")
        data = [scales.scores(asked.prompt, answer) for answer in asked.answers]
        return {"object": "list", "data": data}

    return routes


def _expert(name: str, model: SoupModel, files: ExpertFiles, catalogue: Catalogue | None) -> dict[str, Any]:
    expert = model.experts[name]
    side = expert.side or name
    declared = None if catalogue is None else catalogue.sides.get(side)
    dimension = expert.dimension
    if dimension is None and catalogue is not None:
        dimension = catalogue.dimension_of(side)
    return {
        "name": name,
        "object": "expert",
        "dimension": dimension,
        "side": side if dimension is not None else None,
        "about": None if declared is None else declared.instruction,
        "rank": expert.adapter.config.rank,
        "is_changed": files.is_changed(name),
    }


def _dimensions(experts: Sequence[dict[str, Any]], catalogue: Catalogue | None, scales: Scales) -> list[dict[str, Any]]:
    """Return the dimensions that experts have, in the catalogue's order, with their experts from low end to high."""
    declared = {} if catalogue is None else catalogue.dimensions
    names = sorted(
        {each["dimension"] for each in experts} - {None},
        key=lambda name: (list(declared).index(name) if name in declared else len(declared), name),
    )
    found = []
    for name in names:
        declared_sides = declared[name].sides if name in declared else {}
        sides = sorted(declared_sides, key=lambda side: declared_sides[side].end == "high")  # else as they stand
        own = sorted(
            (each for each in experts if each["dimension"] == name),
            key=lambda each: (sides.index(each["side"]) if each["side"] in sides else len(sides), each["name"]),
        )
        found.append(
            {
                "name": name,
                "about": declared[name].about if name in declared else None,
                "sides": list(dict.fromkeys(each["side"] for each in own)),
                "experts": [each["name"] for each in own],
                "is_scored": name in scales.dimensions,
            }
        )
    return found
