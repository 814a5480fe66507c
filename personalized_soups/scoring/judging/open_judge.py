"""Open the judge that a file declares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import assert_never

from personalized_soups.declare.judge import JudgeFile, LlmJudgeSpec, RewardModelJudgeSpec, ScorerJudgeSpec
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import recipes_folder
from personalized_soups.scoring.judging.pair_judge import PairJudge

_TEMPLATE = "judges/pairwise.txt"


@contextmanager
def open_judge(path: Path, *, cache: Path | None = None, device: str = "auto") -> Iterator[PairJudge]:
    """Yield the judge that a file declares. The end of the block closes its cache.

    Args:
        path: the file, such as recipes/judges/openai.yaml.
        cache: the file in which an LLM judge stores the endpoint's replies. None stores none.
        device: where a reward model computes: `auto` (CUDA if there is a CUDA device), `cpu`, `cuda`, ...

    Raises:
        DeclarationError: if the file is invalid, or its scorer cannot be imported.
        UsageError, InputError, FileFormatError, RunError: if the judge cannot be opened.
    """
    declared = load(path, JudgeFile)
    spec = declared.judge
    match spec:
        case LlmJudgeSpec():
            from personalized_soups.scoring.judging.llm_judge import LlmJudge
            from personalized_soups.scoring.judging.template import JudgeTemplate

            named = spec.template
            file = recipes_folder() / _TEMPLATE if named is None else declared.relative_path(named)
            with LlmJudge(spec, JudgeTemplate.read(file), cache=cache) as judge:
                yield judge
        case RewardModelJudgeSpec():
            from personalized_soups.scoring.judging.value_judges import RewardModelJudge

            folder = declared.relative_path(spec.model)
            yield RewardModelJudge.open(folder if folder.is_dir() else spec.model, device=device, min_gap=spec.min_gap)
        case ScorerJudgeSpec():
            from personalized_soups.scoring.judging.value_judges import ScorerJudge
            from personalized_soups.scoring.scorers import declared_scorer

            scorer = declared_scorer(spec.scorer, owner=declared, key=("judge", "scorer"))
            yield ScorerJudge(scorer, end=spec.end, min_gap=spec.min_gap, about=spec.scorer.model_dump(mode="json"))
        case _:
            assert_never(spec)
