from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from personalized_soups.declare.loader import load_text
from personalized_soups.declare.profile import Profile, load_profile
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import DeclarationError, UsageError
from personalized_soups.methods.options import OPTIONS
from personalized_soups.methods.table import METHODS
from tests.packages import install_package

DIMENSION_OF = {"elementary": "expertise", "expert": "expertise", "friendly": "style"}


def refused(text: str) -> DeclarationError:
    with pytest.raises(DeclarationError) as caught:
        load_text(text, Profile, "u.yaml")
    return caught.value


def test_the_shipped_profile() -> None:
    profile = load_profile(shipped_recipe("profiles/example.yaml"))
    assert profile == Profile(user="u1042", weights={"elementary": 0.6, "concise": 0.6, "friendly": 0.6})
    assert profile.resolved_weights() == {"elementary": 0.6, "concise": 0.6, "friendly": 0.6}


def test_json_is_a_profile_too(tmp_path: Path) -> None:
    path = tmp_path / "u.json"
    path.write_text('{"weights": {"a": 1, "b": -0.5}, "rank": 8}', encoding="utf-8")
    assert load_profile(str(path)) == Profile(weights={"a": 1.0, "b": -0.5}, rank=8)


@pytest.mark.parametrize(
    ("text", "where", "what", "mend"),
    [
        ("weights: {a: 1}\nusr: x", "u.yaml:2: usr", "unknown key 'usr'", "did you mean 'user'?"),
        ("weights:\n  a: 1\n  b: .nan", "u.yaml:3: weights.b", "finite", "write a finite number"),
        ("user: x\nweights: {}", "u.yaml:2: weights", "at least 1", "give at least one"),
        ("weights: {a: 0, b: 0.0}", "u.yaml:1: weights", "all weights are zero", "a weight other than 0"),
        ("weights: {'': 1}", "u.yaml:1: weights", "name is empty", "name the expert"),
        ("user: x", "u.yaml: weights", "'weights' is missing", "weights: ..."),
        ("method: linaer\nweights: {a: 1}", "u.yaml:1: method", "not a known merge method", "did you mean 'linear'"),
        ("method: [ties]\nweights: {a: 1}", "u.yaml:1: method", "valid string, but found ['ties']", "write text"),
        (
            "weights: {a: 1}\nmethod: ties\noptions:\n  lambda: 1\n  densty: 0.3",
            "u.yaml:5: options.densty",
            "ties takes no option 'densty'",
            "did you mean 'density'?",
        ),
        (
            "weights: {a: 1}\noptions: {density: 0.3}",
            "u.yaml:2: options.density",
            "linear takes no option 'density'",
            "remove 'density': linear takes no options",
        ),
        (
            "weights: {a: 1}\nmethod: ties\noptions:\n  density: 1.5",
            "u.yaml:4: options.density",
            "density is 1.5; it must be above 0 and at most 1",
            "use 0.5",
        ),
        (
            "weights: {a: 1}\nmethod: della\noptions:\n  density: 0.1",
            "u.yaml:4: options.density",
            "density 0.1 with epsilon 0.1 gives keep-probabilities from 0 to 0.2; they must",
            "use an epsilon below 0.1",
        ),
        (
            "weights: {a: 1}\nmethod: dare_ties\noptions: {seed: 0.5}",
            "u.yaml:3: options.seed",
            "seed is 0.5; it must be a whole number",
            "use 0, the default",
        ),
        (
            "weights: {a: 1}\nmethod: ties\noptions: {density: .nan}",
            "u.yaml:3: options.density",
            "finite",
            "finite number",
        ),
        (
            "weights: {a: 1}\nmethod: ties\noptions: {density: true}",
            "u.yaml:3: options.density",
            "found True",
            "a number",
        ),
        ("weights: {a: 1}\nnormalize: mean", "u.yaml:2: normalize", "'mean'", "choose from: none, sum"),
        ("normalize: sum\nweights: {a: 1, b: -1}", "u.yaml:1: normalize", "sum to 0", "do not cancel"),
        ("weights: {a: 1}\nrank: 0", "u.yaml:2: rank", "greater than 0", "larger"),
        ("weights: {a: 1}\nrank: 8.0", "u.yaml:2: rank", "found 8.0", "whole number"),
        ("weights: {a: 1}\nallow_opposed: 1", "u.yaml:2: allow_opposed", "found 1", "true or false"),
    ],
)
def test_faults_have_file_line_key_and_mend(text: str, where: str, what: str, mend: str) -> None:
    error = refused(text)
    assert error.where == where
    assert what in error.what
    assert mend in error.mend


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_table_with_its_options(method: str) -> None:
    options = {name: OPTIONS[name].default for name in METHODS[method].options}
    lines = "".join(f"  {name}: {value:g}\n" for name, value in options.items())
    profile = load_text(
        f"weights: {{a: 1}}\nmethod: {method}\noptions:{lines and chr(10)}{lines or ' {}'}", Profile, "u.yaml"
    )
    assert profile == Profile(method=method, options=options, weights={"a": 1.0})
    assert Profile(method=method, weights={"a": 1.0}).options == {}


