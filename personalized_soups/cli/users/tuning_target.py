"""Where `psoups tune` starts from, and where it keeps what it has found: a profile store, a file, or both."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.cli import render
from personalized_soups.errors import OutputExistsError, SoupError, UsageError, check_extra

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.expert_weights import Weight
    from personalized_soups.declare.profile import Profile
    from personalized_soups.users.profiles.store import ProfileStore, StoredProfile
    from personalized_soups.users.tuning.tune import Measured, Tuning

# The value of --start for the base without experts.
_BASE = "base"


@dataclass(frozen=True, slots=True)
class TuningTarget:
    """A user, and where the user's weights are kept.

    Attributes:
        user: the user's name.
        store: the address of the profile store; None writes no store.
        out: the file to write; None writes no file.
    """

    user: str
    store: str | None
    out: Path | None

    @classmethod
    def checked(
        cls, user: str, store: str | None, out: Path | None, *, overwrite: bool, by_layer: bool
    ) -> TuningTarget:
        """Check the options before the search, so that no result is lost, and return them.

        Raises:
            UsageError: if the file exists and `overwrite` is false, or a store is given for weights by layer.
            DeclarationError: if the store accepts no user of this name.
        """
        if store is not None and by_layer:
            raise UsageError(
                "weights that differ between layers do not fit into a stored profile, which has one number for each "
                "expert",
                where="--layer-groups, --profiles",
                mend="give --out weights.json instead of --profiles, or remove --layer-groups",
            )
        if out is not None and os.path.lexists(out) and (out.is_dir() or not overwrite):
            raise OutputExistsError(
                "the output path already exists",
                where=f"--out {out}",
                mend="give --out a new file, or give --overwrite to replace an existing file",
            )
        if store is not None:
            check_extra("serve", "sqlalchemy")
            from personalized_soups.users.profiles.store import check_user

            check_user(user, "USER")
        return cls(user, store, out)

    @contextmanager
    def opened(self, experts: Sequence[Path]) -> Iterator[OpenedTarget]:
        """Open the experts and the store, if there is one, and yield the opened target.

        Raises:
            SoupError: if the experts or the store cannot be opened.
        """
        from personalized_soups.adapters.library import ExpertLibrary

        library = ExpertLibrary.open(*experts)
        if self.store is None:
            yield OpenedTarget(self, library)
            return
        from personalized_soups.users.profiles.checks import library_check
        from personalized_soups.users.profiles.store import ProfileStore

        with ProfileStore.open(self.store, check=library_check(library)) as store:
            yield OpenedTarget(self, library, store)


class OpenedTarget:
    """A target whose store is open.

    Attributes:
        library: the experts.

    Args:
        target: the user, the store and the file.
        library: the experts.
        store: the open store; None if there is none.
    """

    def __init__(self, target: TuningTarget, library: ExpertLibrary, store: ProfileStore | None = None) -> None:
        self._target = target
        self.library = library
        self._store = store
        self._current = None if store is None else _current(store, target.user)

    def start(self, text: str | None, *, allow_opposed: bool) -> Profile | None:
        """Return the profile to start from; None for the base alone.

        Args:
            text: the value of --start. If None, the start is the user's profile in the store, or else the base alone.
            allow_opposed: allow weights on two sides of one dimension.

        Raises:
            UsageError: if the text is invalid.
            DeclarationError: if the profile does not fit the experts.
        """
        from personalized_soups.declare.profile import Profile

        if text == _BASE or (text is None and self._current is None):
            return None
        if text is None:
            assert self._current is not None
            profile = self._current.profile
            render.say(f"starting from version {self._current.version} of the user's profile")
        else:
            fields = {"allow_opposed": True} if allow_opposed else {}
            profile = Profile.from_option(text, user=self._target.user, **fields)
        self.library.check(profile)
        return profile

    def keep(self, tuning: Tuning, *, as_json: bool) -> None:
        """Print the result. If it is better than the start, also write it to the file and to the store.

        Raises:
            SoupError: if the file or the store cannot be written. The weights have been printed then.
        """
        if not as_json:
            _show(tuning)
        version = self._written(tuning) if tuning.is_better else None
        if as_json:
            render.show_json({"user": self._target.user, **_json_of(tuning), "version": version})
        elif version is not None:
            render.say(f"{_printable(self._target.user)} is at version {version}")

    def _written(self, tuning: Tuning) -> int | None:
        """Write the better weights, and return their version in the store, or None if there is no store."""
        profile = tuning.profile(self._target.user)
        weights = tuning.chosen.weights
        if not weights:
            render.say("the base alone fits best: no profile is written, because a profile needs a weight")
            return None
        if self._target.out is not None:
            _write(self._target.out, self._target.user, profile, weights)
            render.say(f"written to {self._target.out}")
        if self._store is None or profile is None:
            return None
        try:
            # If another program has changed the profile meanwhile, the start was not the one that is replaced.
            return self._store.put(profile, expected=0 if self._current is None else self._current.version).version
        except SoupError:
            render.say(f"the weights found are {json.dumps(profile.weights)}")
            raise


def _current(store: ProfileStore, user: str) -> StoredProfile | None:
    from personalized_soups.users.profiles.store import UnknownProfile

    try:
        return store.get(user)
    except UnknownProfile:
        return None


def _write(path: Path, user: str, profile: Profile | None, weights: Mapping[str, Weight]) -> None:
    from personalized_soups.declare.loader import dump
    from personalized_soups.files.atomic import new_file

    text = json.dumps({"user": user, "weights": weights}, indent=2) + "\n" if profile is None else dump(profile)
    with new_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _show(tuning: Tuning) -> None:
    start, best = tuning.start, tuning.best or tuning.start
    names = sorted({*start.weights, *best.weights})
    rows: list[list[Any]] = [[name, start.weights.get(name, 0.0), best.weights.get(name, 0.0)] for name in names]
    rows += [
        [f"{tuning.measure}, search ({tuning.num_search})", start.search, best.search],
        [f"the same, validation ({tuning.num_validation})", start.validation, best.validation],
        ["the same, all", start.overall, best.overall],
    ]
    render.show_table(["", "start", "found"], rows)
    if tuning.is_stopped:
        render.say(f"stopped after {tuning.num_evaluations} candidates")
    if not tuning.is_better:
        render.say("nothing scores higher than the start, on the validation part and on all data: nothing is written")


def _json_of(tuning: Tuning) -> dict[str, Any]:
    return {
        "measure": tuning.measure,
        "is_better": tuning.is_better,
        "is_stopped": tuning.is_stopped,
        "evaluations": tuning.num_evaluations,
        "generations": tuning.num_generations,
        "items": {"search": tuning.num_search, "validation": tuning.num_validation},
        "weights": dict(tuning.chosen.weights),
        "start": _measured(tuning.start),
        "best": None if tuning.best is None else _measured(tuning.best),
    }


def _measured(measured: Measured) -> dict[str, Any]:
    scores = {"search": measured.search, "validation": measured.validation, "all": measured.overall}
    # JSON has no NaN, which a broken soup may score.
    finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
    return {"weights": dict(measured.weights), **finite}


def _printable(name: str) -> str:
    return name if name.isprintable() and name.strip() == name else repr(name)
