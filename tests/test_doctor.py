"""What `bebop doctor` says of drafts, models and the installation."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from tests.support.tiny_heads import config, head
from vllm_bebop import doctor
from vllm_bebop.draft import fingerprint, write_draft

TARGET = config("qwen3_next")


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TARGET))
    save_file({"model.embed_tokens.weight": torch.ones(96, 64)} | head(TARGET), directory / "model.safetensors")
    return directory


def test_check_draft_of_a_good_draft(tmp_path, model):
    write_draft(tmp_path / "draft", head(TARGET), TARGET, {"base_fingerprint": fingerprint(model)})
    rows = doctor.check_draft(model, tmp_path / "draft")
    assert all(row.ok for row in rows)
    text = "\n".join(row.detail for row in rows)
    assert "complete Qwen3-Next head, 1 layer(s), 29 tensors" in text
    assert "trained for these weights" in text


def test_check_draft_gives_each_problem_a_row(tmp_path, model):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text(json.dumps(config("qwen3_next", vocab_size=7)))
    save_file({name: t for name, t in head(TARGET).items() if name != "mtp.fc.weight"}, bad / "model.safetensors")
    rows = doctor.check_draft(model, bad)
    assert [row.ok for row in rows] == [False, False]
    assert "vocab_size is 7" in rows[0].detail and "mtp.fc.weight" in rows[1].detail


def test_check_draft_warns_of_another_base_model(tmp_path, model):
    write_draft(tmp_path / "draft", head(TARGET), TARGET, {"base_fingerprint": "0" * 64})
    (row,) = [row for row in doctor.check_draft(model, tmp_path / "draft") if row.ok is not True]
    assert row.ok is None, "a warning, no failure"
    assert row.name == "draft and target" and "fingerprint 000000000000" in row.detail


def test_check_draft_needs_a_target(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (row,) = doctor.check_draft(tmp_path / "absent", tmp_path)
    assert not row.ok and "neither a directory nor a model in the local Hub cache" in row.detail


def test_check_model_head(model):
    (row,) = doctor.check_model_head(model)
    assert row.ok and "complete Qwen3-Next head" in row.detail
    save_file({"model.embed_tokens.weight": torch.ones(96, 64)}, model / "model.safetensors")
    (row,) = doctor.check_model_head(model)
    assert not row.ok and "the head was lost on export" in row.detail


def test_check_model_head_finds_what_is_not_finite(model):
    save_file(head(TARGET) | {"mtp.norm.weight": torch.full((64,), torch.nan)}, model / "model.safetensors")
    (row,) = doctor.check_model_head(model)
    assert row.ok is False and "mtp.norm.weight has 64 NaN or infinite values" in row.detail


def test_the_target_named_as_draft_is_its_own_head(model):
    """As the server has it."""
    assert doctor.check_draft(model, model) == doctor.check_model_head(model)
    assert doctor.check_model_head(model)[0].ok


def test_check_model_head_refuses_a_path_that_vllm_would_misread(tmp_path, model):
    moved = tmp_path / "eagle-runs" / "model"
    moved.parent.mkdir()
    model.rename(moved)
    (row,) = doctor.check_model_head(moved)
    assert row.ok is False and "eagle-" in row.detail


def test_check_draft_fails_where_the_target_quantises_its_head(tmp_path, model):
    write_draft(tmp_path / "draft", head(TARGET), TARGET)
    (model / "config.json").write_text(json.dumps(TARGET | {"quantization_config": {"quant_method": "fp8"}}))
    (row,) = doctor.check_draft(model, tmp_path / "draft")
    assert row.ok is False and "its head included" in row.detail


def test_check_environment_without_anything_installed(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    rows = {row.name: row for row in doctor.check_environment()}
    assert [rows[name].ok for name in ("PyTorch", "Triton", "vLLM")] == [False, False, False]


@pytest.mark.parametrize(("ok", "word", "exit_code"), [(True, "ok", 0), (None, "warn", 0), (False, "FAIL", 1)])
def test_doctor_fails_for_failures_only(monkeypatch, ok, word, exit_code):
    from typer.testing import CliRunner

    from vllm_bebop.cli import app

    monkeypatch.setattr(doctor, "check_environment", lambda: [doctor.Check("what", ok, "why")])
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.output.split(), result.exit_code) == ([word, "what:", "why"], exit_code)


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_check_environment_names_everything_that_is_needed(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    rows = {row.name: row for row in doctor.check_environment()}
    assert {"PyTorch", "Triton", "plugin", "VLLM_PLUGINS"} <= rows.keys()
    assert rows["PyTorch"].detail.startswith(torch.__version__)
    assert rows["plugin"].ok and "vllm_bebop.plugin:register" in rows["plugin"].detail


@pytest.mark.parametrize(
    ("allowed", "ok"),
    [(None, True), ("bebop", True), ("other,bebop", True), ("other", False), ("", False), ("other, bebop", False)],
)
def test_vllm_plugins_may_leave_the_plugin_out(monkeypatch, allowed, ok):
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    row = doctor._check_allow_list()
    assert row.ok == ok and ("add 'bebop'" in row.detail) == (not ok)


def test_a_plugin_that_vllm_cannot_see_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "PLUGIN", "not_installed")
    assert not doctor._check_plugin().ok
