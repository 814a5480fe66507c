"""`psoups profile`: read and write the profiles of all users in one store."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import AllowOpposedOption, JsonOption, StoreOption
from personalized_soups.cli.serve.profile_answers import expire_answers, show_answers
from personalized_soups.cli.serve.profile_files import export_profiles, import_profiles
from personalized_soups.cli.serve.profile_infer import infer_profile
from personalized_soups.cli.serve.stored_profiles import (
    DEFAULT_STORE,
    CheckedExpertsOption,
    cells_of,
    counted,
    json_of,
    opened_store,
    printable,
    time_of,
)
from personalized_soups.errors import UsageError, check_extra

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.users.profiles.store import ProfileStore

UserArgument = Annotated[str, typer.Argument(help="The user's name in the store.", show_default=False)]
ExpectOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Change the profile only if its current version is this. With 0, only if the user has none.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Keep the profiles of all users, with every version, in one store.")
    group.command("set")(set_profile)
    group.command("get")(get_profile)
    group.command("infer")(infer_profile)
    group.command("list")(list_profiles)
    group.command("delete")(delete_profile)
    group.command("import")(import_profiles)
    group.command("export")(export_profiles)
    group.command("history")(show_history)
    group.command("answers")(show_answers)
    group.command("expire")(expire_answers)
    app.add_typer(group, name="profile")


def set_profile(
    user: UserArgument,
    *,
    weights: Annotated[
        str | None, typer.Option(help="Weights of the experts, e.g. elementary=0.6,concise=0.6.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Profile file (YAML or JSON) instead of --weights.", show_default=False)
    ] = None,
    normalize: Annotated[
        str | None, typer.Option(help="How to normalize --weights: none or sum.", show_default=False)
    ] = None,
    method: Annotated[str | None, typer.Option(help="Merge method to use with --weights.", show_default=False)] = None,
    allow_opposed: AllowOpposedOption = False,
    expect: ExpectOption = None,
    profiles: StoreOption = DEFAULT_STORE,
    experts: CheckedExpertsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a user's profile. A missing store is created."""
    _check_one_source(weights, file, normalize=normalize, method=method, allow_opposed=allow_opposed)
    check_extra("serve", "sqlalchemy")
    if file is not None:
        profile = _profile_of_file(file, user)
    else:
        from personalized_soups.declare.profile import Profile
        from personalized_soups.users.profiles.store import check_user

        check_user(user, "USER")
        fields = {"normalize": normalize, "method": method, "allow_opposed": allow_opposed or None}
        given = {name: value for name, value in fields.items() if value is not None}
        profile = Profile.from_option(weights or "", user=user, **given)
    with opened_store(profiles, experts, create=True) as store:
        written = store.put(profile, expected=expect)
    if as_json:
        render.show_json(json_of(written))
    else:
        render.say(f"{printable(user)} is at version {written.version}")


def get_profile(
    user: UserArgument,
    *,
    version: Annotated[
        int | None, typer.Option(min=1, help="An earlier version instead of the current one.", show_default=False)
    ] = None,
    profiles: StoreOption = DEFAULT_STORE,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the version and the time it was written.")
    ] = False,
) -> None:
    """Print a user's profile as YAML, in the format of profile files."""
    with opened_store(profiles) as store:
        stored = store.get(user, version)
    if as_json:
        render.show_json(json_of(stored))
        return
    from personalized_soups.declare.loader import dump

    render.say(f"version {stored.version}, written {time_of(stored)}")
    render.show_text(dump(stored.profile), end="")


def list_profiles(
    *,
    after: Annotated[str, typer.Option(help="Start the list after this user.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Largest number of profiles to print.")] = 100,
    profiles: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Print the current profiles, sorted by user."""
    with opened_store(profiles) as store:
        page = store.page(after=after, limit=limit + 1)
    shown = page[:limit]
    if as_json:
        render.show_json([json_of(stored) for stored in shown])
    else:
        rows = [[printable(stored.profile.user), *cells_of(stored)] for stored in shown]
        render.show_table(["user", "version", "written", "weights"], rows)
    if len(page) > limit:
        last = shown[-1].profile.user
        render.say(
            f"there are more profiles: list them with --after {shlex.quote(last) if last.isprintable() else repr(last)}"
        )


def delete_profile(
    user: UserArgument,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    expect: ExpectOption = None,
    profiles: StoreOption = DEFAULT_STORE,
) -> None:
    """Delete all versions of a user's profile, and the user's answers to questions. This cannot be undone."""
    if not yes and not sys.stdin.isatty():
        raise UsageError(
            "the deletion must be confirmed, but standard input is not a terminal",
            where="psoups profile delete",
            mend="give --yes to delete without confirmation",
        )
    with opened_store(profiles) as store:
        if not yes:
            _confirm_deletion(store, user)
        deletion = store.delete(user, expected=expect)
    render.say(f"{printable(user)} is deleted, with {_contents(deletion.num_versions, deletion.num_answers)}")


def show_history(user: UserArgument, *, profiles: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Print all versions of a user's profile, the oldest first."""
    with opened_store(profiles) as store:
        history = store.history(user)
    if as_json:
        render.show_json([json_of(stored) for stored in history])
    else:
        render.show_table(["version", "written", "weights"], [cells_of(stored) for stored in history])


def _confirm_deletion(store: ProfileStore, user: str) -> None:
    """Ask whether to delete a user, and exit if not.

    Raises:
        UnknownProfile: if the store has neither a profile nor answers of the user.
    """
    from personalized_soups.users.profiles.store import UnknownProfile

    num_answers = store.answers.count(user)
    try:
        num_versions = len(store.history(user))
    except UnknownProfile:
        if not num_answers:
            raise
        num_versions = 0
    if not typer.confirm(f"Delete {printable(user)} with {_contents(num_versions, num_answers)}?", err=True):
        raise typer.Exit(1)


def _contents(num_versions: int, num_answers: int) -> str:
    return f"{counted(num_versions, 'version')} and {counted(num_answers, 'answer')}"


def _check_one_source(weights: str | None, file: Path | None, **fields: object) -> None:
    if (weights is None) == (file is None):
        raise UsageError(
            "exactly one of --weights and --file must be given",
            where="--weights, --file",
            mend="give --weights elementary=0.6,concise=0.6, or give --file me.yaml",
        )
    misplaced = [f"--{name.replace('_', '-')}" for name, value in fields.items() if value]
    if file is not None and misplaced:
        raise UsageError(
            f"--file cannot be combined with {', '.join(misplaced)}, because the profile file has its own fields",
            where=misplaced[0],
            mend=f"remove {', '.join(misplaced)}, and write the values into the profile file",
        )


def _profile_of_file(file: Path, user: str) -> Profile:
    from personalized_soups.declare.profile import load_profile

    profile = load_profile(file)
    if "user" in profile.model_fields_set and profile.user != user:
        raise UsageError(
            f"the file is the profile of the user {profile.user!r}, but USER is {user!r}",
            where=profile.place("user"),
            mend="remove `user` from the file, or give the same name as USER",
        )
    return profile.replaced(user=user)
