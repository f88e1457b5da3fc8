"""A draft directory gives a target its head: one that lost its own, or another one; and what is loaded is checked."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engines import BEBOP, TINY_MODEL, accepted_per_position, engine, runner, token_ids
from vllm_bebop.draft import DraftError, draft_config, fingerprint, head_tensor_names, write_draft
from vllm_bebop.engine.versions import vllm_release
from vllm_bebop.merge import merge

PROMPTS = ["import os", "The return value", "x = [1, 2", "def read", "for name in", "class A"]


@pytest.fixture(scope="module")
def checkpoint():
    config = json.loads((TINY_MODEL / "config.json").read_text())
    tensors = load_file(TINY_MODEL / "model.safetensors")
    head = {name: tensors[name] for name in head_tensor_names(TINY_MODEL, config)}
    return config, tensors, head


def _served(llm):
    from vllm import SamplingParams

    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=40, ignore_eos=True) for i in range(len(PROMPTS))]
    return token_ids(llm.generate(PROMPTS, params, use_tqdm=False)), accepted_per_position(llm)


@pytest.fixture(scope="module")
def native():
    with engine(BEBOP) as llm:
        return _served(llm)


def test_draft_overlays_a_target_that_lost_its_head(checkpoint, native, tmp_path):
    """Transformers drops `mtp.*` when it saves a fine-tuned model; the head comes back from its own directory."""
    config, tensors, head = checkpoint
    target = tmp_path / "finetuned"
    shutil.copytree(TINY_MODEL, target)
    rest = {name: tensor for name, tensor in tensors.items() if name not in head}
    save_file(rest, target / "model.safetensors", {"format": "pt"})
    draft = write_draft(tmp_path / "draft", head, draft_config(config), {"base_fingerprint": fingerprint(target)})
    with engine(BEBOP | {"model": str(draft.path)}, model=str(target), tokenizer=str(TINY_MODEL)) as llm:
        assert _served(llm) == native


def test_draft_replaces_the_targets_own_head(checkpoint, native, tmp_path):
    """A head whose output norm is zero drafts from the uniform distribution, and the text is still the target's."""
    config, _, head = checkpoint
    useless = {name: tensor * 0 - 1 if name == "mtp.norm.weight" else tensor for name, tensor in head.items()}
    draft = write_draft(tmp_path / "draft", useless, draft_config(config))
    with engine(BEBOP | {"model": str(draft.path)}) as llm:
        _, (rounds, accepted) = _served(llm)
    native_rounds, native_accepted = native[1]
    assert accepted[0] / rounds < 0.5 * native_accepted[0] / native_rounds


def test_merged_checkpoint_drafts_in_stock_vllm_as_the_draft_does_in_bebop(checkpoint, tmp_path):
    """Greedily, where both accept a draft that is the target's likeliest token: the same text, the same counts.

    The head is a damaged one, so that another head, the target's own above all, would be accepted more.
    """
    from vllm import SamplingParams

    config, _, head = checkpoint
    generator = torch.Generator().manual_seed(0)
    noise = head["mtp.fc.weight"].std() * torch.randn(head["mtp.fc.weight"].shape, generator=generator)
    damaged = head | {"mtp.fc.weight": (head["mtp.fc.weight"] + 0.7 * noise).bfloat16()}
    draft = write_draft(tmp_path / "draft", damaged, draft_config(config))
    merged = merge(TINY_MODEL, draft.path, tmp_path / "merged")
    assert merged.num_replaced == len(head)

    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    results = []
    for speculation, model in (
        (BEBOP | {"model": str(draft.path)}, TINY_MODEL),
        ({"method": "mtp", "num_speculative_tokens": 3}, merged.path),
    ):
        with engine(speculation, model=str(model)) as llm:
            tokens = token_ids(llm.generate(PROMPTS, params, use_tqdm=False))
            results.append((tokens, *accepted_per_position(llm)))
    (bebop, rounds, accepted), stock = results
    assert stock == (bebop, rounds, accepted)
    assert 0 < accepted[0] < rounds


def test_draft_of_other_weights_warns_loudly(checkpoint, tmp_path, monkeypatch):
    config, _, head = checkpoint
    draft = write_draft(tmp_path / "draft", head, draft_config(config), {"base_fingerprint": "0" * 64})
    records = []
    monkeypatch.setattr(logging.getLogger("vllm.bebop"), "warning", lambda text, *a: records.append(text % a))
    with engine(BEBOP | {"model": str(draft.path)}):
        pass
    assert any("trained for a base model with fingerprint 000000000000" in record for record in records)


def test_what_the_engine_holds_is_compared_with_the_file(checkpoint, monkeypatch):
    """A loader that forgets a tensor, and one that garbles it, as upstream's could: both stop the start."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    honest = DefaultModelLoader.get_all_weights

    def forget(self, model_config, model):
        return ((name, tensor) for name, tensor in honest(self, model_config, model) if name != "mtp.fc.weight")

    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", forget)
    with pytest.raises(DraftError, match="not .fully. loaded: model.fc.weight"), engine(BEBOP):
        pass

    from vllm_bebop.engine import draft_loader

    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", honest)
    load = DefaultModelLoader.load_weights

    def garble(self, model, model_config):
        load(self, model, model_config)
        if isinstance(self, draft_loader.BebopDraftLoader):
            model.model.fc.weight.data[0, 0] += 1

    monkeypatch.setattr(DefaultModelLoader, "load_weights", garble)
    with pytest.raises(DraftError, match="differ from the"), engine(BEBOP):
        pass


def test_dummy_target_still_gets_a_real_head():
    """verl starts with load_format=dummy and sends the target's weights later; nobody sends the head's."""
    with engine(BEBOP, load_format="dummy") as llm:
        head = runner(llm).drafter.model
        stored = load_file(TINY_MODEL / "model.safetensors")["mtp.norm.weight"].float()
        assert (head.model.norm.weight.cpu() == stored).all()


class _Transfer:
    """What vLLM's worker calls of a weight transfer engine; a push is a list of named tensors."""

    supports_draft_weight_update = True

    def __init__(self, target):
        self.target = self.model = target

    def set_weight_update_target(self, model, _config):
        self.model = model

    def reset_weight_update_target(self):
        self.model = self.target

    def start_weight_update(self):
        pass

    finish_weight_update = shutdown = start_weight_update

    def update_weights(self, pushed):
        self.model.load_weights(iter(pushed["weights"]))
        if pushed.get("fails"):
            raise ConnectionError("the trainer is gone")


