"""Profiles as the text that a store holds: JSON in ASCII, with everything of the profile but its user."""

from __future__ import annotations

import json

from pydantic import ValidationError

from personalized_soups.declare.declared import Places
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, FileFormatError
from personalized_soups.users.profiles.names import has_surrogates


def document_of(profile: Profile) -> str:
    """Return the fields of a profile that differ from their defaults, without the user.

    Raises:
        DeclarationError: if an expert's name contains lone surrogates.
    """
    # ASCII, because PostgreSQL does not store NUL and an expert's name may contain it.
    document = json.dumps(profile.model_dump(exclude_defaults=True, exclude={"user"}), separators=(",", ":"))
    if has_surrogates("".join(profile.weights)):
        raise DeclarationError(
            "an expert's name is not Unicode text: it contains half of a surrogate pair",
            where=profile.place("weights"),
            mend="use the name of the expert's folder",
        )
    return document


def profile_of(user: str, version: int, document: str, where: str) -> Profile:
    """Return the profile in a document.

    Args:
        user: the profile's user.
        version: the profile's version, for errors.
        document: what `document_of` returned.
        where: the store's name, for errors.

    Raises:
        FileFormatError: if the document is not a valid profile.
    """
    try:
        # A document is never the empty object, because weights have no default.
        profile = Profile.model_validate_json(f'{{"user":{json.dumps(user)},{document[1:]}')
    except ValidationError as error:
        raise FileFormatError(
            f"version {version} of {user!r} is not a valid profile: {error.errors()[0]['msg']}",
            where=where,
            mend="upgrade personalized_soups if a newer version wrote the profile, else restore it from an export",
        ) from error
    return profile.with_places(Places(f"{where}: {user!r} at version {version}", {}))
