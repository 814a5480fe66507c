"""Load a model and run the server, for `psoups serve` and `psoups playground`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli import render
from personalized_soups.cli.bases import LoadOptions, catalogue_of
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.serving.web.settings import ApiKey, Settings
    from personalized_soups.users.answers.pool import QuestionPool
    from personalized_soups.users.profiles.store import ProfileStore

HOST, PORT = "127.0.0.1", 8000

# How long a write to the profile store waits for other writers, such as an import.
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ServedFiles:
    """The files of a server, apart from the base.

    Attributes:
        experts: folders of experts.
        profiles: the file or address of the profile store. If None, no profiles are stored.
        questions: folder of a question pool. If None, users are asked no questions.
        dimensions: path of the catalogue. If None, the shipped catalogue is used.
        api_keys: file of API keys. If None, every client is served.
    """

    experts: Sequence[Path]
    profiles: str | None = None
    questions: Path | None = None
    dimensions: Path | None = None
    api_keys: Path | None = None


@dataclass(frozen=True, slots=True)
class ServerRun:
    """The options of a server, and the run of the server.

    Attributes:
        loading: how the base is loaded.
        files: the other files.
        settings: the server's settings, without the API keys and the limits that depend on the loaded base.
        host: the address to listen on.
        port: the port to listen on. With 0, a free port is chosen.
        max_context: maximum tokens of a prompt and its answer together. If None, the base's limit is used.
        cache_memory: GiB of memory for cached keys and values. If None, half of the free memory is used.
        takes_any_port: listen on a free port if `port` is in use.
        opens_browser: open the playground in the browser.
    """

    loading: LoadOptions
    files: ServedFiles
    settings: Settings
    _: KW_ONLY
    host: str = HOST
    port: int = PORT
    max_context: int | None = None
    cache_memory: float | None = None
    takes_any_port: bool = False
    opens_browser: bool = False

    def run(self) -> None:
        """Load the base and the experts, and answer requests until the server is stopped.

        Raises:
            SoupError: if a file cannot be read, the address cannot be used, or the base and the experts do not match.
        """
        from personalized_soups.adapters.library import ExpertLibrary
        from personalized_soups.declare.dimension import Catalogue
        from personalized_soups.declare.loader import load
        from personalized_soups.serving.web.key_file import read_keys
        from personalized_soups.serving.web.server import listen, load_model, serve

        keys = [] if self.files.api_keys is None else read_keys(self.files.api_keys)
        catalogue = load(catalogue_of(self.loading.base, self.files.dimensions), Catalogue)
        pool = self._pool()
        with ExitStack() as stack:
            listening = stack.enter_context(
                listen(self.host, self.port, has_key=bool(keys), or_any=self.takes_any_port)
            )
            render.say(f"loading {self.loading.base} ...")
            model, files = load_model(
                self.loading.path,
                lambda: ExpertLibrary.open(*self.files.experts),
                on=self.loading.on,
                device=self.loading.device,
                dtype=self.loading.dtype,
                same_base=self.loading.same_base,
            )
            store = self._store(model)
            settings = self.completed_settings(keys, model)
            serve(
                model,
                settings,
                listening,
                files=files,
                store=None if store is None else stack.enter_context(store),
                catalogue=catalogue,
                pool=pool,
                on_started=lambda: self.report_start(model, listening.getsockname()[1], pool),
                on_ending=lambda number: _report_end(settings, number),
            )
        render.say("stopped")

    def completed_settings(self, keys: Sequence[ApiKey], model: SoupModel) -> Settings:
        """Return the settings, completed with the API keys and with the limits that depend on the loaded base.

        Raises:
            UsageError: if the base has fewer positions than `max_context`.
        """
        from personalized_soups.serving.web.server import cache_bytes, context_of

        memory = cache_bytes(model.model.device) if self.cache_memory is None else round(self.cache_memory * 2**30)
        context = context_of(model, self.max_context)
        return replace(
            self.settings,
            rules=replace(self.settings.rules, keys=keys),
            limits=replace(self.settings.limits, max_context=context, cache_bytes=memory),
        )

    def report_start(self, model: SoupModel, port: int, pool: QuestionPool | None = None) -> None:
        """Print the addresses of the server, and open the browser if `opens_browser` is true."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{port}"
        render.say(f"serving {self.settings.base} with {len(model.experts)} experts: {', '.join(model.experts)}")
        render.say(f"  playground   {address}/playground/")
        render.say(f"  OpenAI's API {address}/v1")
        if self.files.profiles is None:
            unused = "; profiles.db exists but is not used" if Path("profiles.db").exists() else ""
            render.say(f"  profiles are not stored; --profiles profiles.db stores them{unused}")
        if pool is not None:
            render.say(f"  asks users up to {min(self.settings.num_questions, len(pool))} of {len(pool)} questions")
        render.say("Ctrl-C stops the server after the running answers")
        if self.opens_browser:
            import webbrowser

            webbrowser.open(f"{address}/playground/")

    def _pool(self) -> QuestionPool | None:
        """Read the question pool, before the model is loaded.

        Raises:
            UsageError: if there is no store to keep the answers.
            SoupError: if the pool cannot be read.
        """
        from personalized_soups.users.answers.pool import QuestionPool

        if self.files.questions is None:
            return None
        if self.files.profiles is None:
            raise UsageError(
                "the answers to questions are kept in a store, but no store is given",
                where="--questions",
                mend="give a store, too, e.g. --profiles profiles.db",
            )
        return QuestionPool.open(self.files.questions)

    def _store(self, model: SoupModel) -> ProfileStore | None:
        from personalized_soups.users.profiles.store import ProfileStore

        if self.files.profiles is None:
            return None
        # the store rejects profiles that this server cannot resolve
        return ProfileStore.open(
            self.files.profiles, check=lambda profile: _check(model, profile), patience=_PATIENCE_SECONDS
        )


def served_name(base: str) -> str:
    """Return the name of the folder or GGUF file if `base` is one, else return the name or model id `base`."""
    return Path(base).resolve().name if Path(base).exists() else base


def started_with(base: str, experts: Sequence[Path], on: Path | None = None) -> list[str]:
    """Return the options of the server that say what is served. The playground shows them so that users can copy them.

    The options are --base, --on and --experts.
    """
    chosen = [] if on is None else ["--on", str(on)]
    return ["--base", base, *chosen, *(word for folder in experts for word in ("--experts", str(folder)))]


def _check(model: SoupModel, profile: Profile) -> None:
    model.resolve(profile)


def _report_end(settings: Settings, num_answers: int) -> None:
    if num_answers:
        render.say(
            f"finishing {num_answers} answer{'s' if num_answers > 1 else ''}, for up to {settings.grace_seconds:g} s; "
            "press Ctrl-C again to stop at once"
        )
