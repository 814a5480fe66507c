"""`psoups profile`: everybody's profiles in a store, read and written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from personalized_soups.cli import render
from personalized_soups.errors import InputError, OutputExistsError, SoupError, UsageError, check_extra

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.users.profiles.store import ProfileStore, StoredProfile

User = Annotated[str, typer.Argument(help="The user, as the store knows it.", show_default=False)]
Profiles = Annotated[
    str,
    typer.Option(
        envvar="PSOUPS_PROFILES", help="The store: a SQLite file, sqlite:///FILE, or postgresql://USER@HOST/DATABASE."
    ),
]
Experts = Annotated[
    list[Path] | None,
    typer.Option(help="Check profiles against this folder of experts; may be repeated.", show_default=False),
]
Expect = Annotated[
    int | None,
    typer.Option(min=0, help="Refuse unless the user is at this version; 0: is not there.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT = "profiles.db"


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(
        no_args_is_help=True, help="Keep everybody's profiles, with all versions of each, in one store."
    )
    group.command("set")(set_profile)
    group.command("get")(get_profile)
    group.command("list")(list_profiles)
    group.command("delete")(delete_profile)
    group.command("import")(import_profiles)
    group.command("export")(export_profiles)
    group.command("history")(show_history)
    app.add_typer(group, name="profile")


def set_profile(
    user: User,
    *,
    weights: Annotated[str | None, typer.Option(help="Weights as name=number,name=number.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option(help="A profile file (YAML or JSON) instead.", show_default=False)
    ] = None,
    normalize: Annotated[str | None, typer.Option(help="none or sum; with --weights.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="Merge method; with --weights.", show_default=False)] = None,
    allow_opposed: Annotated[
        bool, typer.Option("--allow-opposed", help="Take weights on two sides of one dimension; with --weights.")
    ] = False,
    expect: Expect = None,
    profiles: Profiles = DEFAULT,
    experts: Experts = None,
    as_json: AsJson = False,
) -> None:
    """Write a user's profile; the store is made where there is none."""
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
    with _opened(profiles, experts, create=True) as store:
        written = store.put(profile, expected=expect)
    if as_json:
        render.show_json(_as_json(written))
    else:
        render.say(f"{_shown(user)} is at version {written.version}")


def get_profile(
    user: User,
    *,
    version: Annotated[
        int | None, typer.Option(min=1, help="An earlier version; the current one if left out.", show_default=False)
    ] = None,
    profiles: Profiles = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with version and time.")] = False,
) -> None:
    """Print a user's profile as YAML, as a profile file holds it."""
    check_extra("serve", "sqlalchemy")
    with _opened(profiles) as store:
        stored = store.get(user, version)
    if as_json:
        render.show_json(_as_json(stored))
        return
    from personalized_soups.declare.loader import dump

    render.say(f"version {stored.version}, written {_time(stored)}")
    render.show_text(dump(stored.profile), end="")


