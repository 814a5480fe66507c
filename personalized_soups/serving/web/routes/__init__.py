"""The server's routes: one file for each kind of resource."""

from __future__ import annotations

from starlette.convertors import Convertor, register_url_convertor

from personalized_soups.serving.web.routes.user_paths import without_mark


class AnyText(Convertor[str]):
    """A path parameter that matches the whole rest of the path, because user names may contain slashes and newlines."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        """Return the value without the mark of `UserPaths`."""
        return without_mark(value)

    def to_string(self, value: str) -> str:
        """Return the value unchanged."""
        return value


register_url_convertor("any", AnyText())
