"""`psoups scorer`: train a classifier of texts as a scorer, and calibrate the bounds of fluency on a base's answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import LoadOptions, checked_dtype
from personalized_soups.cli.data.outputs import check_new_file
from personalized_soups.cli.options import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OverwriteOption,
    SeedOption,
)
from personalized_soups.errors import InputError, UsageError

if TYPE_CHECKING:
    from personalized_soups.scoring.classifiers.held_out import HeldOutReport, Interval
    from personalized_soups.scoring.hidden_states import HiddenStates
    from personalized_soups.training.rollouts import Sampled

_TEXTS = "a text on each line, JSON Lines with the key text or answer, or a folder of such files and of whole texts"


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Make scorers from texts, and check that answers are fluent.")
    group.command("train")(train_scorer)
    group.command("calibrate")(calibrate)
    app.add_typer(group, name="scorer")


def train_scorer(
    high: Annotated[Path, typer.Argument(help=f"Texts of the high end: {_TEXTS}.")],
    low: Annotated[Path, typer.Argument(help="Texts of the low end, in the same formats.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the classifier to write.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model whose mean hidden states are the features. Without it, words are counted.",
            show_default=False,
        ),
    ] = None,
    keep_length: Annotated[
        bool, typer.Option("--keep-length", help="Let the classifier learn the length, for a dimension about length.")
    ] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a classifier on texts of two ends, for the scorer kind `classifier` of a catalogue.

    The figures are those of texts that are held out, with 95% intervals. The texts of one prompt or group are held out
    together.
    """
    checked = checked_dtype(dtype)
    from personalized_soups.files.atomic import check_target
    from personalized_soups.scoring.classifiers.labelled_texts import read_labelled_texts

    check_target(out, overwrite=overwrite)
    texts = read_labelled_texts(high, low)

    from personalized_soups.scoring.answer_classifiers import train_text_classifier

    states = None if base is None else _states(LoadOptions(base, device, checked))
    settings: Any = {"states": states, "keep_length": keep_length, "seed": seed, "base": base or ""}
    classifier, report = train_text_classifier(texts, **settings)
    classifier.save(out, overwrite=overwrite)
    _show(out, classifier.about, report, as_json=as_json)


def calibrate(
    pool: Annotated[
        Path,
        typer.Argument(help="Pool of the base's answers, from psoups pairs --pool. Only plain answers count."),
    ],
    *,
    base: BaseOption,
    out: Annotated[Path, typer.Option(help="File of the bounds to write, e.g. fluency.yaml.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of tokens at which the answers were cut. Shorter answers must end a sentence.",
            show_default=False,
        ),
    ] = None,
    accept: Annotated[float, typer.Option(help="Share of the base's own answers to accept, in (0, 1).")] = 0.97,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Calibrate the bounds of fluency on a base's own answers. psoups pairs --fluency reads them."""
    if not 0 < accept < 1:
        raise UsageError(f"the value is {accept:g}, but it must be in (0, 1)", where="--accept", mend="give 0.97")
    loading = LoadOptions(base, device, checked_dtype(dtype))
    check_new_file(out, overwrite=overwrite)
    from personalized_soups.training.rollouts import read_pool

    prompts, answers = _plain_answers(read_pool(pool), pool)

    from personalized_soups.declare.loader import dump
    from personalized_soups.files.atomic import new_file
    from personalized_soups.scoring.fluency import FluencyGate
    from personalized_soups.scoring.fluency_calibration import calibrate_fluency

    gate = FluencyGate.open(loading.path, device=device, dtype=loading.dtype)
    with render.progress("measuring answers", len(answers), quiet=as_json) as bar:
        measured = gate.measure(prompts, answers, on_done=bar.update)
    bounds = calibrate_fluency(measured, accept=accept, max_new_tokens=max_new_tokens, base=loading.fingerprint)
    with new_file(out) as scratch:
        scratch.write_text(dump(bounds), encoding="utf-8")
    render.show_record(
        {"file": str(out), **bounds.model_dump(exclude={"about", "base"}), **bounds.about}, as_json=as_json
    )


def _states(loading: LoadOptions) -> HiddenStates:
    from personalized_soups.scoring.hidden_states import HiddenStates

    return HiddenStates.open(loading.path, device=loading.device, dtype=loading.dtype, pooling="mean")


def _plain_answers(pool: list[Sampled], path: Path) -> tuple[list[str], list[str]]:
    """Return the plain answers of a pool, each with its prompt."""
    plain = [
        (sampled.prompt, answer)
        for sampled in pool
        for answer, instruction in zip(
            sampled.answers, sampled.instructions or (None,) * len(sampled.answers), strict=True
        )
        if instruction is None
    ]
    if not plain:
        raise InputError(
            "the pool has no plain answer: all were sampled under instructions",
            where=str(path),
            mend="sample plain answers: give --instructed a smaller number than --num-samples",
        )
    return [prompt for prompt, _ in plain], [answer for _, answer in plain]


def _show(out: Path, about: Any, report: HeldOutReport, *, as_json: bool) -> None:
    if as_json:
        render.show_json({"folder": str(out), **about})
        return
    record = {
        "folder": str(out),
        "texts": f"{about['texts']['high']} high, {about['texts']['low']} low, in {report.num_groups} groups",
        "accuracy": _shown(report.accuracy),
        "AUC": _shown(report.auc),
        "score and length": f"{report.score_with_length:+.2f} (within a class {report.within_classes:+.2f})",
        "class and length": f"{report.class_with_length:+.2f}",
    }
    render.show_record(record, as_json=False)


def _shown(interval: Interval) -> str:
    return f"{interval.value:.3f} (95%: {interval.low:.3f} to {interval.high:.3f})"
