"""Iterate over the tokens of an answer while transformers generates it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class TokenStream:
    """Runs a generation in a thread and iterates over the new tokens. An object can be iterated over once.

    transformers calls the object as a streamer (`put`, `end`) and as a stopping criterion (`__call__`). If the reader
    stops early, the generation ends with the next token.

    Args:
        generate: called in the thread with this object. Its errors are raised in the reader's thread.
    """

    def __init__(self, generate: Callable[[TokenStream], Any]) -> None:
        self._tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        self._is_prompt = True
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(generate,), daemon=True)

    def put(self, value: Tensor) -> None:
        """Take the next token (int64). transformers passes the prompt in the first call, which is ignored."""
        if not self._is_prompt:
            self._tokens.put(int(value.reshape(-1)[0]))
        self._is_prompt = False

    def end(self) -> None:
        """Do nothing. The thread reports its own end, also after an error."""

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Return, for each row, whether the reader has stopped."""
        return input_ids.new_full((input_ids.shape[0],), int(self._stopped.is_set())).bool()

    def __iter__(self) -> Iterator[int]:
        """Yield each new token as soon as it is generated."""
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
        except BaseException as fault:  # raised in the reader's thread
            self._tokens.put(fault)
