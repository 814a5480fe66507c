"""The tokens of one answer while transformers is still generating it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class TokenStream:
    """Runs a generation in a thread and iterates over its new tokens; usable once.

    It is transformers' streamer (`put`, `end`) and, so that a reader who stops early is not waited for, one of its
    stopping criteria too.

    Args:
        generate: called in the thread with this object; a fault of it is raised to the reader.
    """

    def __init__(self, generate: Callable[[TokenStream], Any]) -> None:
        self._tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        self._is_prompt = True
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(generate,), daemon=True)

    def put(self, value: Tensor) -> None:
        """Take the next token (int64); the first call brings the prompt, which is left out."""
        if not self._is_prompt:
            self._tokens.put(int(value.reshape(-1)[0]))
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is left to do: the thread's end tells."""

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Say for each row whether to stop: where the reader has gone."""
        return input_ids.new_full((input_ids.shape[0],), int(self._stopped.is_set())).bool()

    def __iter__(self) -> Iterator[int]:
        """Yield each new token as it comes."""
        self._thread.start()
        try:
            while (token := self._tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            self._stopped.set()
            self._thread.join()

    def _run(self, generate: Callable[[TokenStream], Any]) -> None:
        try:
            generate(self)
            self._tokens.put(None)
        except BaseException as fault:  # it is the reader's, who is in another thread
            self._tokens.put(fault)
