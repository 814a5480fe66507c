"""The comparison of any number of systems, against figures that NumPy computes from random scores."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from personalized_soups.evaluation.page import Part, Sample, Table, as_html, as_markdown
from personalized_soups.evaluation.pictures.systems import draw_radars, draw_trainings, draw_win_rates
from personalized_soups.evaluation.scores import Graded
from personalized_soups.evaluation.significance import holm, sign_flip_p_value
from personalized_soups.evaluation.systems import SystemsResults, TrainingCost, compare_systems, duel_of
from personalized_soups.evaluation.systems_report import systems_report

DIMENSIONS = {"expertise": ("elementary", "expert"), "style": ("unfriendly", "friendly")}
COMBINATIONS = list(product(*DIMENSIONS.values()))
SYSTEMS = ["base", "prompting", "p_soups", "p_morl"]
NUM_PROMPTS = 13
COSTS: list[TrainingCost] = [
    {"system": "base", "trainings": 0, "grows": "0", "seconds": 0.0, "num_bytes": 0},
    {"system": "p_soups", "trainings": 4, "grows": "2n", "seconds": 40.0, "num_bytes": 4_000_000},
    {"system": "p_morl", "trainings": 4, "grows": "2^n", "seconds": 40.0, "num_bytes": 4_000_000},
]


class Scores:
    """Random scores of which many are equal. `wanted` is [S, C, P, D], towards the sides of each combination."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shape = (len(SYSTEMS), len(COMBINATIONS), NUM_PROMPTS, len(DIMENSIONS))
        self.valid = rng.random(shape[:3]) < 0.8
        self.wanted = rng.integers(0, 5, size=shape) / 4 * self.valid[..., None]
        self.judged = rng.integers(0, 5, size=shape) / 4 * self.valid[..., None]

    def answers(self, *, is_judged: bool = True) -> dict[str, dict[tuple[str, ...], list[Graded]]]:
        def toward(values: npt.NDArray[np.float64], sides: tuple[str, ...]) -> dict[str, float]:
            return dict(zip(sides, values.tolist(), strict=True))

        return {
            name: {
                sides: [
                    Graded(
                        f"prompt {p}",
                        f"answer {p} of {name}",
                        bool(self.valid[s, c, p]),
                        toward(self.wanted[s, c, p], sides),
                        toward(self.judged[s, c, p], sides) if is_judged else {},
                    )
                    for p in range(NUM_PROMPTS)
                ]
                for c, sides in enumerate(COMBINATIONS)
            }
            for s, name in enumerate(SYSTEMS)
        }


def compared(scores: Scores, *, is_judged: bool = True) -> SystemsResults:
    answers = scores.answers(is_judged=is_judged)
    return compare_systems(answers, dimensions=list(DIMENSIONS), primary=("p_soups", "prompting"), costs=COSTS)


