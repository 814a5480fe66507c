"""Merge methods from outside the package: functions, `Method` rows, and methods of installed packages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch import Tensor

from personalized_soups import ExpertLibrary, LiveAdapter, Profile, SoupModel, merge, merge_into_base, merge_many
from personalized_soups.adapters.describe import describe
from personalized_soups.adapters.provenance import read_soup_record
from personalized_soups.errors import UsageError
from personalized_soups.merging.doctor.diagnose import diagnose
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.verify.folder import verify
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.method import Method
from tests import oracles
from tests.cli.conftest import Run
from tests.experts import SHAPES, write_expert
from tests.merging.verify.tampering import NAMES, PROFILE, WEIGHTS, check_sound, edit, faults_of
from tests.merging.writing.test_into_base import write_base
from tests.oracles import Matrix
from tests.packages import install_package

PACKAGE = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
import torch
from personalized_soups.methods.method import Method

def clipped(deltas, weights, *, density=0.5):
    '''Clip each delta at `4 density` times its mean magnitude, then sum.'''
    merged = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        limit = 4 * density * float(delta.abs().mean())
        merged += weight * delta.clamp(-limit, limit)
    return merged

row = Method("any", clipped, "dense", ("truncated", "folded"), options=("density",))
"""
ENTRY_POINTS = """[personalized_soups.methods]
clipped = clipping:clipped
clipped_more = clipping:row
"""