@pytest.mark.parametrize("has_draft", [True, False])
def test_only_a_push_meant_for_it_replaces_a_drafts_head(checkpoint, tmp_path, monkeypatch, has_draft):
    """verl and NeMo-RL push the target's weights into the drafter; the target's own head is to follow them."""
    config, _, head = checkpoint
    name = "mtp.norm.weight"  # a matrix cannot be loaded twice on a CPU, which packs them
    draft = write_draft(tmp_path / "draft", head, draft_config(config))
    from vllm_bebop.engine import pushed_head

    warnings = []
    monkeypatch.setattr(pushed_head.logger, "warning", lambda *args: warnings.append(args))
    with engine(BEBOP | ({"model": str(draft.path)} if has_draft else {})) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        drafter = runner(llm).drafter.model
        norm = drafter.model.norm.weight
        loaded = norm.data.clone()
        stored = head[name].float()
        for shift in (1, 2):
            drafter.load_weights(iter([(name, stored + shift)]))
            assert (norm == loaded + (0 if has_draft else shift)).all()
        assert len(warnings) == has_draft
        if not hasattr(worker, "get_draft_model"):
            return  # before 0.26, no push is meant for a head
        worker.weight_transfer_engine = _Transfer(runner(llm).get_model())
        llm.collective_rpc("start_draft_weight_update")
        llm.collective_rpc("update_weights", args=({"weights": [(name, stored + 3)]},))
        llm.collective_rpc("finish_weight_update")
        assert (norm == loaded + 3).all()
        drafter.load_weights(iter([(name, stored)]))
        assert (norm == loaded + (3 if has_draft else 0)).all()
        llm.collective_rpc("start_draft_weight_update")
        with pytest.raises(ConnectionError):
            llm.collective_rpc("update_weights", args=({"weights": [(name, stored + 4)], "fails": True},))
        drafter.load_weights(iter([(name, stored)]))
        assert (norm == loaded + (4 if has_draft else 0)).all()


@pytest.mark.parametrize("scales_stored", [False, True])
def test_compressed_tensors_target_that_spares_its_head_starts(native, tmp_path, scales_stored):
    """Such a quantization_config gives every attention scales and zero points, the head's too."""
    pytest.importorskip("compressed_tensors")
    if scales_stored and vllm_release() < (0, 25):
        pytest.skip("this vLLM's heads take no scales of the KV cache")
    target = tmp_path / "target"
    shutil.copytree(TINY_MODEL, target)
    config = json.loads((target / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = weights | {"strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["re:.*"],
    }
    (target / "config.json").write_text(json.dumps(config))
    if scales_stored:
        scales = {f"mtp.layers.0.self_attn.{name}_scale": torch.tensor([0.5]) for name in "kv"}
        tensors = load_file(target / "model.safetensors")
        save_file(tensors | scales, target / "model.safetensors", {"format": "pt"})
    with engine(BEBOP, model=str(target)) as llm:
        assert _served(llm) == native


def test_head_whose_experts_are_padded_starts(native, monkeypatch):
    """As for kernels that want sizes in multiples of 256; the tiny model's experts have 128."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as upstream

    if "weight_loader_numel" not in Path(upstream.__file__).read_text():
        pytest.skip("this vLLM does not say what of its experts is padding")
    create, sizes = upstream.UnquantizedFusedMoEMethod.create_weights, set()

    def create_zeros(self, layer, *args, **kwargs):  # the target's padding is left to the kernels that want it
        create(self, layer, *args, **kwargs)
        sizes.add(layer.w2_weight.shape[-1])
        for parameter in (layer.w13_weight, layer.w2_weight):
            parameter.data.zero_()

    monkeypatch.setattr(upstream.UnquantizedFusedMoEMethod, "create_weights", create_zeros)
    monkeypatch.setattr(
        upstream,
        "unquantized_round_up_hidden_size_and_intermediate_size",
        lambda backend, hidden_size, intermediate_size: (hidden_size, -(-intermediate_size // 256) * 256),
    )
    with engine(BEBOP) as llm:
        assert sizes == {256}
        assert _served(llm) == native


def test_context_that_overrides_extend_is_drafted_for():
    """Model runner V1 drafts for no request of a batch in which one is longer than the draft allows."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": [5 + i % 50 for i in range(1100)]}  # config.json ends at 1024
    with engine(BEBOP, max_model_len=2048, hf_overrides={"max_position_embeddings": 4096}, max_num_seqs=4) as llm:
        llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True), use_tqdm=False)
        rounds, accepted = accepted_per_position(llm)
    assert 0 < accepted[0] <= rounds < 40
