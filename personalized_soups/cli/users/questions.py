"""`psoups questions`: prepare the questions that users answer, and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import checked_dtype, resolve_base
from personalized_soups.cli.options import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    ExpertsOption,
    JsonOption,
    MaxNewTokensOption,
    OnOption,
    OverwriteOption,
    SameBaseOption,
    SeedOption,
    TemperatureOption,
)
from personalized_soups.cli.question_pools import pool_progress, prompts_of
from personalized_soups.cli.sampling import check_temperature
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.users.answers.pool import QuestionPool

PoolArgument = Annotated[Path, typer.Argument(help="Folder of questions, which psoups questions make wrote.")]


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Prepare the questions that tell what a user prefers.")
    group.command("make")(make)
    group.command("fit")(fit)
    group.command("show")(show)
    app.add_typer(group, name="questions")


def make(
    *,
    experts: ExpertsOption,
    base: BaseOption,
    on: OnOption = None,
    out: Annotated[Path, typer.Option(help="Folder of questions to write.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='File of prompts: one prompt per line, or JSON Lines with the key "prompt". Optional for the embedded '
            "base.",
            show_default=False,
        ),
    ] = None,
    num_questions: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 200,
    num_samples: Annotated[int, typer.Option(min=2, help="Number of answers to sample for each prompt.")] = 4,
    temperature: TemperatureOption = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens that have this share of the probability.")
    ] = 0.95,
    max_new_tokens: MaxNewTokensOption = 256,
    whole_sentences: Annotated[
        bool,
        typer.Option(
            "--whole-sentences",
            help="Keep an answer that is cut off up to its last whole sentence. Otherwise it is left out.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows that are computed at once.")] = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    same_base: SameBaseOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sample answers from soups of random profiles, and keep the pairs of answers that tell users apart.

    A question has a prompt and two answers. psoups profile infer asks a user some of the questions.
    """
    _check(temperature, out, overwrite=overwrite)
    texts = prompts_of(prompts, base, num_questions, seed)
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.users.answers.making import make_questions

    path, kind = resolve_base(base), checked_dtype(dtype)
    model = SoupModel.from_pretrained(path, experts, on=on, device=device, dtype=kind, same_base=same_base)
    with pool_progress(quiet=as_json) as on_progress:
        pool = make_questions(
            model,
            texts,
            num_questions=num_questions,
            answers_per_prompt=num_samples,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            whole_sentences=whole_sentences,
            batch_size=batch_size,
            seed=seed,
            base=path,
            folders=experts,
            options={"prompts": None if prompts is None else str(prompts)},
            on_progress=on_progress,
        ).write(out, overwrite=overwrite)
    _report(pool, num_questions, as_json=as_json)


def fit(
    folder: PoolArgument,
    *,
    known: Annotated[
        Path,
        typer.Option(help='JSON Lines file of known users\' answers, with the keys "user", "question" and "choice".'),
    ],
    as_json: JsonOption = False,
) -> None:
    """Fit what is assumed of a new user on the answers of known users, and store it with the questions.

    New users then need fewer answers.
    """
    from personalized_soups.users.answers.known_users import fit_known_users, read_known_answers
    from personalized_soups.users.answers.pool import QuestionPool

    pool = QuestionPool.open(folder)
    fitted = fit_known_users(pool, read_known_answers(known, pool)).write(folder, overwrite=True)
    prior = fitted.prior
    record = {
        "folder": str(folder),
        "users": fitted.record.prior["num_users"],
        "answers": fitted.record.prior["num_answers"],
        "mean weights": dict(zip(fitted.names, prior.mean.tolist(), strict=True)),
        "standard deviations": {
            name: float(variance**0.5) for name, variance in zip(fitted.names, prior.covariance.diagonal(), strict=True)
        },
    }
    render.show_record(record, as_json=as_json)


def show(
    folder: PoolArgument,
    *,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of questions to print.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Print the first questions of a folder, with the difference of the two answers in each reward."""
    from personalized_soups.users.answers.pool import QuestionPool

    pool = QuestionPool.open(folder)
    for question, difference in list(zip(pool.questions, pool.differences, strict=True))[:limit]:
        values = {name: float(value) for name, value in zip(pool.names, difference, strict=True)}
        shown = {**question.model_dump(mode="json"), "a minus b": values}
        if as_json:
            render.show_line(shown)
        else:
            render.show_record(shown)
    render.say(f"{min(limit, len(pool))} of {len(pool)} questions; rewards of {', '.join(pool.names)}")


def _check(temperature: float, out: Path, *, overwrite: bool) -> None:
    """Check the temperature and the output, before anything is computed.

    Raises:
        UsageError: if the answers to a prompt would be equal, or the temperature is out of range.
        OutputExistsError: if the folder exists and may not be replaced.
    """
    from personalized_soups.files.atomic import check_target

    check_temperature(temperature, usual=1.0)
    if temperature == 0:
        raise UsageError(
            "the temperature is 0, but the answers to a prompt must differ",
            where="--temperature",
            mend="give --temperature 1",
        )
    check_target(out, overwrite=overwrite)


def _report(pool: QuestionPool, wanted: int, *, as_json: bool) -> None:
    record = {
        "folder": str(pool.folder),
        "questions": len(pool),
        "prompts": len(set(pool.prompts)),
        "rewards": list(pool.names),
    }
    render.show_record(record, as_json=as_json)
    if len(pool) < wanted:
        render.say(
            f"the answers give only {len(pool)} different questions, not {wanted}: give more prompts or a larger "
            "--num-samples"
        )