def test_the_schema_lists_the_built_in_methods_and_allows_others() -> None:
    properties = Profile.model_json_schema()["properties"]
    assert properties["method"]["anyOf"] == [{"enum": list(METHODS)}, {"type": "string"}]
    assert properties["method"]["type"] == "string"


def test_a_profile_names_a_method_of_an_installed_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_points = "[personalized_soups.methods]\nclipped = not_imported:clipped\n"
    install_package(tmp_path / "site", "not_imported", "raise RuntimeError", entry_points)
    monkeypatch.syspath_prepend(tmp_path / "site")
    profile = Profile(method="clipped", options={"density": 0.5}, weights={"a": 1.0})
    assert (profile.method, profile.options) == ("clipped", {"density": 0.5})
    with pytest.raises(DeclarationError, match="is not a known merge method") as caught:
        load_text("weights: {a: 1}\nmethod: cliped\n", Profile, "u.yaml")
    assert caught.value.mend == "did you mean 'clipped'?"


def test_normalize_sum_divides_by_the_sum() -> None:
    profile = Profile(normalize="sum", weights={"a": 3.0, "b": 2.0, "c": -1.0})
    assert profile.resolved_weights() == {"a": 0.75, "b": 0.5, "c": -0.25}


def test_weights_that_cancel_to_rounding_are_refused() -> None:
    with pytest.raises(ValidationError, match="cannot divide by their sum"):
        Profile(normalize="sum", weights={"a": 0.1, "b": 0.2, "c": -0.3})
    assert Profile(normalize="none", weights={"a": 1.0, "b": -1.0}).resolved_weights() == {"a": 1.0, "b": -1.0}


def test_weights_from_the_command_line() -> None:
    assert Profile.parse_weights("a=0.6, b = -1e-1,c=1") == {"a": 0.6, "b": -0.1, "c": 1.0}
    profile = Profile.from_option("a=1", method="factor_average", rank=4)
    assert profile == Profile(weights={"a": 1.0}, method="factor_average", rank=4)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "'' is not `name=number`"),
        ("a", "'a' is not `name=number`"),
        ("a=", "'a=' is not `name=number`"),
        ("=1", "'=1' is not `name=number`"),
        ("a=1,", "'' is not `name=number`"),
        ("a=1,a=2", "the expert 'a' is repeated"),
        ("a=x", "the weight of 'a' is not a number: 'x'"),
        ("a=nan", "the weight of 'a' is not finite: 'nan'"),
        ("a=1,b=-inf", "the weight of 'b' is not finite: '-inf'"),
    ],
)
def test_bad_weights_on_the_command_line_are_usage_errors(text: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        Profile.parse_weights(text)
    assert (caught.value.what, caught.value.where) == (what, "weights")
    assert caught.value.exit_code == 2


def test_an_all_zero_option_names_the_option() -> None:
    with pytest.raises(DeclarationError) as caught:
        Profile.from_option("a=0")
    assert caught.value.where == "weights: weights"


def test_two_sides_of_one_dimension_are_refused_with_the_line() -> None:
    profile = load_text("weights:\n  elementary: 1\n  friendly: 1\n  expert: 0.5\n", Profile, "u.yaml")
    with pytest.raises(DeclarationError) as caught:
        SideRule(DIMENSION_OF).check(profile)
    assert caught.value.what.startswith("'elementary' and 'expert' are two sides of one dimension, 'expertise'")
    assert caught.value.where == "u.yaml:4: weights.expert"
    assert "allow_opposed: true" in caught.value.mend


@pytest.mark.parametrize(
    "profile",
    [
        Profile(weights={"elementary": 1.0, "expert": 1.0}, allow_opposed=True),
        Profile(weights={"elementary": 1.0, "expert": 0.0}),
        Profile(weights={"elementary": 1.0, "friendly": 1.0}),
        Profile(weights={"someone": 1.0, "else": 1.0}),
    ],
)
def test_sides_that_do_not_oppose_each_other_pass(profile: Profile) -> None:
    SideRule(DIMENSION_OF).check(profile)


@pytest.mark.parametrize("weight", [1e308, -1e31])
@pytest.mark.parametrize("normalize", ["none", "sum"])
def test_a_weight_beyond_reason_is_refused_with_its_line(weight: float, normalize: str) -> None:
    text = f"normalize: {normalize}\nweights:\n  concise: 1\n  friendly: {weight}\n  expert: {weight}\n"
    with pytest.raises(DeclarationError, match="the weight of 'friendly' is") as caught:
        load_text(text, Profile, "u.yaml")
    assert caught.value.where == "u.yaml:4: weights.friendly"


def test_two_experts_of_one_side_do_not_oppose_each_other() -> None:
    profile = Profile(weights={"friendly-1": 0.5, "friendly-2": 0.5})
    dimension_of = dict.fromkeys(profile.weights, "style")
    SideRule(dimension_of, dict.fromkeys(profile.weights, "friendly")).check(profile)
    with pytest.raises(DeclarationError, match="two sides"):
        SideRule(dimension_of, {"friendly-1": "friendly", "friendly-2": "unfriendly"}).check(profile)
