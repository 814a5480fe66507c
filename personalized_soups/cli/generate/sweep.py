"""`psoups sweep`: dose and response between two experts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import MAX_SEED, catalogue_of, resolve_base
from personalized_soups.cli.generate.generate import check_dtype, check_temperature
from personalized_soups.cli.generate.generate_many import check_no_input, telling_what_is_kept
from personalized_soups.errors import DeclarationError, UsageError, check_extra, choose_from

if TYPE_CHECKING:
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.files.lines import GrowingLines
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.studies.sweep import Sweep

# Fewer are told of: intervals are as wide as the curve.
_FEW_PROMPTS = 16


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="sweep")(sweep)


def sweep(
    side_a: Annotated[str, typer.Argument(help="The expert that weighs all at the first step.")],
    side_b: Annotated[str, typer.Argument(help="The expert that weighs all at the last step.")],
    *,
    base: Annotated[str, typer.Option(help="Base model: a folder, a hub id, or tiny: the embedded one.")],
    experts: Annotated[list[Path], typer.Option(help="Folder of experts; may be repeated.")],
    prompts: Annotated[Path, typer.Option(help='Prompts: one a line, or .jsonl with a "prompt" in each line.')],
    out: Annotated[Path, typer.Option(help="Folder for answers.jsonl, sweep.json and sweep.png.")],
    steps: Annotated[int, typer.Option(min=2, help="Steps from one to the other, both ends among them.")] = 11,
    scale: Annotated[float, typer.Option(help="What the two weights sum to.")] = 1.0,
    dimensions: Annotated[
        Path | None, typer.Option(help="Your own preference catalogue; the shipped one if left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer is cut there.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling; 0 takes the likeliest token.")] = 0.7,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once: the steps of one or several prompts.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's own.")] = "auto",
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Take different base names or fingerprints for one base.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where --out holds a sweep.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer prompts while the weight goes from one expert to another, score the answers, and draw the curve.

    Answers are scored by what the catalogue says of the second side; of a side that it does not know words are counted.
    Run it again to go on with what was interrupted.
    """
    check_temperature(temperature)
    check_extra("plot", "matplotlib")
    held = check_dtype(dtype)
    _check_sweep(side_a, side_b, scale)
    check_no_input(out / "answers.jsonl", [prompts])
    from personalized_soups.adapters.fingerprint import base_fingerprint
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.files.digest import digest_file
    from personalized_soups.files.lines import growing_lines, is_whole
    from personalized_soups.generation.prompts import read_asked_prompts
    from personalized_soups.studies.sweep import ANSWERS, PICTURE, RESULTS, Sweep, draw_sweep, score_sweep

    library = ExpertLibrary.open(*experts)
    for name in (side_a, side_b):
        if name not in library:
            raise UsageError(f"no expert is called {name!r}", where=library.where, mend=choose_from(name, library))
    chosen = ExpertLibrary({name: library[name].folder for name in (side_a, side_b)}, where=library.where)
    swept = Sweep(side_a, side_b, steps, scale)
    lines = read_asked_prompts(prompts)
    asked = [line.prompt for line in lines]
    side = library[side_b].side or side_b
    catalogue = _catalogue_that_scores(side, base, dimensions)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings = {
        "base": base_fingerprint(resolve_base(base)),
        "experts": {name: [digest_file(path) for path in each.adapter.files] for name, each in chosen.items()},
        "prompts": digest_file(prompts),
        "steps": steps,
        "scale": scale,
        "dtype": dtype,
        **sampling,
    }

    def finish() -> dict[str, Any]:
        found = score_sweep(out / ANSWERS, swept, catalogue, side) | {"settings": settings}
        (out / RESULTS).write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draw_sweep(found, out / PICTURE)
        return found

    if not overwrite and _has_settings(out / RESULTS, settings) and is_whole(out / ANSWERS, len(asked)):
        results = finish()  # scored and drawn again, by another catalogue perhaps
    else:
        # within: a run that is killed while it scores comes back to it
        with growing_lines(out / ANSWERS, settings, overwrite=overwrite) as kept:
            from personalized_soups.mixing.model import SoupModel

            model = SoupModel.from_pretrained(
                resolve_base(base), chosen, device=device, dtype=held, same_base=same_base
            )
            model.generator.check(lines)
            for old in (RESULTS, PICTURE):  # of other answers than those that come now
                (out / old).unlink(missing_ok=True)
            _answer(model, swept, asked, kept, batch_size=batch_size, quiet=as_json, sampling=sampling)
            results = finish()
    if as_json:
        render.show_json(results)
    else:
        _show(results, len(asked), out / PICTURE)


def _check_sweep(side_a: str, side_b: str, scale: float) -> None:
    if side_a == side_b:
        raise UsageError("both sides are one", where="SIDE_A SIDE_B", mend="name two experts")
    if not 0 < scale < math.inf:
        raise UsageError(f"the scale is {scale:g}", where="--scale", mend="give a number above 0, such as 1")


def _catalogue_that_scores(side: str, base: str, dimensions: Path | None) -> Catalogue | None:
    """Return the catalogue; None where it is the shipped one and does not know the side."""
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load

    catalogue = load(catalogue_of(base, dimensions), Catalogue)
    try:
        catalogue.scorer_of(side)
    except DeclarationError:
        if dimensions is not None:
            raise
        return None
    return catalogue


def _answer(
    model: SoupModel,
    swept: Sweep,
    asked: Sequence[str],
    kept: GrowingLines,
    *,
    batch_size: int,
    quiet: bool,
    sampling: Mapping[str, Any],
) -> None:
    from personalized_soups.studies.sweep import answer_sweep

    if kept.num_done:
        render.say(f"the answers to {kept.num_done} of {len(asked)} prompts are there: going on")
    with (
        render.progress("sweeping", len(asked), done=kept.num_done, quiet=quiet) as bar,
        telling_what_is_kept(kept.path),
    ):
        answer_sweep(model, swept, asked, kept, batch_size=batch_size, on_done=bar.update, **sampling)


def _show(results: Mapping[str, Any], num_prompts: int, picture: Path) -> None:
    rows = [
        [share, score, low, high, valid]
        for (share, score), (low, high), valid in zip(
            results["points"], results["intervals"], results["valid"], strict=True
        )
    ]
    title = f"{results['score']}: {results['low']} to {results['high']}, the base alone {results['base']:.3g}"
    render.show_table(["w", results["score"], "95% from", "to", "valid"], rows, title=title)
    if min(results["valid"]) < 1:
        render.say("answers that are not valid (ill-formed or off topic, by the catalogue's scorer) score 0")
    if num_prompts < _FEW_PROMPTS:
        render.say(f"{num_prompts} prompts say little: take {_FEW_PROMPTS} or more")
    render.say(f"{results['verdict']}; {picture}")


def _has_settings(results: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether a sweep of these settings has left its results."""
    try:
        return bool(json.loads(results.read_text(encoding="utf-8"))["settings"] == settings)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
