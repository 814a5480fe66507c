"""Personalized Soups: train one LoRA expert for each preference, and merge a personal model from any mix of experts.

The names in `__all__` are the public API. The module of a name is imported when the name is first used, so
`import personalized_soups` loads neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from personalized_soups.errors import SoupError

if TYPE_CHECKING:
    from personalized_soups.adapters.library import Expert, ExpertLibrary
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.evidence import Example
    from personalized_soups.declare.expert_weights import ExpertWeights
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.profile import Profile, load_profile
    from personalized_soups.declare.shipped import shipped_recipe
    from personalized_soups.declare.side_rule import SideRule
    from personalized_soups.declare.training import TrainingRecipe
    from personalized_soups.generation.generator import Generator
    from personalized_soups.merging.doctor.diagnose import diagnose
    from personalized_soups.merging.live.adapter import LiveAdapter
    from personalized_soups.merging.planning.options import MergeOptions
    from personalized_soups.merging.verify.folder import verify
    from personalized_soups.merging.writing.adapter import merge
    from personalized_soups.merging.writing.into_base import merge_into_base
    from personalized_soups.merging.writing.many import merge_many
    from personalized_soups.methods.method import Method
    from personalized_soups.methods.plugins import DenseMerge
    from personalized_soups.mixing.diffusers_view import DiffusersView
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.mixing.peft_view import PeftView
    from personalized_soups.mixing.personal_model import PersonalModel
    from personalized_soups.mixing.prefixes import PrefixCache
    from personalized_soups.scoring.base_rewards import TextItem
    from personalized_soups.scoring.implicit_rewards import ImplicitRewards
    from personalized_soups.scoring.scorer_rewards import ScorerRewards
    from personalized_soups.scoring.scorers import Scored, Scorer, scorer_of
    from personalized_soups.tiny import BASE_FOLDER as TINY_BASE
    from personalized_soups.training.expert import train_expert
    from personalized_soups.users.answers.estimate import Estimate, estimate_weights
    from personalized_soups.users.answers.making import make_questions
    from personalized_soups.users.answers.pool import QuestionPool
    from personalized_soups.users.answers.preferences import preferences_of
    from personalized_soups.users.answers.prior import GaussianPrior
    from personalized_soups.users.answers.profile import profile_of
    from personalized_soups.users.answers.session import InferenceSession
    from personalized_soups.users.answers.stopping import StoppingRule
    from personalized_soups.users.profiles.store import ProfileStore
    from personalized_soups.users.tuning.likelihood import TextLikelihood
    from personalized_soups.users.tuning.objective import Objective
    from personalized_soups.users.tuning.scored_answers import ScoredAnswers, rating_of
    from personalized_soups.users.tuning.tune import tune_weights

__version__ = "0.1.0"

__all__ = [
    "TINY_BASE",
    "Catalogue",
    "DenseMerge",
    "DiffusersView",
    "Estimate",
    "Example",
    "Expert",
    "ExpertLibrary",
    "ExpertWeights",
    "GaussianPrior",
    "Generator",
    "ImplicitRewards",
    "InferenceSession",
    "LiveAdapter",
    "MergeOptions",
    "Method",
    "Objective",
    "PeftView",
    "PersonalModel",
    "PrefixCache",
    "Profile",
    "ProfileStore",
    "QuestionPool",
    "Scored",
    "ScoredAnswers",
    "Scorer",
    "ScorerRewards",
    "SideRule",
    "SoupError",
    "SoupModel",
    "StoppingRule",
    "TextItem",
    "TextLikelihood",
    "TrainingRecipe",
    "__version__",
    "diagnose",
    "estimate_weights",
    "load",
    "load_profile",
    "make_questions",
    "merge",
    "merge_into_base",
    "merge_many",
    "preferences_of",
    "profile_of",
    "rating_of",
    "scorer_of",
    "shipped_recipe",
    "train_expert",
    "tune_weights",
    "verify",
]

# The module that defines each public name. If the module uses a different name, that name follows after a colon.
_HOME = {
    "Catalogue": "personalized_soups.declare.dimension",
    "DenseMerge": "personalized_soups.methods.plugins",
    "DiffusersView": "personalized_soups.mixing.diffusers_view",
    "Estimate": "personalized_soups.users.answers.estimate",
    "Example": "personalized_soups.declare.evidence",
    "Expert": "personalized_soups.adapters.library",
    "ExpertLibrary": "personalized_soups.adapters.library",
    "ExpertWeights": "personalized_soups.declare.expert_weights",
    "GaussianPrior": "personalized_soups.users.answers.prior",
    "Generator": "personalized_soups.generation.generator",
    "ImplicitRewards": "personalized_soups.scoring.implicit_rewards",
    "InferenceSession": "personalized_soups.users.answers.session",
    "LiveAdapter": "personalized_soups.merging.live.adapter",
    "MergeOptions": "personalized_soups.merging.planning.options",
    "Method": "personalized_soups.methods.method",
    "Objective": "personalized_soups.users.tuning.objective",
    "PeftView": "personalized_soups.mixing.peft_view",
    "PersonalModel": "personalized_soups.mixing.personal_model",
    "PrefixCache": "personalized_soups.mixing.prefixes",
    "Profile": "personalized_soups.declare.profile",
    "ProfileStore": "personalized_soups.users.profiles.store",
    "QuestionPool": "personalized_soups.users.answers.pool",
    "Scored": "personalized_soups.scoring.scorers",
    "ScoredAnswers": "personalized_soups.users.tuning.scored_answers",
    "Scorer": "personalized_soups.scoring.scorers",
    "ScorerRewards": "personalized_soups.scoring.scorer_rewards",
    "SideRule": "personalized_soups.declare.side_rule",
    "SoupModel": "personalized_soups.mixing.model",
    "StoppingRule": "personalized_soups.users.answers.stopping",
    "TINY_BASE": "personalized_soups.tiny:BASE_FOLDER",
    "TextItem": "personalized_soups.scoring.base_rewards",
    "TextLikelihood": "personalized_soups.users.tuning.likelihood",
    "TrainingRecipe": "personalized_soups.declare.training",
    "diagnose": "personalized_soups.merging.doctor.diagnose",
    "estimate_weights": "personalized_soups.users.answers.estimate",
    "load": "personalized_soups.declare.loader",
    "load_profile": "personalized_soups.declare.profile",
    "make_questions": "personalized_soups.users.answers.making",
    "merge": "personalized_soups.merging.writing.adapter",
    "merge_into_base": "personalized_soups.merging.writing.into_base",
    "merge_many": "personalized_soups.merging.writing.many",
    "preferences_of": "personalized_soups.users.answers.preferences",
    "profile_of": "personalized_soups.users.answers.profile",
    "rating_of": "personalized_soups.users.tuning.scored_answers",
    "scorer_of": "personalized_soups.scoring.scorers",
    "shipped_recipe": "personalized_soups.declare.shipped",
    "train_expert": "personalized_soups.training.expert",
    "tune_weights": "personalized_soups.users.tuning.tune",
    "verify": "personalized_soups.merging.verify.folder",
}


def __getattr__(name: str) -> object:
    """Import the module that defines a public name when the name is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
