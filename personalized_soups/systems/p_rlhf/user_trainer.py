"""Train a LoRA adapter and the tables of a user model together, with TRL's trainer and the P-DPO loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from personalized_soups.declare.training import TrainingRecipe, UsersRecipe
from personalized_soups.errors import DeclarationError
from personalized_soups.generation.special_tokens import num_embeddings
from personalized_soups.systems.p_rlhf.p_dpo import TermRows, answer_log_probs, embedded_rows, p_dpo_loss
from personalized_soups.systems.p_rlhf.user_tables import UserTables
from personalized_soups.training.dpo_trainer import REFERENCE_BATCHES, ExpertTrainer
from personalized_soups.training.encoding import EncodedPairs

_TABLES_FILE = "user_tables.safetensors"


class UserTrainer(ExpertTrainer):
    """An ExpertTrainer with soft tokens for each user.

    The reference of the loss is the base without adapter and without soft tokens. Its log-probabilities are computed
    once, before the first step. The tables have their own learning rate and no weight decay. Checkpoints hold them.

    Args:
        recipe: the recipe, which must have `users`.
        model, tokenizer, pairs, config: as for ExpertTrainer.
        users: the ids of the known users, in the order of their numbers, which start at 1. Pairs of other users, and
            pairs without a user, are pairs of the generic user.
        seed: the seed of the tables' initial values.

    Attributes:
        tables: the tables.
    """

    def __init__(
        self, recipe: TrainingRecipe, *, model: Any, tokenizer: Any, pairs: EncodedPairs, config: Any,
        users: Sequence[str], seed: int,
    ) -> None:  # fmt: skip
        assert recipe.users is not None
        self._users: UsersRecipe = recipe.users
        self._numbers = {user: number for number, user in enumerate(users, start=1)}
        _check_positions(recipe, pairs, model)
        config.remove_unused_columns = False  # the user and the reference are columns that TRL does not know
        config.precompute_ref_log_probs = False
        super().__init__(recipe, model=model, tokenizer=tokenizer, pairs=pairs, config=config)
        adapted: Any = self.model
        embed = adapted.get_input_embeddings()
        self.tables = UserTables.drawn(
            self._users.model,
            num_users=len(users),
            num_tokens=self._users.tokens,
            num_clusters=self._users.clusters,
            embed=lambda ids: embed(ids.to(embed.weight.device)),
            vocabulary=num_embeddings(adapted) or len(tokenizer),
            seed=seed,
        ).to(torch.device(self.args.device))
        # As a part of the model, the tables are synchronised between processes, and their gradients are clipped.
        adapted.user_tables = self.tables
        self._sft_weight = recipe.dpo.sft_weight
        self._rows = TermRows(
            pad_id=int(tokenizer.pad_token_id),
            bos_id=tokenizer.bos_token_id,
            max_length=recipe.dpo.max_length,
            num_soft=self._users.tokens,
            alpha=self._users.alpha,
        )
        self.data_collator = self._rows
        rows: Any = self.train_dataset
        self.train_dataset = rows.add_column("reference", self._reference(adapted, rows).tolist())

    def columns(self, pairs: EncodedPairs) -> dict[str, list[Any]]:
        """Return the columns of the data set, with the number of each pair's user."""
        # Without information about users, the user's term would equal the generic user's.
        numbers = {} if self._users.model == "uninformative" else self._numbers
        return pairs.columns() | {"user": [numbers.get(pair.user or "", 0) for pair in pairs.pairs]}

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the P-DPO loss plus the weighted SFT loss, which mixes the terms in the same way."""
        embeds_RTH = embedded_rows(self.model, inputs, self.tables(inputs["users"]))
        log_probs_RT, mask_RT = answer_log_probs(model, embeds_RTH, inputs)
        weights_M, pairs_M = inputs["weights"], inputs["pairs"]
        num_pairs = int(pairs_M[-1]) + 1
        loss, margins_M = p_dpo_loss(
            log_probs_RT.sum(dim=1), inputs["reference"], weights_M, beta=self.beta, num_pairs=num_pairs
        )
        if self._sft_weight:
            chosen_MT, num_chosen_M = log_probs_RT.chunk(2)[0], mask_RT.chunk(2)[0].sum(dim=1)
            loss = loss - self._sft_weight * (weights_M @ chosen_MT.sum(dim=1)) / (weights_M @ num_chosen_M.float())
        # The margins that are reported are the users' own: the first term of each pair.
        is_own_M = torch.cat([pairs_M.new_ones(1), pairs_M[1:] - pairs_M[:-1]]).bool()
        own_B = self.accelerator.gather(margins_M.detach()[is_own_M])
        metrics = self._metrics["train"]
        metrics["rewards/margins"].append(own_B.mean().item())
        metrics["rewards/accuracies"].append((own_B > 0).float().mean().item())
        return (loss, {}) if return_outputs else loss

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Make the optimizer, with the tables in a group of their own."""
        if self.optimizer is not None:
            return self.optimizer
        self.tables.requires_grad_(False)  # so that the groups of the adapter leave them out
        optimizer = super().create_optimizer(*args, **options)
        self.tables.requires_grad_(True)
        rate = self._users.learning_rate_factor * self.args.learning_rate
        optimizer.add_param_group({"params": list(self.tables.parameters()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _reference(self, model: Any, pairs: Any) -> Tensor:
        """Return the log-probabilities [P, 2] of the chosen and the rejected answer of each pair under the base."""
        rows = replace(self._rows, num_soft=0)
        size = REFERENCE_BATCHES * self.args.per_device_train_batch_size
        num_processes = self.accelerator.num_processes
        reference_P2 = torch.zeros(len(pairs), 2, device=self.args.device)
        was_training = model.training
        model.eval()
        with torch.no_grad(), model.disable_adapter(), self.accelerator.autocast():
            for number, start in enumerate(range(0, len(pairs), size)):
                if number % num_processes != self.accelerator.process_index:
                    continue
                batch = pairs.select(range(start, min(start + size, len(pairs))))
                inputs = rows([{**pair, "user": 0} for pair in batch])
                inputs = {name: values.to(self.args.device) for name, values in inputs.items()}
                embeds_RTH = model.get_input_embeddings()(inputs["input_ids"])
                log_probs_RT, _ = answer_log_probs(model, embeds_RTH, inputs)
                reference_P2[start : start + size] = torch.stack(log_probs_RT.sum(dim=1).chunk(2), dim=1)
        model.train(was_training)
        # Each process has filled in its own pairs, and the others are 0, so the sum is exact.
        total: Tensor = self.accelerator.reduce(reference_P2, reduction="sum")
        return total.cpu()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            tables = {name: table.detach().cpu().contiguous() for name, table in self.tables.named_parameters()}
            save_file(tables, Path(output_dir or self.args.output_dir or ".") / _TABLES_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.tables.load_state_dict(load_file(Path(resume_from_checkpoint) / _TABLES_FILE))


def _check_positions(recipe: TrainingRecipe, pairs: EncodedPairs, model: Any) -> None:
    """Raise DeclarationError if the model has too few positions for the longest text with its soft tokens."""
    assert recipe.users is not None
    longest = max(len(ids) for pair in pairs.pairs for ids in pair.cut(pairs.max_length))
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and longest + recipe.users.tokens > most:
        raise DeclarationError(
            f"the longest pair has {longest} tokens, and {recipe.users.tokens} soft tokens come before it, but the "
            f"base takes at most {most} tokens",
            where=recipe.users.place("tokens"),
            mend=f"write fewer soft tokens, or dpo.max_length: {most - recipe.users.tokens}",
        )
