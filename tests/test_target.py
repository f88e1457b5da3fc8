"""Targets from their checkpoints: of every family, as released, and never with a weight made up."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.support.tiny_heads import CONFIGS, config
from vllm_bebop.draft import read_draft
from vllm_bebop.tensor_files import CheckpointError, read_json
from vllm_bebop.train.heads import head_tensors, initial_head, new_head
from vllm_bebop.train.loop import Settings
from vllm_bebop.train.rollout import target_hidden_states
from vllm_bebop.train.run import train_draft
from vllm_bebop.train.target import empty_target, find_checkpoint, load_target

CPU = torch.device("cpu")
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(family: str, directory: Path) -> PreTrainedModel:
    """A random target as its family's checkpoints are: Qwen3.5's hold a vision tower too, and longer names."""
    torch.manual_seed(0)
    described = AutoConfig.for_model(**config(family))
    build = AutoModelForCausalLM
    if "text_config" in CONFIGS[family]:
        build = AutoModelForImageTextToText
        for key, value in VISION.items():
            setattr(described.vision_config, key, value)
    model = build.from_config(described).eval()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_load_target_holds_what_was_saved(family: str, tmp_path: Path) -> None:
    saved, token_ids = save(family, tmp_path), torch.arange(20)[None]
    target = load_target(tmp_path, CPU)
    assert torch.equal(target(token_ids).logits, saved(token_ids).logits)
    assert not any(parameter.requires_grad for parameter in target.parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_empty_target_is_the_same_without_weights(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    shapes = []
    for target in (load_target(tmp_path, CPU), empty_target(tmp_path)):
        shapes.append({name: tensor.shape for name, tensor in target.state_dict().items()})
        shapes[-1] |= {name: tensor.shape for name, tensor in target.named_buffers()}
        head = new_head(target)
        shapes[-1] |= {
            f"head {name}": tensor.shape for name, tensor in (*head.named_parameters(), *head.named_buffers())
        }
    assert shapes[0] == shapes[1]
    assert {tensor.device.type for tensor in (*target.parameters(), *head.parameters(), *head.buffers())} == {"meta"}


def test_load_target_refuses_weights_that_are_not_there(tmp_path: Path) -> None:
    save("mimo", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    for tensors in ({n: t for n, t in whole.items() if n != norm}, whole | {norm: torch.ones(3)}):
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"lacks the target's {norm}"):
            load_target(tmp_path, CPU)


def test_load_target_with_tied_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config("mimo", tie_word_embeddings=True)))
    saved.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    target = load_target(tmp_path, CPU)
    assert target.get_output_embeddings().weight is target.get_input_embeddings().weight


def test_find_checkpoint_says_what_it_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(tmp_path) == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="nowhere/at/all: neither an existing directory nor a Hub repository"):
        find_checkpoint("nowhere/at/all")


@pytest.mark.parametrize("family", CONFIGS)
def test_train_draft_of_every_family_from_its_checkpoint(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "target")
    generator = torch.Generator().manual_seed(0)
    lines = [{"token_ids": torch.randint(96, (20,), generator=generator).tolist()} for _ in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = Settings(num_steps=2, learning_rate=1e-3, batch_rows=1, context=64, max_updates=2)
    draft = train_draft(tmp_path / "target", [tmp_path / "data.jsonl"], tmp_path / "draft", settings)
    assert draft is not None
    target_config = read_json(tmp_path / "target" / "config.json")
    assert read_draft(draft.path, target_config, tmp_path / "target").warnings == ()
    target = load_target(tmp_path / "target", CPU)
    started = head_tensors(initial_head(tmp_path / "target", target))
    changed = {name for name, tensor in draft.weights() if not torch.equal(tensor, started[name].to(tensor.dtype))}
    assert any("experts" in name or "mlp" in name for name in changed) and any("self_attn" in n for n in changed)


@torch.no_grad()
def test_compressed_tensors_are_decompressed_as_they_are_loaded(tmp_path: Path) -> None:
    """Their own hook waits for a call of the whole model, of which training calls the backbone only."""
    pytest.importorskip("compressed_tensors")
    model = save("mimo", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if name.endswith("proj.weight")]:
        scale = stored[name].abs().amax(1, keepdim=True) / 448
        stored[name + "_scale"], stored[name] = scale, (stored[name] / scale).to(torch.float8_e4m3fn)
        model.state_dict()[name].copy_(stored[name].float() * scale)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    described = read_json(tmp_path / "config.json") | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"],
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    token_ids = torch.arange(10)[None]
    loaded, exact = (target_hidden_states(each, token_ids)[0] for each in (load_target(tmp_path, CPU), model))
    torch.testing.assert_close(loaded, exact)