def list_profiles(
    *,
    after: Annotated[str, typer.Option(help="Begin behind this user.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 100,
    profiles: Profiles = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Print the current profiles, by user."""
    check_extra("serve", "sqlalchemy")
    with _opened(profiles) as store:
        page = store.page(after=after, limit=limit + 1)
    shown = page[:limit]
    if as_json:
        render.show_json([_as_json(stored) for stored in shown])
    else:
        render.show_table(
            ["user", "version", "written", "weights"], [[_shown(each.profile.user), *_cells(each)] for each in shown]
        )
    if len(page) > limit:
        render.say(f"there are more: --after {_quoted(shown[-1].profile.user)}")


def delete_profile(
    user: User,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    expect: Expect = None,
    profiles: Profiles = DEFAULT,
) -> None:
    """Delete a user with the whole history; there is no way back."""
    check_extra("serve", "sqlalchemy")
    if not yes and not sys.stdin.isatty():
        raise UsageError(
            "nobody can be asked whether to delete: the input is no terminal",
            where="psoups profile delete",
            mend="give --yes",
        )
    with _opened(profiles) as store:
        if not yes:
            num_versions = len(store.history(user))
            question = f"Delete {_shown(user)} with {num_versions} version{'s' if num_versions > 1 else ''}?"
            if not typer.confirm(question, err=True):
                raise typer.Exit(1)
        store.delete(user, expected=expect)
    render.say(f"{_shown(user)} is deleted, and the history too")


def import_profiles(
    file: Annotated[Path, typer.Argument(help="JSON Lines: one profile a line, each with its user.")],
    *,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip lines that are at fault, name them all, and write the others.")
    ] = False,
    profiles: Profiles = DEFAULT,
    experts: Experts = None,
    as_json: AsJson = False,
) -> None:
    """Write all profiles of a file.

    If a line is at fault, nothing is written unless you give --skip-bad. Profiles that are already in the store are not
    written again.
    """
    check_extra("serve", "sqlalchemy")
    from personalized_soups.declare.profiles import read_profiles

    total = 0
    skipped: list[SoupError] = []

    def tell(done: int) -> None:
        nonlocal total
        total = done
        bar.update(done)

    def skip(fault: SoupError) -> None:
        skipped.append(fault)
        render.say(" ".join(f"skipped {fault.where}: {fault.what}; {fault.mend}".split()))

    on_bad = skip if skip_bad else None
    with _opened(profiles, experts, create=True) as store, render.progress("importing", quiet=as_json) as bar:
        written = store.put_many(read_profiles(file, on_bad=on_bad), on_done=tell, on_bad=on_bad)
    if skipped and not total:
        raise InputError(
            f"no line of the file is a profile that can be written; {len(skipped)} are at fault",
            where=str(file),
            mend="fix the lines that are named above",
        )
    record: dict[str, Any] = {"profiles": total, "written": written, "there already": total - written}
    if as_json:
        shown = {name.replace(" ", "_"): value for name, value in record.items()}
        faults = [{"where": fault.where, "what": fault.what, "mend": fault.mend} for fault in skipped]
        render.show_json({**shown, "skipped": faults} if skip_bad else shown)
    else:
        render.show_record({**record, "skipped": len(skipped)} if skip_bad else record)


def export_profiles(
    *,
    out: Annotated[
        Path | None, typer.Option(help="A new file; standard output if left out.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    profiles: Profiles = DEFAULT,
) -> None:
    """Print the current profiles as JSON Lines, by user; `psoups profile import` reads them."""
    check_extra("serve", "sqlalchemy")
    with _opened(profiles) as store:
        if out is None:
            for stored in store.all():
                render.show_line(_fields(stored.profile))
            return
        count = 0
        with _new_file(out, overwrite=overwrite) as lines:
            for stored in store.all():
                lines.write(json.dumps(_fields(stored.profile), ensure_ascii=False) + "\n")
                count += 1
    render.say(f"{count} profiles in {out}")


def show_history(user: User, *, profiles: Profiles = DEFAULT, as_json: AsJson = False) -> None:
    """Print all versions of a user's profile, the oldest first."""
    check_extra("serve", "sqlalchemy")
    with _opened(profiles) as store:
        history = store.history(user)
    if as_json:
        render.show_json([_as_json(stored) for stored in history])
    else:
        render.show_table(["version", "written", "weights"], [_cells(stored) for stored in history])


@contextmanager
def _opened(where: str, experts: list[Path] | None = None, *, create: bool = False) -> Iterator[ProfileStore]:
    from personalized_soups.users.profiles.store import ProfileStore

    check = None
    if experts:
        from personalized_soups.adapters.library import ExpertLibrary
        from personalized_soups.users.profiles.checks import library_check

        check = library_check(ExpertLibrary.open(*experts))
    with ProfileStore.open(where, check=check, create=create) as store:
        yield store


def _check_one_source(weights: str | None, file: Path | None, **fields: object) -> None:
    if (weights is None) == (file is None):
        raise UsageError(
            "give weights or a profile file, exactly one",
            where="--weights, --file",
            mend="write --weights elementary=0.6,concise=0.6",
        )
    beside = [f"--{name.replace('_', '-')}" for name, value in fields.items() if value]
    if file is not None and beside:
        raise UsageError(
            f"the file says this itself: {', '.join(beside)}", where=beside[0], mend="write it into the file"
        )


def _profile_of_file(file: Path, user: str) -> Profile:
    from personalized_soups.declare.profile import load_profile

    profile = load_profile(file)
    if "user" in profile.model_fields_set and profile.user != user:
        raise UsageError(
            f"the file is the profile of {profile.user!r}, not of {user!r}",
            where=profile.place("user"),
            mend="take `user` out of the file, or name the same user",
        )
    return profile.replaced(user=user)


@contextmanager
def _new_file(path: Path, *, overwrite: bool) -> Iterator[TextIO]:
    """Yield a file that is put in place, all of it or nothing, when the block ends well."""
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        raise OutputExistsError(
            "the output is there already", where=str(path), mend="name another file, or pass --overwrite"
        )
    from personalized_soups.files.atomic import new_file

    with new_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def _fields(profile: Profile) -> dict[str, Any]:
    return {"user": profile.user, **profile.model_dump(mode="json", exclude_defaults=True)}


def _as_json(stored: StoredProfile) -> dict[str, Any]:
    return {
        "user": stored.profile.user,
        "version": stored.version,
        "written_at": stored.written_at.isoformat(),
        "profile": _fields(stored.profile),
    }


def _cells(stored: StoredProfile) -> list[render.Cell]:
    weights = ", ".join(f"{_shown(name)}={weight:g}" for name, weight in stored.profile.weights.items())
    said: Mapping[str, object] = stored.profile.model_dump(
        exclude_defaults=True, exclude={"user", "weights", "options"}
    )
    return [stored.version, _time(stored), "; ".join([weights, *(f"{name}: {value}" for name, value in said.items())])]


def _time(stored: StoredProfile) -> str:
    return stored.written_at.isoformat(sep=" ", timespec="seconds")


def _shown(name: str) -> str:
    """Return a name as a terminal may have it: control characters in it are spelled out, not obeyed."""
    return name if name.isprintable() and name.strip() == name else repr(name)


def _quoted(name: str) -> str:
    import shlex

    return shlex.quote(name) if name.isprintable() else repr(name)
