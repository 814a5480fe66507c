"""Small bases of several architectures, experts on all of their layers, and the reference: each answer alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from personalized_soups import SoupModel
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.engine.request import Finish, GenerationRequest, Piece
from personalized_soups.serving.engine.token_sampler import SamplingParams
from tests.experts import write_expert

VOCAB = 320
WINDOW = 5  # tokens of sliding layers; answers are longer than the window
EXPERTS = ("cold", "plain", "warm")
DEADLINE = 100.0  # seconds; only ends a hang, before the timeouts of the suite and of `make mutants` do

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # large: attention is sharp, and every wrong key changes the logits
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# By name: the class of transformers without its ending, and options of its config in addition to the sizes.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, **_MIXED}),
    "gemma3": ("Gemma3", {"head_dim": 8, **_MIXED}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "cohere2": ("Cohere2", _MIXED),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, **_MIXED}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
_NAMES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}


def small_model(name: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """Return a random base."""
    import transformers

    kind, options = BASES[name]
    config_name, model_name = _NAMES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    sizes = {key: value for key, value in _SIZES.items() if kind != "GPT2" or key not in {"num_key_value_heads"}}
    config = getattr(transformers, config_name)(**{**sizes, **options})
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, model_name)._from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # biases start as zeros, which would hide a missing bias
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return model.to(dtype).eval()


def small_soup(
    folder: Path,
    name: str = "llama",
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    tokenizer: Any = None,
) -> SoupModel:
    """Return a random base with three experts on its attention and its MLPs."""
    model = small_model(name, attention=attention, dtype=dtype)
    shapes = {
        module_name: tuple(module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1])
        for module_name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and not any(part in module_name for part in ("lm_head", "embed_out", "router", "project"))
    }
    for seed, expert in enumerate(EXPERTS, 1):
        some = dict(list(shapes.items())[seed % 2 :: seed % 2 + 1])
        write_expert(folder / expert, seed=seed, rank=seed + 1, alpha=2, shapes=some, base=None)
    return SoupModel(model, folder, tokenizer=tokenizer)


def some_weights(random: Any) -> ExpertWeights:
    """Return random weights; `random` has a method `random()`, like the module."""
    if random.random() < 0.2:
        return ExpertWeights()
    return ExpertWeights({name: round(2 * random.random() - 0.5, 3) for name in EXPERTS if random.random() < 0.7})


def true_logits(model: SoupModel, weights: ExpertWeights, tokens: Sequence[int]) -> Tensor:
    """Return the logits after each token of one row alone, `[T, V]`, computed without a cache."""
    with model.mixture([weights]), torch.no_grad():
        logits_TV: Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits_TV


def greedy(model: SoupModel, request: GenerationRequest) -> list[int]:
    """Return the tokens that transformers' generate gives for this request alone, including an end token."""
    ids = torch.tensor([list(request.tokens)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        profiles=[request.weights],
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        pad_token_id=2,
    )
    return [int(token) for token in out[0, len(request.tokens) :]]


def some_request(
    random: Any, *, most: int = 12, longest: int = 20, sampling_params: SamplingParams | None = None
) -> GenerationRequest:
    tokens = [random.randrange(6, VOCAB) for _ in range(random.randint(1, longest))]
    return GenerationRequest(tokens, some_weights(random), random.randint(1, most), sampling_params or SamplingParams())


@dataclass(eq=False)
class DeliveredPieces:
    """The pieces that a batcher delivered, by request."""

    pieces: dict[GenerationRequest, list[Piece]] = field(default_factory=dict)
    on_pieces: Callable[[Sequence[tuple[GenerationRequest, Piece]]], None] = lambda _: None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
        self.on_pieces(pieces)
        with self._changed:
            for request, piece in pieces:
                self.pieces.setdefault(request, []).append(piece)
            self._changed.notify_all()

    def wait_for(self, requests: Sequence[GenerationRequest]) -> None:
        """Wait until every request has its last piece."""
        with self._changed:
            done = self._changed.wait_for(lambda: all(map(self.is_done, requests)), DEADLINE)
        assert done, f"{sum(not self.is_done(request) for request in requests)} of {len(requests)} answers are stuck"

    def is_done(self, request: GenerationRequest) -> bool:
        return any(piece.is_last for piece in self.pieces.get(request, ()))

    def tokens(self, request: GenerationRequest) -> list[int]:
        return [piece.token for piece in self.pieces[request] if piece.token is not None]

    def text(self, request: GenerationRequest) -> str:
        return "".join(piece.text for piece in self.pieces[request])

    def check_ended_once(self, request: GenerationRequest) -> None:
        """Check that the last piece, and no other, ends the answer."""
        assert [piece.is_last for piece in self.pieces[request]] == [False] * (len(self.pieces[request]) - 1) + [True]


class RunningBatcher:
    """A batcher and the pieces that it delivered; closed with the block."""

    def __init__(self, model: SoupModel, limits: Limits | None = None, **options: Any) -> None:
        self.delivered = DeliveredPieces()
        self.batcher = Batcher(model, self.delivered.deliver, limits, **options)

    def __enter__(self) -> RunningBatcher:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.batcher.close(finish=False, timeout=DEADLINE)

    def answer(self, requests: Sequence[GenerationRequest]) -> None:
        self.batcher.submit(requests)
        self.delivered.wait_for(requests)


def check_alone(soup: SoupModel, running: RunningBatcher, requests: Sequence[GenerationRequest]) -> None:
    """Compare answers with those of transformers' generate; in float64 no two tokens are equally likely."""
    for request in requests:
        running.delivered.check_ended_once(request)
        tokens = running.delivered.tokens(request)
        assert tokens == greedy(soup, request)
        last = running.delivered.pieces[request][-1]
        assert last.finish == (Finish.STOP if tokens[-1] == 1 else Finish.LENGTH)
        text = soup.generator.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert running.delivered.text(request) == text


class Forwards:
    """Counts the forward passes of a model; `before` may wait or raise in one.

    Attributes:
        shapes: of the token ids of each pass.
        before: called with the number of each pass.
    """

    def __init__(self, model: SoupModel) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.before: Callable[[int], None] = lambda _: None
        self._handle = model.model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, _: nn.Module, arguments: Any, keywords: Any) -> None:
        self.shapes.append(tuple(keywords["input_ids"].shape))
        self.before(len(self.shapes) - 1)

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
