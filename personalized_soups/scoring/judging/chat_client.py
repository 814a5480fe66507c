"""Send chat requests to an endpoint of OpenAI's protocol: several at once, with retries, and each request only once."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from personalized_soups.errors import InputError, RunError, UsageError, check_extra
from personalized_soups.scoring.judging.reply_cache import Reply, ReplyCache, request_key

if TYPE_CHECKING:
    import openai

_LONGEST_WAIT = 60.0
_RETRIED = frozenset({408, 409, 429})  # and every status from 500
_SERVER_ERROR = 500

Request = Mapping[str, Any]
"""The parameters of a chat completion: `model`, `messages`, ..."""


@dataclass(slots=True)
class Traffic:
    """Counts of a client's requests.

    Attributes:
        num_asked: the replies that the endpoint gave.
        num_cached: the replies that the cache had.
        num_retries: the requests that failed and were sent again.
        input_tokens, output_tokens: the tokens of the replies that the endpoint gave.
        cached_input_tokens, cached_output_tokens: the tokens of the replies that the cache had.
        models: the names of the models that replied, as the endpoint gives them.
        fingerprints: the endpoint's names for the states of its system.
    """

    num_asked: int = 0
    num_cached: int = 0
    num_retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cached_output_tokens: int = 0
    models: set[str] = field(default_factory=set)
    fingerprints: set[str] = field(default_factory=set)

    def count(self, reply: Reply, *, is_cached: bool) -> None:
        """Count one reply."""
        self.models.add(reply.model)
        if reply.fingerprint:
            self.fingerprints.add(reply.fingerprint)
        if is_cached:
            self.num_cached += 1
            self.cached_input_tokens += reply.input_tokens
            self.cached_output_tokens += reply.output_tokens
        else:
            self.num_asked += 1
            self.input_tokens += reply.input_tokens
            self.output_tokens += reply.output_tokens


class ChatClient:
    """A client of one endpoint, whose address and key are those of `OPENAI_BASE_URL` and `OPENAI_API_KEY`.

    A context manager: its end closes all connections, also those that still wait for a reply.

    A request is sent again after a lost connection, a timeout, the statuses 408, 409, 429 and those from 500, and after
    a reply that is not a chat completion. The waits double, and `Retry-After` is respected up to a minute.

    Attributes:
        endpoint: the endpoint's address.
        traffic: counts of what was sent so far.

    Args:
        cache: stores the replies. None sends every request.
        concurrency: the number of requests that run at once.
        timeout: seconds until a request is tried again.
        max_retries: how often one request is tried again.
        first_wait: seconds before the first retry.

    Raises:
        UsageError: if the package openai is not installed, or there is no key.
    """

    def __init__(
        self,
        cache: ReplyCache | None = None,
        *,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 6,
        first_wait: float = 1.0,
    ) -> None:
        check_extra("eval", "openai")
        import openai

        # A local server needs no key, but openai's client insists on one.
        key = os.environ.get("OPENAI_API_KEY") or ("none" if os.environ.get("OPENAI_BASE_URL") else None)
        if key is None:
            raise UsageError(
                "neither OPENAI_API_KEY nor OPENAI_BASE_URL is set",
                where="environment",
                mend="export OPENAI_API_KEY=..., or for a server of your own OPENAI_BASE_URL=http://127.0.0.1:8000/v1",
            )
        self._client = openai.OpenAI(api_key=key, timeout=timeout, max_retries=0)
        self.endpoint = str(self._client.base_url)
        self.traffic = Traffic()
        self._cache = cache
        self._concurrency = concurrency
        self._max_retries = max_retries
        self._first_wait = first_wait
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def replies(self, requests: Sequence[Request], *, on_reply: Callable[[int], None] | None = None) -> list[Reply]:
        """Return the reply to each request. Equal requests are sent once, and stored replies are not asked for again.

        Args:
            requests: the parameters of each request.
            on_reply: called with the index of each request whose reply is known.

        Raises:
            UsageError: if the endpoint rejects the key or does not know the model.
            InputError: if the endpoint rejects a request, for example because it is too long.
            RunError: if a request still fails after all retries. Replies that were received are in the cache.
        """
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request_key(self.endpoint, request), []).append(place)
        found: dict[int, Reply] = {}
        for key, reply, is_cached in self._known_and_sent({key: requests[own[0]] for key, own in places.items()}):
            self.traffic.count(reply, is_cached=is_cached)
            for place in places[key]:
                found[place] = reply
                if on_reply is not None:
                    on_reply(place)
        return [found[place] for place in range(len(requests))]

    def _known_and_sent(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply, bool]]:
        missing = {}
        for key, request in requests.items():
            reply = None if self._cache is None else self._cache.get(key)
            if reply is None:
                missing[key] = request
            else:
                yield key, reply, True
        with self._sent(missing) as sent:
            for future in as_completed(sent):
                reply = future.result()
                if self._cache is not None:
                    self._cache.add(sent[future], reply)
                yield sent[future], reply, False

    @contextmanager
    def _sent(self, requests: Mapping[str, Request]) -> Iterator[dict[Future[Reply], str]]:
        """Send the requests in threads. The end of the block cancels those that have not begun, and ends all waits."""
        stop = threading.Event()
        executor = ThreadPoolExecutor(self._concurrency, thread_name_prefix="judge")
        try:
            yield {executor.submit(self._reply, request, stop): key for key, request in requests.items()}
        finally:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)

    def _reply(self, request: Request, stop: threading.Event) -> Reply:
        """Return the reply to one request, after retries."""
        import openai

        wait = self._first_wait
        for is_last in [False] * self._max_retries + [True]:
            try:
                return _checked(self._client.chat.completions.create(**request), request)
            except (_MalformedReplyError, json.JSONDecodeError) as error:
                failure: Exception = error
                after = None
            except openai.APIStatusError as error:
                if error.status_code not in _RETRIED and error.status_code < _SERVER_ERROR:
                    raise self._rejected(error, request) from error
                failure, after = error, _retry_after(error)
            except openai.APIError as error:  # no connection, a timeout, or a body that ended early
                failure, after = error, None
            if is_last:
                break
            with self._lock:
                self.traffic.num_retries += 1
            # Clients that failed together should not come back together.
            pause = after if after is not None else wait * random.uniform(0.5, 1.0)
            if stop.wait(min(pause, _LONGEST_WAIT)):
                break
            wait = min(2 * wait, _LONGEST_WAIT)
        raise RunError(
            f"the endpoint gave no reply in {self._max_retries + 1} tries: {_described(failure)}",
            where=self.endpoint,
            mend="check that the server runs, or lower the judge's `concurrency`; run again: replies that arrived are "
            "kept and not asked for again",
        ) from failure

    def _rejected(self, error: openai.APIStatusError, request: Request) -> UsageError | InputError:
        what = f"the endpoint rejects the request with status {error.status_code}: {_described(error)}"
        if error.status_code in {401, 403}:
            return UsageError(what, where=self.endpoint, mend="set OPENAI_API_KEY to a key of this endpoint")
        if error.status_code == 404:
            return UsageError(
                what,
                where=self.endpoint,
                mend=f"check OPENAI_BASE_URL, which often ends in /v1, and the model's name {request['model']!r}",
            )
        return InputError(
            what, where=self.endpoint, mend="check the judge's model, `token_limit`, `temperature` and `max_tokens`"
        )


class _MalformedReplyError(Exception):
    """A reply that is not a chat completion."""


def _checked(completion: object, request: Request) -> Reply:
    """Return the reply in a completion. The client passes on whatever JSON, or even text, the endpoint sends."""
    try:
        choice = completion.choices[0]  # type: ignore[attr-defined]
        text, usage = choice.message.content, getattr(completion, "usage", None)
        model = str(getattr(completion, "model", None) or request["model"])
        finish = choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        raise _MalformedReplyError(f"the reply is not a chat completion: {str(completion)[:200]!r}") from None
    if not isinstance(text, str | None):
        raise _MalformedReplyError(f"the reply's content is not a text: {text!r}")
    return Reply(
        text=text or "",
        model=model,
        fingerprint=getattr(completion, "system_fingerprint", None),
        is_cut=finish == "length",
        input_tokens=int(getattr(usage, "prompt_tokens", 0) or 0),
        output_tokens=int(getattr(usage, "completion_tokens", 0) or 0),
    )


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Return the seconds that the endpoint asks a client to wait, or None."""
    try:
        seconds = float(error.response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _described(error: Exception) -> str:
    """Return an error's message in one line, with the cause that openai's client hides."""
    message = str(error) or type(error).__name__
    cause = error.__cause__
    full = f"{message} ({cause})" if cause is not None and str(cause) and str(cause) not in message else message
    return " ".join(full.split())[:500]
