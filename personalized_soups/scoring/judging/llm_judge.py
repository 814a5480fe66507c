"""`LlmJudge`: ask a language model which of two answers follows a criterion better, in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

from personalized_soups.declare.judge import LlmJudgeSpec
from personalized_soups.declare.preference_data import Verdict
from personalized_soups.scoring.judging.chat_client import ChatClient, Request, Traffic
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement, swapped_verdict
from personalized_soups.scoring.judging.reply_cache import Reply, ReplyCache
from personalized_soups.scoring.judging.template import JudgeTemplate
from personalized_soups.scoring.judging.verdict import read_verdict


class LlmJudge:
    """A judge that asks a model behind an endpoint of OpenAI's protocol. A context manager.

    Each comparison is two requests, one for each order of the answers. A comparison of equal answers is a tie and is
    not sent. A reply without a verdict is counted and never guessed.

    Attributes:
        traffic: the numbers of requests, retries and tokens so far.
        num_cut: the replies that reached `max_tokens` and held no verdict.

    Args:
        spec: the model and the limits.
        template: the text of a question.
        cache: the file that stores replies. None stores none.

    Raises:
        UsageError: if the package openai is missing, or the environment names neither a key nor an endpoint.
        RunError, FileFormatError: if the cache cannot be used.
    """

    def __init__(self, spec: LlmJudgeSpec, template: JudgeTemplate, *, cache: Path | None = None) -> None:
        self._spec = spec
        self._template = template
        self.num_cut = 0
        with ExitStack() as stack:
            store = None if cache is None else stack.enter_context(ReplyCache(cache))
            client = ChatClient(
                store,
                concurrency=spec.concurrency,
                timeout=spec.timeout,
                max_retries=spec.max_retries,
                first_wait=spec.first_wait,
            )
            self._client = stack.enter_context(client)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def traffic(self) -> Traffic:
        """The numbers of requests, retries and tokens so far."""
        return self._client.traffic

    @property
    def cost(self) -> float | None:
        """The price of the replies that were not in the cache, in US dollars. None without prices."""
        prices, traffic = self._spec.prices, self.traffic
        return None if prices is None else prices.cost(traffic.input_tokens, traffic.output_tokens)

    @property
    def settings(self) -> dict[str, object]:
        """The model, its endpoint, the parameters of a request, and the digest of the template."""
        asked = self._spec.model_dump(
            mode="json", include={"kind", "model", "temperature", "seed", "max_tokens"}, exclude_none=True
        )
        template = str(blake3(self._template.text.encode()).hexdigest())
        return {**asked, "endpoint": self._client.endpoint, "template": template}

    def compare(
        self, comparisons: Sequence[ComparedAnswers], *, on_done: Callable[[int], None] | None = None
    ) -> list[Judgement]:
        """Return the judgement of each comparison, in their order.

        Args:
            comparisons: the answers to compare.
            on_done: called with the number of finished comparisons.

        Raises:
            UsageError: if the endpoint rejects the key or does not know the model.
            InputError: if the endpoint rejects a request.
            RunError: if the endpoint still fails after all retries. Another call asks only for what is missing.
        """
        differing = [index for index, each in enumerate(comparisons) if each.first != each.second]
        requests = [
            self._request(each) for index in differing for each in (comparisons[index], comparisons[index].swapped())
        ]
        known, done = [0] * len(differing), len(comparisons) - len(differing)

        def on_reply(place: int) -> None:
            nonlocal done
            known[place // 2] += 1
            done += known[place // 2] == 2
            if on_done is not None:
                on_done(done)

        replies = self._client.replies(requests, on_reply=on_reply)
        judgements = [Judgement("tie", ("tie", "tie"))] * len(comparisons)
        for place, index in enumerate(differing):
            given, swapped = map(self._verdict, replies[2 * place : 2 * place + 2])
            judgements[index] = Judgement.of_orders(given, swapped_verdict(swapped))
        return judgements

    def _request(self, comparison: ComparedAnswers) -> Request:
        spec = self._spec
        request: dict[str, object] = {
            "model": spec.model,
            "messages": [{"role": "user", "content": self._template.question(comparison)}],
            spec.token_limit: spec.max_tokens,
        }
        if spec.temperature is not None:
            request["temperature"] = spec.temperature
        if spec.seed is not None:
            request["seed"] = spec.seed
        return request

    def _verdict(self, reply: Reply) -> Verdict:
        # The last line of a reply that was cut may be the beginning of a sentence: "A" of "A tie is ..."
        verdict: Verdict = "unparsed" if reply.is_cut else read_verdict(reply.text)
        self.num_cut += reply.is_cut
        return verdict