def clipped(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """Clip each delta at twice its mean magnitude, then sum."""
    merged = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        limit = 2 * float(delta.abs().mean())
        merged += weight * delta.clamp(-limit, limit)
    return merged


def oracle(folders: Sequence[Path], weights: Sequence[float], density: float = 0.5) -> dict[str, Matrix]:
    """The same rule in float64 NumPy, from the files."""
    merged = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in oracles.deltas(folder).items():
            limit = 4 * density * np.abs(delta).mean()
            merged[module] += weight * np.clip(delta, -limit, limit)
    return merged


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    for index, (name, rank) in enumerate(zip(NAMES, (2, 4, 3), strict=True)):
        write_expert(tmp_path / "experts" / name, seed=index, rank=rank)
    return ExpertLibrary.open(tmp_path / "experts")


@pytest.fixture
def folders(tmp_path: Path, library: ExpertLibrary) -> list[Path]:
    assert library
    return [tmp_path / "experts" / name for name in NAMES]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    install_package(tmp_path / "site", "clipping", PACKAGE, ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    sys.modules.pop("clipping", None)


def check_adapter(folder: Path, want: Mapping[str, Matrix], rank: int) -> None:
    """The adapter holds each delta's best approximation at this rank."""
    got = oracles.deltas(folder)
    assert got.keys() == want.keys()
    for module, delta in want.items():
        left, singular, right = np.linalg.svd(delta)
        best = (left[:, :rank] * singular[:rank]) @ right[:rank]
        # float32 moves the delta by at most half an ulp of its norm, and the factors by as much again. A perturbation
        # turns the leading subspace by its norm over the gap behind the last singular value that is kept (Wedin).
        gap = singular[rank - 1] - (singular[rank] if rank < len(singular) else 0.0)
        moved = 2 * 2.0**-24 * np.linalg.norm(delta) * (1 + 2 * singular[0] / gap)
        assert np.linalg.norm(got[module] - best) <= moved, module


def check_model(base: Path, folder: Path, want: Mapping[str, Matrix]) -> None:
    for shard in base.glob("*.safetensors"):
        before, after = oracles.read_tensors(shard), oracles.read_tensors(folder / shard.name)
        for name, tensor in before.items():
            delta = want.get(name.removesuffix(".weight"), np.zeros(()))
            np.testing.assert_allclose(after[name], tensor + delta, rtol=1e-6, atol=3e-6)


def test_a_function_merges_into_an_adapter_a_model_and_many_users(
    tmp_path: Path, library: ExpertLibrary, folders: list[Path]
) -> None:
    want = oracle(folders, WEIGHTS)
    adapter = merge(library, PROFILE, MergeOptions(method=clipped, rank=6)).write(tmp_path / "adapter")
    check_adapter(adapter, want, 6)
    base = write_base(tmp_path / "base")
    model = merge_into_base(library, PROFILE, base, tmp_path / "model", MergeOptions(method=clipped))
    check_model(base, model, want)
    users = [PROFILE.replaced(user="ada"), Profile(user="bob", weights={"one": 2.0, "two": 0.5})]
    merge_many(library, users, tmp_path / "users", MergeOptions(method=clipped, rank=6))
    check_adapter(tmp_path / "users" / "ada", want, 6)
    check_adapter(tmp_path / "users" / "bob", oracle(folders[:2], (2.0, 0.5)), 6)
    again = merge_many(library, users, tmp_path / "users", MergeOptions(method=clipped, rank=6))
    assert (again.written, again.kept) == (0, 2)


def halved_stack(factors: list[Factors], weights: list[float]) -> Factors:
    """Return half of the weighted sum, as stacked factors."""
    b_OK = torch.cat([f.b_OR * (0.5 * w * f.scaling) for f, w in zip(factors, weights, strict=True)], dim=1)
    return Factors(torch.cat([f.a_RI for f in factors]), b_OK)


def test_a_row_of_the_family_factor_merges_factors(tmp_path: Path, library: ExpertLibrary, folders: list[Path]) -> None:
    row = Method("halved", halved_stack, "factor", ("stacked", "truncated", "folded"))
    out = merge(library, PROFILE, MergeOptions(method=row)).write(tmp_path / "out")
    got, want = oracles.deltas(out), oracles.soup(folders, [weight / 2 for weight in WEIGHTS])
    assert all(oracles.relative_error(got[module], want[module]) < 1e-6 for module in SHAPES)
    check_sound(verify(out, method=row))


def test_soup_json_names_the_function_and_its_source(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE, MergeOptions(method=clipped, rank=6)).write(tmp_path / "out")
    record = json.loads((out / "soup.json").read_text())
    assert record["method"] == f"{__name__}:clipped"
    assert record["method_source"] == {
        "module": __name__,
        "function": "clipped",
        "blake3": blake3(Path(__file__).read_bytes()).hexdigest(),
    }
    assert list(record)[3:5] == ["method", "method_source"]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_record_of_a_built_in_method_has_no_source(tmp_path: Path, library: ExpertLibrary, method: str) -> None:
    out = merge(library, PROFILE, MergeOptions(method=method, rank=6)).write(tmp_path / "out")
    assert "method_source" not in json.loads((out / "soup.json").read_text())
    record = read_soup_record(out)
    assert record is not None
    assert record.method_source is None
    assert "method_source" not in record.model_dump(mode="json")


@pytest.mark.usefixtures("site")
def test_a_profile_and_the_command_line_name_a_method_of_an_installed_package(
    tmp_path: Path, folders: list[Path], psoups: Run
) -> None:
    base = write_base(tmp_path / "base")
    profile = tmp_path / "me.yaml"
    weights = "".join(f"  {name}: {weight}\n" for name, weight in zip(NAMES, WEIGHTS, strict=True))
    profile.write_text(f"method: clipped_more\noptions: {{density: 0.25}}\nweights:\n{weights}")
    experts = ("--experts", tmp_path / "experts")
    code, _, err = psoups("merge", profile, *experts, "--into-base", base, "--out", tmp_path / "model")
    assert code == 0, err
    check_model(base, tmp_path / "model", oracle(folders, WEIGHTS, 0.25))
    pairs = ",".join(f"{name}={weight}" for name, weight in zip(NAMES, WEIGHTS, strict=True))
    named = ("--method", "clipped", "--rank", "6", "--out", tmp_path / "adapter")
    code, _, err = psoups("merge", "--weights", pairs, *experts, *named)
    assert code == 0, err
    check_adapter(tmp_path / "adapter", oracle(folders, WEIGHTS), 6)
    record = json.loads((tmp_path / "adapter" / "soup.json").read_text())
    assert (record["method"], record["method_source"]["module"]) == ("clipped", "clipping")
    code, out, _ = psoups("verify", tmp_path / "adapter")
    assert code == 1
    assert "not recomputed" in out
    code, out, _ = psoups("verify", tmp_path / "adapter", "--method", "clipped")
    assert (code, "identical" in out) == (0, True)
    code, out, _ = psoups("verify", tmp_path / "model", "--method", "clipped_more")
    assert (code, "identical" in out) == (0, True)


def test_a_package_in_another_process_merges_through_the_command(
    tmp_path: Path, folders: list[Path], site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    options = ["--weights", "one=0.7,two=-0.4,three=1.3", "--method", "clipped", "--rank", "6"]
    paths = ["--experts", str(tmp_path / "experts"), "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-m", "personalized_soups", "merge", *options, *paths], check=True, timeout=280)
    check_adapter(tmp_path / "out", oracle(folders, WEIGHTS), 6)


@pytest.mark.usefixtures("site")
def test_options_of_a_packages_method_are_checked_where_the_profile_has_them(library: ExpertLibrary) -> None:
    for options, what in (({"densty": 0.5}, "clipped_more takes no option 'densty'"), ({"density": 2.0}, "is 2; it")):
        profile = Profile(weights={"one": 1.0}, method="clipped_more", options=options)
        with pytest.raises(UsageError, match=what) as caught:
            merge(library, profile, MergeOptions(rank=2))
        assert caught.value.where == f"Profile options.{next(iter(options))}"


def test_inspect_lists_the_methods_of_installed_packages(site: Path, psoups: Run) -> None:
    rows = {row["method"]: row for row in json.loads(psoups("inspect", "--methods", "--json")[1])}
    assert rows["clipped"]["source"] == "clipping 1.0, clipping:clipped"
    assert "clipped_more" in psoups("inspect", "--methods")[1]
    assert not (site / "imported").exists()


# --- verify


def function_of(path: Path, source: str) -> Any:
    """Write a module, and return its function `clipped`."""
    path.write_text(source)
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(source, path, "exec"), namespace)
    return namespace["clipped"]


def written(tmp_path: Path, library: ExpertLibrary) -> tuple[Path, Any]:
    """Merge with a function of a module in `tmp_path`, and return the adapter and the function."""
    function = function_of(tmp_path / "mine.py", PACKAGE)
    return merge(library, PROFILE, MergeOptions(method=function, rank=6)).write(tmp_path / "out"), function


def test_verify_cannot_recompute_a_soup_of_a_method_that_it_is_not_given(
    tmp_path: Path, library: ExpertLibrary
) -> None:
    out, function = written(tmp_path, library)
    verification = verify(out)
    assert (verification.verdict, verification.is_sound) == ("not recomputed", False)
    (message,) = faults_of(verification).values()
    assert "merged by mine:clipped, a method from outside" in message
    assert "give the method" in message
    check_sound(verify(out, method=function))


def test_verify_reports_what_else_is_wrong_without_the_method(tmp_path: Path, library: ExpertLibrary) -> None:
    out, _ = written(tmp_path, library)
    write_expert(library["two"].folder, seed=9, rank=4)
    (out / "extra.txt").touch()
    assert {fault.subject for fault in verify(out).faults} == {"record", "expert", "file"}


def test_verify_notices_a_method_whose_source_has_changed(tmp_path: Path, library: ExpertLibrary) -> None:
    out, function = written(tmp_path, library)
    (tmp_path / "mine.py").write_text(PACKAGE + "\n# a comment\n")
    verification = verify(out, method=function)
    assert verification.verdict == "identical"
    (message,) = faults_of(verification).values()
    assert "has changed since the merge: BLAKE3" in message


def test_verify_notices_another_function(tmp_path: Path, library: ExpertLibrary) -> None:
    out, _ = written(tmp_path, library)
    verification = verify(out, method=clipped)
    assert verification.verdict == "identical"  # the same rule, from another file
    assert any("clipped" in place or "source" in place for place in faults_of(verification))


def test_a_digest_that_was_tampered_with_is_noticed(tmp_path: Path, library: ExpertLibrary) -> None:
    out, function = written(tmp_path, library)
    edit(out / "soup.json", "method_source", "blake3", to="0" * 64)
    assert any("BLAKE3" in message for message in faults_of(verify(out, method=function)).values())


def test_a_method_is_given_for_a_soup_of_another_built_in_method(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE, MergeOptions(method="ties", rank=6)).write(tmp_path / "out")
    check_sound(verify(out, method="ties"))
    with pytest.raises(UsageError, match="merged by ties, a built-in method"):
        verify(out, method=clipped)


# --- nothing imports what a record names


def test_no_loader_imports_a_module_that_a_record_names(
    tmp_path: Path, library: ExpertLibrary, monkeypatch: pytest.MonkeyPatch, psoups: Run
) -> None:
    site = tmp_path / "site"
    entry_points = "[personalized_soups.methods]\ntempting = trap:clipped\n"
    install_package(site, "trap", PACKAGE, entry_points)
    monkeypatch.syspath_prepend(site)
    out, _ = written(tmp_path, library)
    edit(out / "soup.json", "method_source", "module", to="trap")
    edit(out / "soup.json", "method", to="tempting")
    edit(out / "soup.json", "profile", "method", to="tempting")
    assert read_soup_record(out) is not None
    assert verify(out).verdict == "not recomputed"
    assert psoups("verify", out)[0] == 1
    assert psoups("inspect", out)[0] == 0
    describe(out)
    assert len(ExpertLibrary.open(out)) == 1
    merge(ExpertLibrary.open(out), Profile(weights={"out": 1.0})).write(tmp_path / "again")
    verify(tmp_path / "again")
    diagnose(ExpertLibrary.open(out))
    (tmp_path / "users").mkdir()
    out.rename(tmp_path / "users" / "ada")
    merge_many(library, [PROFILE.replaced(user="ada")], tmp_path / "users", overwrite=True)
    assert not (site / "imported").exists()
    assert "trap" not in sys.modules


# --- where a method of one's own has no place


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("method", [clipped, "clipped", Method("mine", clipped, "dense", ("folded",))])
def test_a_live_soup_rejects_methods_from_outside(library: ExpertLibrary, method: Any, site: Path) -> None:
    with pytest.raises(UsageError, match="a live soup cannot be computed by"):
        LiveAdapter(library, method=method)
    assert not (site / "imported").exists()


@pytest.mark.usefixtures("site")
def test_mixing_rejects_a_profile_with_a_method_from_outside(small_base: Path, library: ExpertLibrary) -> None:
    model = SoupModel.from_pretrained(small_base, library, same_base=True)
    with pytest.raises(UsageError, match="'clipped', but a mixture is always linear"):
        model.served.set(Profile(weights={"one": 1.0}, method="clipped"))


# --- wrong functions


def too_narrow(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return deltas[0][:, 1:] * weights[0]


def in_float64(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return deltas[0].double() * weights[0]


def with_nan(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return deltas[0] * weights[0] * float("nan")


def nothing(deltas: list[Tensor], weights: list[float]) -> None:
    """Forget the result."""


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (
            too_narrow,
            r"returned \[64, 95\] of torch.float32 on cpu, but it must return a tensor \[64, 96\] of torch.float32",
        ),
        (in_float64, r"returned \[64, 96\] of torch.float64 on cpu, but it must return"),
        (with_nan, "returned NaN or infinity, but it must return finite values"),
        (nothing, "returned an object of type NoneType, but it must return a tensor"),
    ],
)
def test_a_wrong_result_is_an_error_that_names_the_method(
    tmp_path: Path, library: ExpertLibrary, function: Any, what: str
) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        merge(library, PROFILE, MergeOptions(method=function, rank=4)).write(tmp_path / "out")
    assert f"{__name__}:{function.__name__}" in caught.value.what
    assert not (tmp_path / "out").exists()


def scaled_up(factors: list[Factors], weights: list[float]) -> Factors:
    return Factors(factors[0].a_RI, factors[0].b_OR, 2.0)


def of_high_rank(factors: list[Factors], weights: list[float]) -> Factors:
    return factors[0].padded(40)


def of_no_factors(factors: list[Factors], weights: list[float]) -> int:
    return 3


def swapped(factors: list[Factors], weights: list[float]) -> Factors:
    return Factors(factors[0].b_OR.T, factors[0].b_OR)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (scaled_up, "returned rank 2 and scaling 2, but it must return at most rank 9 and scaling 1"),
        (of_high_rank, "returned rank 40 and scaling 4, but it must return at most rank 9"),
        (swapped, r"returned B \[64, 2\] .* and A \[2, 64\] .*, but it must return B \[64, R\] and A \[R, 96\]"),
        (of_no_factors, "returned an object of type int, but it must return Factors"),
    ],
)
def test_wrong_factors_are_an_error(tmp_path: Path, library: ExpertLibrary, function: Any, what: str) -> None:
    row = Method("mine", function, "factor", ("stacked",))
    with pytest.raises(UsageError, match=what):
        merge(library, PROFILE, MergeOptions(method=row)).write(tmp_path / "out")