def points(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(ours > theirs, 1.0, np.where(ours < theirs, 0.0, 0.5))


def test_win_rates_count_each_dimension_of_each_answer() -> None:
    scores = Scores()
    results = compared(scores)
    assert len(results["duels"]) == len(SYSTEMS) * (len(SYSTEMS) - 1)
    for s, name in enumerate(SYSTEMS):
        for o, other in enumerate(SYSTEMS):
            if name == other:
                continue
            duel = duel_of(results, name, other)
            won = points(scores.wanted[s], scores.wanted[o])
            assert duel["rate"] == pytest.approx(won.mean())
            assert list(duel["per_dimension"].values()) == pytest.approx(won.mean(axis=(0, 1)).tolist())
            assert duel["num_judgements"] == won.size
            assert duel["judged"] == pytest.approx(points(scores.judged[s], scores.judged[o]).mean())
            assert duel["rate"] + duel_of(results, other, name)["rate"] == pytest.approx(1)
            assert duel["interval"][0] <= duel["rate"] <= duel["interval"][1]
    assert "judged" not in duel_of(compared(scores, is_judged=False), "base", "p_morl")


def test_the_primary_comparison_is_not_adjusted_and_the_others_are() -> None:
    scores = Scores(1)
    results = compared(scores)
    joint = (scores.wanted > 0.5).all(axis=-1).mean(axis=1)  # [S, P]
    ours = joint[SYSTEMS.index("p_soups")]
    differences = {name: (ours - joint[at]).tolist() for at, name in enumerate(SYSTEMS) if name != "p_soups"}
    assert results["primary"]["joint"] == pytest.approx(np.mean(differences["prompting"]))
    assert results["primary"]["p_value"] == sign_flip_p_value(differences.pop("prompting"))
    assert "adjusted" not in results["primary"]
    p_values = {name: sign_flip_p_value(values) for name, values in differences.items()}
    assert {test["minus"]: test["adjusted"] for test in results["tests"]} == holm(p_values)


def test_systems_that_answered_other_prompts_are_rejected() -> None:
    answers = Scores().answers()
    entries = answers["p_morl"][COMBINATIONS[0]]
    entries[0], entries[1] = entries[1], entries[0]
    with pytest.raises(ValueError, match="'p_morl' has answered other prompts than 'p_soups'"):
        compare_systems(answers, dimensions=list(DIMENSIONS), primary=("p_soups", "base"))
    answers = Scores().answers()
    del answers["base"][COMBINATIONS[0]]
    with pytest.raises(ValueError, match="'prompting' has other combinations than 'base'"):
        compare_systems(answers, dimensions=list(DIMENSIONS), primary=("p_soups", "prompting"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    folder, results = tmp_path_factory.mktemp("report"), compared(Scores())
    pictures = {
        "win_rates": draw_win_rates(results, folder / "win_rates.png"),
        "radars": draw_radars(results, folder / "radars.png"),
        "trainings": draw_trainings(results, folder / "trainings.png"),
    }
    samples = [
        Sample("Why <b>?", "expert + friendly", "base", "A <script>alert(1)</script> & more", is_valid=False),
        Sample("Why <b>?", "expert + friendly", "p soups", "Because.", is_valid=True),
    ]
    return systems_report(results, pictures=pictures, samples=samples)


def test_the_headline_says_what_the_interval_allows() -> None:
    scores = Scores()
    texts = []
    for shift in (-1.0, 1.0):
        scores.valid[:] = True
        scores.wanted[:] = 0.5 - shift / 2
        scores.wanted[SYSTEMS.index("p_soups")] = 0.5 + shift / 2
        texts.append(as_markdown(systems_report(compared(scores), pictures={}, samples=[])))
    assert "P soups is worse than prompting" in texts[0]
    assert (
        "P soups is better than prompting: the joint score differs by +1.000 \\[1.000, 1.000\\], p = 0.000" in texts[1]
    )
    scores.wanted[:] = 1.0
    text = as_markdown(systems_report(compared(scores), pictures={}, samples=[]))
    assert "Between p soups and prompting, no difference was found" in text


def test_every_number_of_the_tables_is_in_the_results(report: list[Part]) -> None:
    results = compared(Scores())
    tables = [part for part in report if isinstance(part, Table)]
    averages = {row[0]: row for row in tables[0].rows}
    for scores in results["averages"]:
        row = averages[scores["system"].replace("_", " ")]
        assert row[1].startswith(f"{scores['joint']:.3f} [{scores['intervals']['joint'][0]:.3f}, ")
        assert row[-1] == f"{scores['judged_joint']:.3f}"
    extrapolated = {row[0]: row[1] for row in tables[-1].rows}
    assert extrapolated == {"p soups": "20", "p morl": "1024"}
    json.dumps(results, allow_nan=False)


class Page(HTMLParser):
    """What a page asks for, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]


def test_the_page_asks_for_nothing_and_escapes_answers(report: list[Part]) -> None:
    text = as_html(report)
    page = Page(text)
    assert len(page.addresses) == 3
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("script") == 1  # the page's own
    assert "A &lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert page.tags.count("article") == 2


def test_the_markdown_has_the_same_tables(report: list[Part]) -> None:
    text = as_markdown(report)
    assert text.count("| --- |") == 0
    for part in report:
        if isinstance(part, Table):
            assert part.rows[0][0] in text
    assert "](win_rates.png)" in text


def test_pictures_are_the_same_again(tmp_path: Path) -> None:
    results = compared(Scores())
    for draw in (draw_win_rates, draw_radars, draw_trainings):
        first, second = draw(results, tmp_path / "a.png").read_bytes(), draw(results, tmp_path / "b.png").read_bytes()
        assert first == second
        assert len(first) > 5_000


def test_a_prompt_with_several_seeds_is_one_cluster() -> None:
    """The same answers with three seeds are no more evidence than with one."""
    once = compared(Scores(2))
    answers = {
        name: {sides: [*graded, *graded, *graded] for sides, graded in by_combination.items()}
        for name, by_combination in Scores(2).answers().items()
    }
    thrice = compare_systems(
        answers, dimensions=list(DIMENSIONS), primary=("p_soups", "prompting"), costs=COSTS, num_seeds=3
    )
    for one, three in zip(once["averages"], thrice["averages"], strict=True):
        assert three["joint"] == pytest.approx(one["joint"])
        for name, interval in one["intervals"].items():
            assert three["intervals"][name] == pytest.approx(interval)
    assert thrice["primary"]["p_value"] == once["primary"]["p_value"]
    assert thrice["primary"]["interval"] == pytest.approx(once["primary"]["interval"])
    duels = zip(once["duels"], thrice["duels"], strict=True)
    assert all(three["interval"] == pytest.approx(one["interval"]) for one, three in duels)
    assert all(
        three["num_judgements"] == 3 * one["num_judgements"]
        for one, three in zip(once["duels"], thrice["duels"], strict=True)
    )


def test_each_seed_has_its_own_joint_score_and_the_mean_a_t_interval() -> None:
    seeds = [Scores(seed) for seed in range(3)]
    parts = [scores.answers() for scores in seeds]
    answers = {
        name: {sides: [entry for part in parts for entry in part[name][sides]] for sides in COMBINATIONS}
        for name in SYSTEMS
    }
    results = compare_systems(answers, dimensions=list(DIMENSIONS), primary=("p_soups", "prompting"), num_seeds=3)
    joint = np.array([(scores.wanted > 0.5).all(axis=-1).mean(axis=(1, 2)) for scores in seeds])  # [seeds, S]
    rows = {row["system"]: row for row in results["seeds"] if "minus" not in row}
    for at, name in enumerate(SYSTEMS):
        assert rows[name]["joint"] == pytest.approx(joint[:, at].tolist())
        assert rows[name]["half"] == pytest.approx(4.303 * joint[:, at].std(ddof=1) / np.sqrt(3))
    (difference,) = (row for row in results["seeds"] if "minus" in row)
    ours, theirs = (joint[:, SYSTEMS.index(name)] for name in ("p_soups", "prompting"))
    assert difference["joint"] == pytest.approx((ours - theirs).tolist())
    text = as_markdown(systems_report(results, pictures={}, samples=[]))
    assert "13 held-out prompts with 3 seeds each" in text
