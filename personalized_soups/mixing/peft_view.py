"""A SoupModel with the type and methods of a PeftModel, for code that expects a PeftModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from peft import PeftConfig, PeftModel
from torch import nn

from personalized_soups.declare.expert_weights import ProfileLike
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError
from personalized_soups.mixing.batch_rows import profile_per_prompt, rows_per_prompt

if TYPE_CHECKING:
    from personalized_soups.mixing.model import SoupModel

# PEFT's name for "no adapter" in `adapter_names`.
_BASE = "__base__"


class _RejectedCalls:
    """The methods of a PeftModel that create, save or merge adapters. A PeftView rejects them."""

    def add_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Raise UsageError, because experts are trained elsewhere."""
        raise _rejected(
            "add_adapter",
            "train with psoups train, or with PEFT on the bare base, and call load_adapter(folder, name)",
        )

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Raise UsageError, because the experts are stored on disk already."""
        raise _rejected("save_pretrained", "copy the experts' folders, or write a soup of them with psoups merge")

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """Raise UsageError, because all users share the model in memory."""
        raise _rejected("merge_and_unload", "write a merged model with psoups merge, or use LiveAdapter for one soup")


class PeftView(_RejectedCalls, PeftModel):
    """A SoupModel with the type and methods of a PeftModel that has loaded all experts. Nothing is copied.

    The adapters are the experts and the named profiles of the SoupModel. With `adapter_names`, each row of a batch has
    its own adapter, as in PEFT, but the batch costs no more than with a single adapter. `add_weighted_adapter` stores
    a profile, which is only a few numbers. Methods that train, save or merge adapters raise UsageError.

    Args:
        soup: the SoupModel.

    Example:
        >>> model = PeftView(SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu"))
        >>> model.add_weighted_adapter(["friendly", "concise"], [0.6, 0.4], "soup", combination_type="cat")
        >>> model.set_adapter("soup")
        >>> model.active_adapters
        ['soup']
    """

    def __init__(self, soup: SoupModel) -> None:
        # PeftModel.__init__ is not called, because it would wrap every layer.
        nn.Module.__init__(self)
        self.peft_type = "LORA"
        # PeftModel's own methods read these attributes.
        self.special_peft_forward_args = {"adapter_names"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        # nn.Module would register `soup` as a second child module next to `base_model`.
        object.__setattr__(self, "soup", soup)
        self._tuner = _Tuner(soup)
        self.base_model = self._tuner

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are used while no mixture is set."""
        served = self.soup.served
        # Compared by identity, because two named profiles may have equal weights.
        named = [name for name, weights in self.soup.profiles.items() if weights is served.weights]
        return named[:1] or served.experts

    @property
    def active_adapter(self) -> Any:  # type: ignore[override]
        """The active adapter's name if exactly one adapter is active, else the list of the active adapters' names."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def forward(self, *arguments: Any, adapter_names: Sequence[str] | None = None, **keywords: Any) -> Any:
        """Run the model's forward pass. `adapter_names` gives each row its adapter; `__base__` means no adapter."""
        if adapter_names is None:
            return self.soup.model(*arguments, **keywords)
        with self.soup.mixture(_profiles_of(adapter_names)):
            return self.soup.model(*arguments, **keywords)

    def generate(self, *arguments: Any, adapter_names: Sequence[str] | None = None, **keywords: Any) -> Any:
        """Run the model's own generate. `adapter_names` gives each prompt its adapter, as in `forward`."""
        if adapter_names is None:
            return self.soup.model.generate(*arguments, **keywords)
        inputs: Any = arguments[0] if arguments else keywords.get("input_ids", keywords.get("inputs_embeds"))
        profiles = profile_per_prompt(list(inputs), _profiles_of(adapter_names))
        config = keywords.get("generation_config") or self.soup.model.generation_config
        with self.soup.mixture(profiles, rows_each=rows_per_prompt(keywords, config)):
            return self.soup.model.generate(*arguments, **keywords)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = True) -> None:
        """Make an adapter active. If a list of experts is given, their sum becomes active.

        Raises:
            UsageError: if an adapter is unknown.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._adapters_disabled = False
        if len(names) == 1 and names[0] in self.soup.profiles:
            self.soup.served.set(names[0])
        else:
            self.soup.served.set_adapters(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Use the bare base within the block."""
        self._adapters_disabled = True
        try:
            # Other threads wait until a mixture has ended; with `served.disable` they would use the bare base, too.
            with self.soup.mixture(None):
                yield
        finally:
            self._adapters_disabled = False

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add the weighted sum of the experts' deltas as a named profile. The sum is that of PEFT's `cat`.

        Raises:
            DeclarationError: if an expert is unknown, or a weight is not a finite number.
            UsageError: if `combination_type` is not `cat`, options are given, an expert is called `adapter_name`, or
                the numbers of adapters and weights differ.
        """
        if combination_type != "cat" or options:
            request = ", ".join([combination_type, *options])
            raise UsageError(
                f"PeftView supports only combination_type='cat' without options, but {request} was requested",
                where="combination_type",
                mend="use combination_type='cat' without options, or merge with another method: psoups merge",
            )
        if len(adapters) != len(weights):
            raise UsageError(
                f"the number of weights is {len(weights)}, but the number of adapters is {len(adapters)}",
                where="weights",
                mend="give one weight for each adapter",
            )
        # PEFT can sum any adapters, so opposed sides are allowed here.
        table = dict(zip(adapters, map(float, weights), strict=True))
        self.soup.profiles.add(Profile(user=adapter_name, weights=table, allow_opposed=True))

    def load_adapter(  # type: ignore[override]
        self, model_id: str | Path, adapter_name: str, *_: Any, **__: Any
    ) -> None:
        """Add the LoRA adapter in the folder `model_id` as an expert. Further options of PEFT have no effect.

        Raises:
            SoupError: in the same cases as `SoupModel.experts.add`.
        """
        self.soup.experts.add(model_id, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an expert or a named profile.

        Raises:
            UsageError: if there is no adapter of that name.
        """
        if adapter_name in self.soup.profiles:
            # A profile that is removed must not stay the served profile.
            if self.active_adapters == [adapter_name]:
                self.soup.served.set(None)
            self.soup.profiles.remove(adapter_name)
        else:
            self.soup.experts.remove(adapter_name)

    def get_base_model(self) -> Any:
        """Return the transformers model, with wrapped layers."""
        return self.soup.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable parameters, which is 0 here, and the number of the base's parameters."""
        return 0, sum(parameter.numel() for parameter in self.soup.model.parameters())


class _Tuner(nn.Module):
    """The `base_model` of a PeftView, with the attributes `model` and `peft_config` that PEFT's own has."""

    def __init__(self, soup: SoupModel) -> None:
        super().__init__()
        object.__setattr__(self, "soup", soup)
        self.model = soup.model

    @property
    def peft_config(self) -> Mapping[str, PeftConfig]:
        """The configuration of each expert, by name."""
        configs = {name: PeftConfig.from_pretrained(str(expert.folder)) for name, expert in self.soup.experts.items()}
        # Nothing is trained here.
        for config in configs.values():
            config.inference_mode = True
        return configs

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the model's forward pass."""
        return self.model(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _profiles_of(adapter_names: Sequence[str]) -> list[ProfileLike]:
    return [None if name == _BASE else name for name in adapter_names]


def _rejected(call: str, mend: str) -> UsageError:
    return UsageError(f"a PeftView does not support {call}", where=f"PeftView.{call}", mend=mend)
