"""What the trainings of all kinds have in common: arguments of TRL's trainers, LoRA's configuration, and silence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from peft import LoraConfig, TaskType
from transformers import TrainingArguments

from personalized_soups.declare.training import AdapterRecipe
from personalized_soups.generation.quiet import quiet_transformers

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
ConfigT = TypeVar("ConfigT", bound=TrainingArguments)

_CHECKPOINTS_KEPT = 2  # two, because a kill may leave the last checkpoint incomplete


def num_processes() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def common_arguments(
    recipe: AdapterRecipe, *, partial: Path, device: torch.device, model_dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Return the arguments that the configurations of all of TRL's trainers take.

    Args:
        recipe: the recipe.
        partial: the folder of the checkpoints.
        device: the device to train on.
        model_dtype: the dtype of the base in memory.
        seed: the random seed of the training.
    """
    optimizer, on_cpu = recipe.optimizer, device.type == "cpu"
    return {
        "output_dir": str(partial),
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and num_processes() > 1 else None,
        "ddp_find_unused_parameters": False,
        "bf16": model_dtype == torch.bfloat16,
        "fp16": model_dtype == torch.float16,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "lr_scheduler_type": _SCHEDULES[optimizer.schedule],
        "warmup_steps": optimizer.warmup_steps,
        "max_grad_norm": optimizer.max_grad_norm,
        "num_train_epochs": optimizer.epochs or 1,
        "max_steps": optimizer.max_steps or -1,
        "per_device_train_batch_size": optimizer.batch_size,
        "gradient_accumulation_steps": optimizer.gradient_accumulation,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": _CHECKPOINTS_KEPT,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": not on_cpu,
        "seed": seed,
    }


def one_gpu(config: ConfigT) -> ConfigT:
    """Return a configuration that uses one GPU in each process.

    With several GPUs in one process, Trainer would use DataParallel, which TRL rejects.
    """
    if num_processes() == 1 and config.n_gpu > 1:
        config._n_gpu = 1
    return config


def lora_config(recipe: AdapterRecipe, task: TaskType = TaskType.CAUSAL_LM) -> LoraConfig:
    """Return PEFT's LoRA configuration for a recipe."""
    lora = recipe.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type] # PEFT accepts floats
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        use_rslora=lora.rslora,
        bias="none",
        task_type=task,
    )


@contextmanager
def quiet_training() -> Iterator[None]:
    """Hide the progress bars and messages of transformers, datasets and TRL while the block runs."""
    were_disabled = datasets.are_progress_bars_disabled()
    tqdm = os.environ.get("TQDM_DISABLE")
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with quiet_transformers():
            yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
        if tqdm is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = tqdm