def raising(deltas: list[Tensor], weights: list[float]) -> Tensor:
    raise ZeroDivisionError("no luck")


def test_an_exception_keeps_its_type_and_names_the_method(tmp_path: Path, library: ExpertLibrary) -> None:
    with pytest.raises(ZeroDivisionError, match="no luck") as caught:
        merge(library, PROFILE, MergeOptions(method=raising, rank=4)).write(tmp_path / "out")
    (note,) = caught.value.__notes__
    assert f"{__name__}:raising" in note
    assert "self_attn" in note or "mlp" in note


def test_a_function_without_a_file_is_rejected(library: ExpertLibrary) -> None:
    namespace: dict[str, Any] = {"__name__": "nowhere"}
    exec("def first(deltas, weights): return deltas[0]", namespace)
    with pytest.raises(UsageError, match="file that defines the merge method 'nowhere:first' is not found"):
        merge(library, PROFILE, MergeOptions(method=namespace["first"], rank=4))


def test_many_users_soups_are_merged_again_when_the_method_has_changed(tmp_path: Path, library: ExpertLibrary) -> None:
    _, function = written(tmp_path, library)
    users = [PROFILE.replaced(user="ada")]
    options = MergeOptions(method=function, rank=6)
    assert merge_many(library, users, tmp_path / "users", options).written == 1
    assert merge_many(library, users, tmp_path / "users", options).kept == 1
    (tmp_path / "mine.py").write_text(PACKAGE + "\n# a comment\n")
    with pytest.raises(UsageError, match="already exists and holds another soup"):
        merge_many(library, users, tmp_path / "users", options)


def test_an_interrupted_model_is_not_resumed_with_a_changed_method(
    tmp_path: Path, library: ExpertLibrary, folders: list[Path]
) -> None:
    base = write_base(tmp_path / "base", shards=3)
    # the first shard has no up_proj, so it is written; the second shard fails
    failing = PACKAGE.replace("merged = ", "assert deltas[0].shape != (96, 64)\n    merged = 3 + ")
    for source in (failing, PACKAGE):
        function = function_of(tmp_path / "mine.py", source)
        options = MergeOptions(method=function)
        if source is failing:
            with pytest.raises(AssertionError):
                merge_into_base(library, PROFILE, base, tmp_path / "model", options)
        else:
            merge_into_base(library, PROFILE, base, tmp_path / "model", options)
    check_model(base, tmp_path / "model", oracle(folders, WEIGHTS))
