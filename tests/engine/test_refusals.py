"""Bad configs and bad drafts end `vllm serve` at once, with a message that names the fault, before any model loads."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engines import ROOT, TINY_MODEL
from vllm_bebop.draft import draft_config, head_tensor_names, write_draft

FC = "mtp.fc.weight"


def _bad_drafts(directory):
    """Writes one good draft and spoilt copies of it; returns {name: path}."""
    config = json.loads((TINY_MODEL / "config.json").read_text())
    tensors = load_file(TINY_MODEL / "model.safetensors")
    head = {name: tensors[name] for name in head_tensor_names(TINY_MODEL, config)}
    write_draft(directory / "good", head, draft_config(config))

    def spoilt(name, change_tensors=None, change_config=None):
        path = directory / name
        shutil.copytree(directory / "good", path)
        if change_tensors is not None:
            changed = dict(head)
            change_tensors(changed)
            save_file(changed, path / "model.safetensors", {"format": "pt"})
        if change_config is not None:
            (path / "config.json").write_text(
                json.dumps(json.loads((path / "config.json").read_text()) | change_config)
            )
        return path

    spoilt("no_fc", lambda t: t.pop(FC))
    spoilt("one_expert_missing", lambda t: t.pop(next(name for name in sorted(t) if "experts" in name)))
    spoilt("backbone_too", lambda t: t.update({"model.norm.weight": torch.zeros(4)}))
    spoilt("wrong_shape", lambda t: t.update({FC: torch.zeros(3, 3)}))
    spoilt("holds_nan", lambda t: t.update({FC: torch.full_like(t[FC], float("nan"))}))
    spoilt("holds_inf", lambda t: t.update({FC: torch.full_like(t[FC], float("inf"))}))
    spoilt("wrong_dtype", lambda t: t.update({FC: t[FC].to(torch.int8)}))
    spoilt("other_size", change_config={"hidden_size": 4096})
    spoilt("other_family", change_config={"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"]})
    spoilt("no_family", change_config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    spoilt("my-eagle3-draft")
    (spoilt("no_config") / "config.json").unlink()
    (spoilt("bad_json") / "config.json").write_text("{")
    (spoilt("no_weights") / "model.safetensors").unlink()
    (spoilt("pickle") / "model.safetensors").rename(directory / "pickle" / "pytorch_model.bin")
    truncated = spoilt("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    (spoilt("escape") / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {FC: "../good/model.safetensors"}})
    )
    (directory / "a_file").write_text("")

    headless = directory / "headless_target"
    shutil.copytree(TINY_MODEL, headless)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in head},
        headless / "model.safetensors",
        {"format": "pt"},
    )
    return headless


BAD_CONFIGS = {
    # name: (changes to the config, environment, what the log must say)
    "zero tokens": ({"num_speculative_tokens": 0}, {}, "'num_speculative_tokens': 0 must be a whole number from 1"),
    "tokens as text": ({"num_speculative_tokens": "3"}, {}, "'num_speculative_tokens': '3' must be"),
    "unknown acceptance": ({"acceptance": "lossy"}, {}, "accepted: rejection, block, target_only"),
    "unknown key": ({"gamma": 3}, {}, "unknown key 'gamma'"),
    "synthetic": ({"rejection_sample_method": "synthetic"}, {}, "is not lossless"),
    "block": ({"rejection_sample_method": "block"}, {}, "'block' is not accepted"),
    "greedy drafts": ({"draft_sample_method": "greedy"}, {}, "'draft_sample_method': 'greedy' contradicts"),
    "model not text": ({"model": 3}, {}, "'model': 3 must be a non-empty string"),
    "unknown variable": ({"method": "mtp"}, {"VLLM_BEBOP": "1", "VLLM_BEBOP_K": "3"}, "unknown variable VLLM_BEBOP_K"),
    "contradiction": (
        {"method": "mtp"},
        {"VLLM_BEBOP": "1", "VLLM_BEBOP_NUM_SPECULATIVE_TOKENS": "2"},
        "contradicts 'num_speculative_tokens': 3",
    ),
}
BAD_DRAFTS = {
    "missing": "neither an existing directory nor a Hub repository",
    "a_file": "is a file, not a directory",
    "no_config": "config.json",
    "bad_json": "config.json",
    "no_weights": "safetensors",
    "pickle": "pytorch_model.bin",
    "truncated": "model.safetensors",
    "escape": "../good/model.safetensors",
    "no_fc": FC,
    "one_expert_missing": "experts",
    "backbone_too": "model.norm.weight",
    "wrong_shape": FC,
    "holds_nan": "NaN or infinite",
    "holds_inf": "NaN or infinite",
    "wrong_dtype": "I8",
    "other_size": "hidden_size is 4096",
    "other_family": "GLM",
    "no_family": "llama",
    "my-eagle3-draft": "eagle3",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("drafts")
    headless = _bad_drafts(directory)

    def case(changes, environ=None, model=TINY_MODEL):
        config = {"method": "bebop", "num_speculative_tokens": 3} | changes
        argv = [str(model), "--enforce-eager", "--max-model-len", "64", "--speculative-config", json.dumps(config)]
        return {"argv": argv, "env": environ or {}}

    cases = {name: case(changes, environ) for name, (changes, environ, _) in BAD_CONFIGS.items()}
    cases |= {name: case({"model": str(directory / name)}) for name in BAD_DRAFTS}
    cases["headless target"] = case({}, model=headless)
    (directory / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.support.serve_many", directory / "cases.json", directory / "results.json"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((directory / "results.json").read_text())


def _assert_refused(result, message):
    assert result["exit_code"] not in (0, -14), result["log"][-3000:]  # -14: still running when the alarm rang
    assert message in result["log"], result["log"][-3000:]
    assert "Starting to load model" not in result["log"]


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config_is_refused(results, name):
    _assert_refused(results[name], BAD_CONFIGS[name][2])


@pytest.mark.parametrize("name", BAD_DRAFTS)
def test_bad_draft_is_refused(results, name):
    _assert_refused(results[name], BAD_DRAFTS[name])


def test_target_without_a_head_is_refused(results):
    _assert_refused(results["headless target"], "the head was lost on export; add a draft")
