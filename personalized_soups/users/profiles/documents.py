"""Conversion between profiles and the documents in a store.

A document is a JSON object in ASCII with all fields of a profile except its user.
"""

from __future__ import annotations

import json

from pydantic import ValidationError

from personalized_soups.declare.declared import Places
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, FileFormatError
from personalized_soups.users.profiles.names import has_surrogates


def document_of(profile: Profile) -> str:
    """Return the document of a profile. It contains the fields that differ from their defaults, without the user.

    Raises:
        DeclarationError: if an expert's name contains lone surrogates.
    """
    # JSON escapes the character NUL, which may occur in an expert's name and which PostgreSQL cannot store.
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
        document: the document, as `document_of` returned it.
        where: the store's name, for errors.

    Raises:
        FileFormatError: if the document is not a valid profile.
    """
    try:
        # A document always contains the weights, which have no default, so document[1:] is not just a brace.
        profile = Profile.model_validate_json(f'{{"user":{json.dumps(user)},{document[1:]}')
    except ValidationError as error:
        raise FileFormatError(
            f"version {version} of {user!r} is not a valid profile: {error.errors()[0]['msg']}",
            where=where,
            mend="upgrade personalized_soups if a newer version wrote the profile, else restore it from an export",
        ) from error
    return profile.with_places(Places(f"{where}: {user!r} at version {version}", {}))
