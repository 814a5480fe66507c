"""The tiny base model: a Llama of about a million parameters and its tokenizer, trained from scratch on the corpus.

The matrices are trained by Muon and the other parameters by AdamW (the best of the recipes measured at this size), with
cosine decay, in float32, in one process. Only the tokens of answers have a loss.

Shapes: B = documents in a group, T = tokens of its longest document, V = vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from personalized_soups.tiny.corpus import Document, documents

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
IGNORED = -100  # the label of a token without loss
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """The settings that determine the tiny base."""

    seed: int = 0  # random seed of corpus and initial weights
    vocab_size: int = 1024  # tokens of the tokenizer
    hidden_size: int = 128  # width of the residual stream
    num_heads: int = 2  # head_dim 64: the smallest that vLLM's CPU attention supports
    num_layers: int = 4  # transformer blocks
    intermediate_size: int = 384  # width of the MLP
    steps: int = 2000  # optimizer steps
    batch_size: int = 48  # documents in a step
    num_groups: int = 3  # groups of similar length in a step, each padded to its longest document
    matrix_rate: float = 0.02  # Muon's peak learning rate
    other_rate: float = 3e-3  # AdamW's peak learning rate
    warmup_steps: int = 50  # steps of linear warm-up
    tokenizer_documents: int = 8000  # documents that the tokenizer is trained on
    max_positions: int = 512  # longest context, in tokens


def build_tokenizer(recipe: BaseRecipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus and return it. It has a chat template and pads on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{entry.prompt} {entry.answer}" for entry in documents(recipe.tokenizer_documents, recipe.seed))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=recipe.max_positions,
    )


def build_model(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, float32 on the CPU, with weights drawn from the recipe's seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def encode(entries: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Return the token ids of each document and the number of tokens of its question, which have no loss."""
    questions = tokenizer([f"{USER}{entry.prompt}{ASSISTANT}" for entry in entries])["input_ids"]
    answers = tokenizer([f"{entry.answer}{END}" for entry in entries])["input_ids"]
    return [(question + answer, len(question)) for question, answer in zip(questions, answers, strict=True)]


def batches(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield the documents of each step as `num_groups` pairs (ids_BT, labels_BT), int64 on the CPU.

    A group contains documents of similar length, which saves padding. A step contains documents of all lengths, so that
    no step pulls the model towards short or long answers.
    """
    stream = documents(recipe.steps * recipe.batch_size, recipe.seed)
    width = math.ceil(recipe.batch_size / recipe.num_groups)
    while step := list(islice(stream, recipe.batch_size)):
        encoded = sorted(encode(step, tokenizer), key=lambda pair: len(pair[0]))
        yield [
            _padded(encoded[start : start + width], tokenizer.pad_token_id) for start in range(0, len(encoded), width)
        ]


def _padded(group: Sequence[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in group)
    ids_BT = torch.full((len(group), width), pad)
    labels_BT = torch.full((len(group), width), IGNORED)
    for row, (ids, start) in enumerate(group):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, start : len(ids)] = torch.tensor(ids[start:])
    return ids_BT, labels_BT


def train(
    recipe: BaseRecipe,
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM,
    *,
    max_steps: int | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train `model` in place and return the loss of every step (nats per answer token).

    If `max_steps` is given, the training stops early but keeps the schedule of a full run. The losses then equal the
    first losses of a full run.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _decay(step, recipe)) for optimizer in optimizers
    ]
    model.train()
    losses: list[float] = []
    for groups in islice(batches(recipe, tokenizer), max_steps):
        num_tokens = sum(int((labels_BT != IGNORED).sum()) for _, labels_BT in groups)
        total = 0.0
        for ids_BT, labels_BT in groups:
            logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            (loss / num_tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(total / num_tokens)
        on_step(len(losses), losses[-1])
    model.eval()
    return losses


def _decay(step: int, recipe: BaseRecipe) -> float:
    """Return the learning rate as a share of its peak: a linear warm-up, then a cosine decay to 2%."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = min(1.0, (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
