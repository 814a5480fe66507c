"""The names that a base's tensors get when transformers loads the files. No tensor is read.

The names come from transformers' own tables. They depend on the class that loads the files: AutoModelForCausalLM
extracts the language model of a multimodal checkpoint. A table belongs to a model, so this module builds a model of
each class on torch's device `meta`, which takes no memory. Importing transformers is slow, so this module is used only
if the names alone do not decide.

Source: transformers.core_model_loading.convert_and_load_state_dict_in_model (5.23), transformers.conversion_mapping.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# An adapter's configuration does not name the class of its base. These classes load nearly all bases of adapters.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModel",
)


@dataclass(frozen=True, eq=False)
class Renaming:
    """The names of the tensors in memory and in the files, for one class that loads the files.

    Attributes:
        stored_by_name: for each tensor in memory that is an unchanged tensor of the files, its name in the files.
        made_of: for each tensor in memory that is computed from tensors of the files, their names in the files.
        tables: transformers' tables, for names in files that other versions of transformers wrote.
    """

    stored_by_name: Mapping[str, str]
    made_of: Mapping[str, tuple[str, ...]]
    tables: _Tables

    def stored(self, tensor: str) -> str | None:
        """Return the name of a tensor in the files, or None if it is not an unchanged tensor of the files.

        Args:
            tensor: its name in memory, or in files that other versions of transformers wrote.
        """
        if tensor in self.stored_by_name:
            return self.stored_by_name[tensor]
        if tensor in self.made_of:
            return None
        name, is_converted = self.tables(tensor)
        return None if is_converted else self.stored_by_name.get(name)


def renamings(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> tuple[Renaming, ...]:
    """Return one renaming for each class of transformers that can load a base.

    Args:
        folder: the base's folder, with config.json.
        config: the contents of config.json.
        names: the names of the tensors in the files.
    """
    if not isinstance(config.get("model_type"), str):
        return ()
    names = list(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about the configuration do not matter here
        return tuple(_renaming(model, names) for model in _models(folder, config))


class _Tables:
    """The rules by which transformers renames and converts the tensors of the files of one model."""

    def __init__(self, model: Any) -> None:
        from transformers import conversion_mapping, core_model_loading

        transforms = conversion_mapping.get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, core_model_loading.WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, core_model_loading.WeightConverter)]
        self._rename = core_model_loading.rename_source_key
        self._prefix = model.base_model_prefix
        self._tensors = model.state_dict()

    def __call__(self, name: str) -> tuple[str, bool]:
        """Return the new name of a tensor, and whether transformers computes the tensor instead of copying it."""
        renamed, pattern = self._rename(name, self._renamings, self._converters)
        return renamed, pattern is not None

    def loaded_as(self, name: str) -> tuple[list[str], bool]:
        """Return the tensors in memory that come from a tensor of the files, and whether they are computed from it."""
        tensors = self._tensors
        renamed, pattern = self._rename(name, self._renamings, self._converters, self._prefix, tensors)
        if renamed not in tensors and name in tensors:
            renamed, pattern = self._rename(name, [], [], self._prefix, tensors)
        if pattern is None:
            return ([renamed] if renamed in tensors else []), False
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        first, *others = converter.target_patterns
        targets = [renamed, *(renamed.replace(first, other) for other in others)]
        return [target for target in targets if target in tensors], True


def _renaming(model: Any, names: Sequence[str]) -> Renaming:
    from transformers.core_model_loading import dot_natural_key

    tables = _Tables(model)
    stored: dict[str, str] = {}
    made_of: dict[str, list[str]] = {}
    # in the order in which transformers loads them, because some tables depend on the names before
    for name in sorted(names, key=dot_natural_key):
        targets, is_computed = tables.loaded_as(name)
        for target in targets:
            if is_computed or target in stored:
                made_of.setdefault(target, []).append(name)
            else:
                stored[target] = name
    # a tensor that comes from two tensors of the files is not a copy of either
    for target in made_of.keys() & stored.keys():
        made_of[target].append(stored.pop(target))
    return Renaming(stored, {target: tuple(sorted(own)) for target, own in made_of.items()}, tables)


def _models(folder: Path, config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a model of each class on the device `meta`. Classes that cannot build the model are skipped."""
    import torch
    import transformers

    try:
        loaded = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # the model has its own code or needs a newer version of transformers
        return
    seen: set[type] = set()
    for name in (*map(str, config.get("architectures") or ()), *_AUTO_CLASSES):
        try:
            model_class: Any = getattr(transformers, name)
            with torch.device("meta"):
                model = (model_class.from_config if name in _AUTO_CLASSES else model_class._from_config)(loaded)
        except Exception:  # the class does not exist, or is not for this kind of model
            continue
        if type(model) not in seen:
            seen.add(type(model))
            yield model
