"""`psoups sweep`: dose and response between two experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import MAX_SEED, catalogue_of, resolve_base
from personalized_soups.cli.generate import check_dtype, check_temperature
from personalized_soups.errors import DeclarationError, UsageError, check_extra, choose_from


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
    if side_a == side_b:
        raise UsageError("both sides are one", where="SIDE_A SIDE_B", mend="name two experts")
    from personalized_soups.adapters.fingerprint import base_fingerprint
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load
    from personalized_soups.files.digest import digest_file
    from personalized_soups.files.lines import growing_lines
    from personalized_soups.generation.prompts import read_prompts
    from personalized_soups.studies.sweep import ANSWERS, PICTURE, RESULTS, Sweep, answer_sweep, draw_sweep, score_sweep

    library = ExpertLibrary.open(*experts)
    for name in (side_a, side_b):
        if name not in library:
            raise UsageError(f"no expert is called {name!r}", where=library.where, mend=choose_from(name, library))
    swept = Sweep(side_a, side_b, steps, scale)
    asked = read_prompts(prompts)
    catalogue: Catalogue | None = load(catalogue_of(base, dimensions), Catalogue)
    side = library[side_b].side or side_b
    try:
        assert catalogue is not None
        catalogue.scorer_of(side)
    except DeclarationError:
        if dimensions is not None:
            raise
        catalogue = None
    settings = {
        "base": base_fingerprint(resolve_base(base)),
        "experts": {name: _digests(library[name].adapter.files) for name in (side_a, side_b)},
        "prompts": digest_file(prompts),
        "steps": steps,
        "scale": scale,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "dtype": dtype,
    }
    with growing_lines(out / ANSWERS, settings, overwrite=overwrite) as kept:
        from personalized_soups.mixing.model import SoupModel

        chosen = ExpertLibrary({name: library[name].folder for name in (side_a, side_b)}, where=library.where)
        model = SoupModel.from_pretrained(resolve_base(base), chosen, device=device, dtype=held, same_base=same_base)
        with render.progress("sweeping", len(asked), done=kept.num_done, quiet=as_json) as bar:
            answer_sweep(
                model,
                swept,
                asked,
                kept,
                batch_size=batch_size,
                on_done=bar.update,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
            )
        results = score_sweep(out / ANSWERS, swept, catalogue, side)
        (out / RESULTS).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draw_sweep(results, out / PICTURE)
    if as_json:
        render.show_json(results)
        return
    rows = [
        [share, score, low, high]
        for (share, score), (low, high) in zip(results["points"], results["intervals"], strict=True)
    ]
    title = f"{results['score']}: {swept.low} to {swept.high}, the base alone {results['base']:.3g}"
    render.show_table(["w", results["score"], "95% from", "to"], rows, title=title)
    render.say(f"{results['verdict']}; {out / PICTURE}")


def _digests(paths: tuple[Path, ...]) -> list[str]:
    from personalized_soups.files.digest import digest_file

    return [digest_file(path) for path in paths]
