from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.cli.app import build_app
from tests import oracles
from tests.experts import write_config, write_expert, write_record


@pytest.fixture
def experts(tmp_path: Path, small_base: Path) -> Path:
    for index, name in enumerate(("elementary", "concise", "friendly", "unfriendly")):
        write_expert(tmp_path / "experts" / name, seed=index, base=str(small_base))
        write_record(tmp_path / "experts" / name, dimension="style" if "friendly" in name else name)
    return tmp_path / "experts"


def psoups(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run one command in this process and return its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        build_app()([str(arg) for arg in args], prog_name="psoups")
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def test_a_profile_file_becomes_an_adapter(tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "u1042.yaml"
    profile.write_text("user: u1042\nweights: {elementary: 0.6, concise: 0.6, friendly: -0.3}\n")
    code, out, _ = psoups(capsys, "merge", profile, "--experts", experts, "--out", tmp_path / "soup")
    assert code == 0
    assert "0.6 concise + 0.6 elementary + -0.3 friendly" in out
    want = oracles.soup([experts / name for name in ("elementary", "concise", "friendly")], [0.6, 0.6, -0.3])
    for module, delta in oracles.deltas(tmp_path / "soup").items():
        assert oracles.relative_error(delta, want[module]) < 1e-7


def test_weights_and_options_on_the_command_line(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = psoups(
        capsys, "merge", "--weights", "elementary=0.6,friendly=0.6", "--experts", experts, "--out", tmp_path / "soup",
        "--method", "factor_average", "--rank", 2, "--dtype", "bfloat16", "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0
    printed = json.loads(out)
    assert printed["method"] == "factor_average"
    assert printed["encoding"] == "truncated"
    assert (printed["rank"], printed["dtype"], printed["vllm_max_lora_rank"]) == (2, "bfloat16", 8)
    assert 0 < printed["truncation"]["total"] < 1
    assert printed == {"folder": str(tmp_path / "soup"), **json.loads((tmp_path / "soup" / "soup.json").read_text())}


def test_options_override_the_profile(tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.yaml").write_text("method: factor_average\nrank: 1\nweights: {elementary: 0.6, concise: 0.6}\n")
    args = ("merge", tmp_path / "p.yaml", "--experts", experts, "--dry-run", "--json")
    printed = json.loads(psoups(capsys, *args)[1])
    assert (printed["method"], printed["rank"]) == ("factor_average", 1)
    printed = json.loads(psoups(capsys, *args, "--method", "linear", "--rank", 3)[1])
    assert (printed["method"], printed["rank"]) == ("linear", 3)


def test_a_dry_run_writes_nothing(tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = psoups(capsys, "merge", "--weights", "concise=1", "--experts", experts, "--dry-run",
                          "--out", tmp_path / "soup")  # fmt: skip
    assert code == 0
    assert "stacked" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_into_base_writes_a_model(
    tmp_path: Path, experts: Path, small_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = psoups(
        capsys, "merge", "--weights", "concise=0.5,friendly=0.5", "--experts", experts, "--out", tmp_path / "model",
        "--into-base", small_base,
    )  # fmt: skip
    assert code == 0, err
    assert "folded" in out
    before = oracles.read_tensors(small_base / "model.safetensors")
    after = oracles.read_tensors(tmp_path / "model" / "model.safetensors")
    want = oracles.soup([experts / "concise", experts / "friendly"], [0.5, 0.5])
    for module, delta in want.items():
        name = f"{module}.weight"
        assert oracles.relative_error(after[name], before[name] + delta) < 1e-6
    code, _, err = psoups(
        capsys, "merge", "--weights", "concise=0.5", "--experts", experts, "--out", tmp_path / "model2",
        "--into-base", small_base, "--dtype", "float16",
    )  # fmt: skip
    assert code == 2
    assert "keeps its base's dtypes" in err


FAULTS: dict[str, tuple[list[Any], str]] = {
    "neither profile nor weights": ([], "must be given, but neither is given"),
    "both": (["p.yaml", "--weights", "concise=1"], "must be given, but both are given"),
    "unknown expert": (["--weights", "consice=1"], "did you mean 'concise'?"),
    "opposed sides": (["--weights", "friendly=1,unfriendly=1"], "two sides of one dimension"),
    "weights that are no numbers": (["--weights", "concise=much"], "is not a number"),
    "all zero": (["--weights", "concise=0"], "all weights are zero"),
    "not finite": (["--weights", "concise=nan"], "not finite"),
    "unknown method": (["--weights", "concise=1", "--method", "linaer"], "did you mean 'linear'?"),
    "no such rank": (["--weights", "concise=1", "--rank", "0"], "at least 1"),
    "no such device": (["--weights", "concise=1", "--device", "tpu"], "unknown device"),
    "no such base": (["--weights", "concise=1", "--into-base", "/nowhere"], "neither a folder nor a hub id"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_have_what_where_and_mend_and_exit_with_2(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    arguments, message = FAULTS[fault]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = psoups(capsys, "merge", *arguments, "--experts", experts, "--out", tmp_path / "soup")
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert "\n   at: " in err
    assert "\n mend: " in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_opposed_sides_can_be_allowed(tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--weights", "friendly=1,unfriendly=1", "--allow-opposed", "--dry-run"]
    assert psoups(capsys, "merge", *args, "--experts", experts)[0] == 0


def test_missing_options_are_usage_errors(tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert psoups(capsys, "merge", "--weights", "concise=1", "--out", tmp_path / "o")[0] == 2
    assert psoups(capsys, "merge", "--weights", "concise=1", "--experts", experts)[0] == 2


def test_a_damaged_expert_is_reported_without_a_traceback(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experts / "concise" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    write_config(experts / "friendly", use_dora=True)
    code, _, err = psoups(
        capsys, "merge", "--weights", "concise=1,friendly=1", "--experts", experts, "--out", tmp_path / "soup"
    )
    assert code == 2
    assert "2 errors" in err
    assert str(path) in err
    assert "use_dora" in err


def test_an_output_that_exists_needs_overwrite(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["merge", "--weights", "concise=1", "--experts", experts, "--out", tmp_path / "soup"]
    assert psoups(capsys, *args)[0] == 0
    code, _, err = psoups(capsys, *args)
    assert code == 2
    assert "--overwrite" in err
    assert psoups(capsys, *args, "--overwrite")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_exits_1(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    full = os.open("/dev/full", os.O_WRONLY)
    write = os.write
    # the kernel itself says ENOSPC
    monkeypatch.setattr(os, "pwrite", lambda _descriptor, data, _place: write(full, data))
    code, _, err = psoups(capsys, "merge", "--weights", "concise=1", "--experts", experts, "--out", tmp_path / "soup")
    os.close(full)
    assert code == 1
    assert "no space is left" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts"]


def test_the_whole_command_imports_neither_transformers_nor_peft(tmp_path: Path, experts: Path) -> None:
    code = (
        "import sys\nfrom personalized_soups.cli.app import build_app\n"
        "try:\n    build_app()(sys.argv[1:])\nfinally:\n"
        "    print(*sorted({'transformers', 'peft', 'trl', 'safetensors', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    args = ["merge", "--weights", "concise=1", "--experts", str(experts), "--out", str(tmp_path / "soup"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, timeout=280)
    assert done.stdout.splitlines()[-1] == ""


DRY_FAULTS = {
    "no such base": (["--into-base", "/nowhere"], "neither a folder nor a hub id"),
    "no such device": (["--device", "tpu"], "unknown device"),
    "an index beyond reason": (["--device", "cuda:" + "9" * 30], "there is no device"),
    "an output that exists": (["--out", "."], "exists already"),
}


@pytest.mark.parametrize("fault", DRY_FAULTS)
def test_a_dry_run_reports_the_errors_of_the_run(experts: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    arguments, message = DRY_FAULTS[fault]
    code, out, err = psoups(capsys, "merge", "--weights", "concise=1", "--experts", experts, "--dry-run", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_dry_run_into_an_incompatible_base_reports_it(
    tmp_path: Path, small_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_expert(tmp_path / "lib" / "a", shapes={"model.layers.0.self_attn.q_proj": (8, 8)})
    write_expert(tmp_path / "fits" / "a")
    common = ("merge", "--weights", "a=1", "--dry-run", "--into-base", small_base, "--experts")
    assert psoups(capsys, *common, tmp_path / "fits")[0] == 0
    code, _, err = psoups(capsys, *common, tmp_path / "lib")
    assert code == 2
    assert "do not fit the base" in err


def test_a_base_is_read_for_tensors_that_are_relative_to_it(
    tmp_path: Path, small_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_expert(tmp_path / "experts" / "dora", base=str(small_base), use_dora=True)
    path = folder / "adapter_model.safetensors"
    tensors: dict[str, tuple[str, Any]] = {name: ("F32", value) for name, value in oracles.read_tensors(path).items()}
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        magnitude = f"{name.removesuffix('B.weight')}magnitude_vector"
        tensors[magnitude] = ("F32", 1 + 0 * tensors[name][1][:, 0])
    oracles.write_tensors(path, tensors, {"format": "pt"})
    given = ("merge", "--weights", "dora=0.5", "--experts", tmp_path / "experts", "--out", tmp_path / "out")
    code, _, err = psoups(capsys, *given)
    assert code == 2
    assert "is relative to the base, but no base is given" in err
    code, _, err = psoups(capsys, *given, "--base", small_base, "--into-base", small_base)
    assert (code, "--base and --into-base are both given" in err) == (2, True)
    code, _, _ = psoups(capsys, *given, "--base", small_base, "--dry-run")
    assert code == 0
    assert not (tmp_path / "out").exists()
    code, _, _ = psoups(capsys, *given, "--base", small_base)
    assert code == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True
    assert json.loads((tmp_path / "out" / "soup.json").read_text())["base_folder"] == str(small_base.resolve())
    assert psoups(capsys, "verify", tmp_path / "out")[0] == 0


def test_an_unknown_copy_mode_is_reported_for_adapters_and_models(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--weights", "concise=1", "--experts", experts, "--out", tmp_path / "out", "--untouched", "lnk")
    code, _, err = psoups(capsys, "merge", *args)
    assert (code, "did you mean 'link'?" in err) == (2, True)
