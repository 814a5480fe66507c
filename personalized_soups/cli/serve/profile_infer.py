"""`psoups profile infer`: ask a user which answers are better, and write the profile that the answers give."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import LoadOptions, catalogue_of, checked_dtype
from personalized_soups.cli.options import (
    AllowOpposedOption,
    BaseOption,
    DeviceOption,
    DimensionsOption,
    DtypeOption,
    ExpertsOption,
    JsonOption,
    OnOption,
    SameBaseOption,
    StoreOption,
)
from personalized_soups.cli.serve.interview.checks import (
    check_modes,
    checked_noise,
    checked_rule,
    checked_scale,
    checked_stopping,
)
from personalized_soups.cli.serve.interview.keyboard import opened_keyboard
from personalized_soups.cli.serve.interview.loop import AnswerLog, ForgottenAnswers
from personalized_soups.cli.serve.interview.person import Person
from personalized_soups.cli.serve.interview.pools import PoolSource
from personalized_soups.cli.serve.interview.result import json_of_result, show_result
from personalized_soups.cli.serve.interview.run import InferenceOptions, InferenceRun
from personalized_soups.cli.serve.interview.same_command import same_command
from personalized_soups.cli.serve.interview.simulated import (
    SimulatedAnswerer,
    load_simulated_user,
    predicted_share,
)
from personalized_soups.cli.serve.interview.stored_answers import StoredAnswers
from personalized_soups.cli.serve.stored_profiles import DEFAULT_STORE, opened_store, printable
from personalized_soups.errors import RunError

if TYPE_CHECKING:
    from personalized_soups.declare.evidence import AnsweredQuestion
    from personalized_soups.declare.profile import Profile
    from personalized_soups.tiny.simulated_users import SimulatedUser
    from personalized_soups.users.answers.session import InferenceSession
    from personalized_soups.users.profiles.store import ProfileStore

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_MORE_QUESTIONS = 5


def infer_profile(
    context: typer.Context,
    user: Annotated[str, typer.Argument(help="The user's name in the store.", show_default=False)],
    *,
    experts: ExpertsOption,
    base: BaseOption,
    on: OnOption = None,
    questions: Annotated[
        int, typer.Option(min=1, help="Number of questions in all, with those of earlier runs and skipped ones.")
    ] = 10,
    certainty: Annotated[
        float | None,
        typer.Option(
            help="Stop early when this share of the user's choices is expected to be predicted, e.g. 0.9.",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(
            help="Folder of questions, which psoups questions make wrote. By default, questions are made once and "
            "kept next to the experts.",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(help="How to choose the next question: information, prediction, variance, thompson or random."),
    ] = "prediction",
    noise: Annotated[float, typer.Option(help="Probability that the user presses the wrong button.")] = 0.0,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Ask nothing: estimate the weights from the stored answers with these experts."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete the user's stored answers, and start with the first question.")
    ] = False,
    scale: Annotated[
        float | None, typer.Option(help="Greatest weight of the profile, instead of 0.6.", show_default=False)
    ] = None,
    allow_opposed: AllowOpposedOption = False,
    no_win_rate: Annotated[
        bool, typer.Option("--no-win-rate", help="Do not predict how often the soup's answers beat the base's.")
    ] = False,
    simulate: Annotated[
        Path | None,
        typer.Option(
            help="Persona file of a simulated user who answers. Nothing is stored, unless --profiles is given.",
            show_default=False,
        ),
    ] = None,
    dimensions: DimensionsOption = None,
    profiles: StoreOption = DEFAULT_STORE,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    same_base: SameBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a user which of two answers is better, and store the profile that the answers give.

    Press A or B, T for a tie, S to skip, K to go back, Q to quit, or ? for help. Each answer is stored at once. Run the
    same command again to continue. If standard input is not a terminal, each line is one key.
    """
    options = InferenceOptions(
        stopping=checked_stopping(questions, certainty),
        rule=checked_rule(rule),
        noise=checked_noise(noise),
        scale=checked_scale(scale),
        allow_opposed=allow_opposed,
        with_win_rate=not no_win_rate,
    )
    loading = LoadOptions(base, device, checked_dtype(dtype), same_base, on)
    check_modes(refit=refit, restart=restart, simulate=simulate)
    from personalized_soups.adapters.library import ExpertLibrary

    library = ExpertLibrary.open(*experts)
    run = InferenceRun(user, library, PoolSource(pool, experts, loading, quiet=as_json), options)
    again = _Again(context)
    simulated = None if simulate is None else load_simulated_user(simulate, catalogue_of(base, dimensions))
    with _store(again, simulated) as store:
        if restart and store is not None:
            render.say(f"{store.answers.delete(user)} stored answers of {printable(user)} are deleted")
        answers = [] if store is None else store.answers.of(user)
        session = run.refitted(answers) if refit else _interviewed(run, store, answers, again, simulated)
        if session is not None:
            _finish(run, store, session, again, simulated)


