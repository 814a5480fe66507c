"""TRL's DPOTrainer, set up from a recipe: silent, exactly resumable, with pairs of like length in a batch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from peft import LoraConfig, TaskType
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import RunError
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.training import checkpoints
from personalized_soups.training.encoding import EncodedPairs
from personalized_soups.training.order import LikeLengthOrder
from personalized_soups.training.progress import StepReport, TrainingProgress
from personalized_soups.training.shared_basis import freeze_basis, set_shared_basis

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_CHECKPOINTS_KEPT = 2  # the last one may be cut short by a kill
_REFERENCE_BATCHES = 4  # the reference pass keeps no activations: larger batches fit


class ExpertTrainer(DPOTrainer):
    """DPOTrainer with our order of the pairs and without what it does beside the training.

    Args:
        recipe: of the side that is trained, overrides put in.
        model: the base; it is wrapped in place.
        tokenizer: the base's.
        pairs: the pairs as token ids.
        config: from `trainer_config`.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: EncodedPairs,
        config: DPOConfig,
    ) -> None:
        self._recipe = recipe
        self._order: LikeLengthOrder | None = None
        # TRL turns off all dropout or none; the base's own stays off and LoRA's, added later, is the recipe's.
        disable_dropout_in_model(model)
        super().__init__(
            model,
            args=config,
            # In memory and without a cache on disk: nothing of one training is met by another.
            train_dataset=datasets.Dataset.from_dict(pairs.columns()),
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_Epochs(self))
        if recipe.basis == "shared":
            set_shared_basis(self.model, recipe.basis_seed)

    def set_epoch(self, epoch: int) -> None:
        """Tell the order of the pairs which epoch begins."""
        if self._order is not None:
            self._order.epoch = epoch

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Make the optimizer; a shared basis, which a loaded checkpoint has made trainable, is frozen before."""
        if self._recipe.basis == "shared":
            freeze_basis(self.model)
        return super().create_optimizer(*args, **options)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write no model card: expert.json says what there is to say."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """Return the dataset as it is: encode_pairs has made TRL's token ids."""
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing to anybody."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengthOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        answers = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
        longest = [max(len(chosen), len(rejected)) for chosen, rejected in answers]
        lengths = [len(prompt) + answer for prompt, answer in zip(rows["prompt_ids"], longest, strict=True)]
        self._order = LikeLengthOrder(lengths, batch_size=self.args.per_device_train_batch_size, seed=self.args.seed)
        return self._order


class _Epochs(TrainerCallback):
    def __init__(self, trainer: ExpertTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A training that goes on within an epoch has its fraction here.
        self._trainer.set_epoch(math.floor(state.epoch or 0))


class Reporting(TrainerCallback):
    """Hands every step's figures to a TrainingProgress, from the first process only."""

    def __init__(self, side: str, progress: TrainingProgress) -> None:
        self._side, self._progress = side, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report where the steps begin."""
        if state.is_world_process_zero:
            self._progress.begin(self._side, step=state.global_step, num_steps=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Report a step.

        Raises:
            RunError: if the loss is no number any more.
        """
        if not logs or "loss" not in logs:
            return  # the summary at the end
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise RunError(
                f"the training diverged: at step {state.global_step} the loss is {logs['loss']} "
                f"and the gradient's norm {logs.get('grad_norm')}",
                where=self._side,
                mend="lower optimizer.learning_rate in the recipe",
            )
        if state.is_world_process_zero:
            report = StepReport(
                step=state.global_step,
                num_steps=state.max_steps,
                loss=logs["loss"],
                margin=logs["rewards/margins"],
                accuracy=logs["rewards/accuracies"],
                learning_rate=logs["learning_rate"],
            )
            self._progress.advance(self._side, report)


class Marking(TrainerCallback):
    """Marks every checkpoint once all processes have written their part of it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint of this step."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoints.mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def trainer_config(
    recipe: TrainingRecipe, *, partial: Path, device: torch.device, num_pairs: int, model_dtype: torch.dtype, seed: int
) -> DPOConfig:
    """Return TRL's configuration of a recipe.

    The reference log-probabilities are computed once, before the steps, where pairs are seen more than once (and by
    one process: TRL keeps them in a file of its own); else with each step, which costs the same.
    """
    optimizer = recipe.optimizer
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    seen_per_step = optimizer.batch_size * optimizer.gradient_accumulation * num_processes
    epochs = optimizer.epochs or (optimizer.max_steps or 0) * seen_per_step / num_pairs
    on_cpu = device.type == "cpu"
    config = DPOConfig(
        output_dir=str(partial),
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and num_processes > 1 else None,
        ddp_find_unused_parameters=False,
        bf16=model_dtype == torch.bfloat16,
        fp16=model_dtype == torch.float16,
        gradient_checkpointing=recipe.gradient_checkpointing,
        loss_type=["sigmoid", "sft"] if recipe.dpo.sft_weight else ["sigmoid"],
        loss_weights=[1.0, recipe.dpo.sft_weight] if recipe.dpo.sft_weight else [1.0],
        beta=recipe.dpo.beta,
        max_length=recipe.dpo.max_length,
        disable_dropout=False,
        precompute_ref_log_probs=num_processes == 1 and epochs > 1,
        precompute_ref_batch_size=_REFERENCE_BATCHES * optimizer.batch_size,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        lr_scheduler_type=_SCHEDULES[optimizer.schedule],
        warmup_steps=optimizer.warmup_steps,
        max_grad_norm=optimizer.max_grad_norm,
        num_train_epochs=optimizer.epochs or 1,
        max_steps=optimizer.max_steps or -1,
        per_device_train_batch_size=optimizer.batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=_CHECKPOINTS_KEPT,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=not on_cpu,
        seed=seed,
    )
    if num_processes == 1 and config.n_gpu > 1:
        config._n_gpu = 1  # several GPUs and one process: Trainer would use DataParallel, which TRL refuses
    return config


def lora_config(recipe: TrainingRecipe) -> LoraConfig:
    """Return PEFT's configuration of a recipe."""
    lora = recipe.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type] # floats are taken
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        use_rslora=lora.rslora,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


@contextmanager
def quiet_training() -> Iterator[None]:
    """Show none of the bars and notes of transformers, datasets and TRL within the block."""
    shown = datasets.are_progress_bars_disabled()
    tqdm = os.environ.get("TQDM_DISABLE")
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with quiet_transformers():
            yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
        if tqdm is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = tqdm