@contextmanager
def _store(again: _Again, simulated: SimulatedUser | None) -> Iterator[ProfileStore | None]:
    """Yield the profile store, or None for a simulated user without --profiles."""
    if simulated is not None and not again.is_given("profiles"):
        yield None
        return
    with opened_store(again.value("profiles"), again.value("experts"), create=True) as store:
        yield store


class _Again:
    """Writes the running command with other options, for messages."""

    def __init__(self, context: typer.Context) -> None:
        self._context = context

    def command(self, **changes: object) -> str:
        """Return the command. Without changes, it continues the interview."""
        return same_command(self._context, {"restart": False, "refit": False, **changes})

    def is_given(self, name: str) -> bool:
        """Return whether a parameter is given on the command line, and not in the environment."""
        return getattr(self._context.get_parameter_source(name), "name", None) == "COMMANDLINE"

    def value(self, name: str) -> Any:
        """Return the value of a parameter."""
        return self._context.params[name]


def _interviewed(
    run: InferenceRun,
    store: ProfileStore | None,
    answers: Sequence[AnsweredQuestion],
    again: _Again,
    simulated: SimulatedUser | None,
) -> InferenceSession | None:
    """Continue the interview after some answers. Return None if the user quits."""
    begun = run.session(answers, refit=again.command(refit=True), restart=again.command(restart=True))
    return _asked(run, store, begun, again, simulated)


def _asked(
    run: InferenceRun,
    store: ProfileStore | None,
    session: InferenceSession,
    again: _Again,
    simulated: SimulatedUser | None,
) -> InferenceSession | None:
    """Ask the questions. Return None if the user quits.

    Raises:
        RunError: if standard input ends before the questions do.
    """
    user, continue_ = session.user, again.command()
    if session.answers:
        render.say(f"{_answers(session.num_asked)} stored already for {printable(user)}")
    log: AnswerLog = ForgottenAnswers()
    if store is not None:
        log = StoredAnswers(store.answers, user, session.num_asked, resume=continue_)
    if simulated is not None:
        return run.asked(session, SimulatedAnswerer(simulated, session.num_asked), log)[0]
    try:
        with opened_keyboard(sys.stdin) as keyboard:
            session, ending = run.asked(session, Person(keyboard, render.say), log)
    except KeyboardInterrupt:
        render.say(f"\ninterrupted; your answers are kept. Continue: {continue_}")
        raise typer.Exit(_INTERRUPTED) from None
    if ending == "done":
        return session
    kept = f"{_answers(session.num_asked)} kept in {again.value('profiles')}"
    if ending == "end of input":
        raise RunError(
            f"standard input ended before question {session.num_asked + 1} was answered; {kept}",
            where="standard input",
            mend=f"continue: {continue_}",
        )
    render.say(f"{kept}. Continue: {continue_}")
    if session.num_asked:
        render.say(f"Or use the answers so far: {again.command(questions=session.num_asked)}")
    if again.value("as_json"):
        render.show_json({"user": user, "done": False, "num_asked": session.num_asked})
    return None


def _finish(
    run: InferenceRun,
    store: ProfileStore | None,
    session: InferenceSession,
    again: _Again,
    simulated: SimulatedUser | None,
) -> None:
    """Store the profile, and print the result.

    Raises:
        RunError: if the answers show no preference, so that there is no profile.
    """
    profile = run.profile(session)
    version = None if profile is None or store is None else store.put(profile).version
    result = run.result(session, profile, version)
    if simulated is not None:
        result = replace(result, predicted=predicted_share(simulated, session))
    num_open = len(session.pool) - session.num_asked
    more = again.command(questions=session.num_asked + min(_MORE_QUESTIONS, num_open)) if num_open else None
    if again.value("as_json"):
        render.show_json(json_of_result(result))
    else:
        show_result(result, store=again.value("profiles"), use=_uses(profile, version, again), more=more)
    if profile is None:
        raise RunError(
            "the answers show no preference, so no profile was written",
            where=f"the answers of {session.user!r}",
            mend="take back answers with K, or start again" if more is None else f"answer more questions: {more}",
        )


def _uses(profile: Profile | None, version: int | None, again: _Again) -> list[str]:
    """Return commands that use a profile."""
    if profile is None:
        return []
    model = [word for folder in again.value("experts") for word in ("--experts", str(folder))]
    model += ["--base", again.value("base")]
    weights = ",".join(f"{name}={weight:g}" for name, weight in profile.weights.items())
    opposed = ["--allow-opposed"] if profile.allow_opposed else []
    generate = ["psoups", "generate", "How do I clean a lamp?", *model, "--weights", weights, *opposed]
    serve = ["psoups", "serve", *model, "--profiles", again.value("profiles")]
    served = [] if version is None else [f"{shlex.join(serve)}  # then ask the model soup:{printable(profile.user)}"]
    return [shlex.join(generate), *served]


def _answers(count: int) -> str:
    return {0: "no answers are", 1: "1 answer is"}.get(count, f"{count} answers are")
