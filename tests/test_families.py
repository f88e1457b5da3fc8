"""Names, shapes and numerics of every head family, against released checkpoints and against vLLM itself."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.engines import ROOT, environment_for_every_family
from tests.support.tiny_heads import CONFIGS, config
from vllm_bebop.families import FAMILIES, PER_EXPERT, STACKED, FamilyError, recognise

NAMES = {
    "qwen3_next": "Qwen3-Next",
    "qwen3_5": "Qwen3.5 dense",
    "qwen3_5_text": "Qwen3.5 dense",
    "qwen3_5_moe": "Qwen3.5 MoE",
    "deepseek_v3": "DeepSeek-V3",
    "glm4_moe": "GLM-4.x MoE",
    "mimo": "MiMo",
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_recognise_by_model_type_or_architecture(model_type):
    assert recognise(config(model_type)).name == NAMES[model_type]
    by_architecture = {**config(model_type), "model_type": "something_else"}
    assert recognise(by_architecture).name == NAMES[model_type]


@pytest.mark.parametrize(
    "unsupported",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "mimo_v2", "architectures": ["MiMoV2ForCausalLM"]},
        {**CONFIGS["deepseek_v3"], "index_topk": 2048},  # DeepSeek-V3.2's layer has an indexer
        {},
    ],
)
def test_recognise_refuses_and_lists_what_is_supported(unsupported):
    with pytest.raises(FamilyError, match=r"no MTP head that is supported; .* qwen3_next, .* mimo"):
        recognise(unsupported)


def test_numerics_of_every_family():
    """Read from vLLM 0.32's forward methods. A wrong entry trains a head that is accepted less, without an error."""
    columns = {
        f.name: (f.hidden_in, f.concat[0], f.zero_embedding_at_0, f.hidden_recycled, f.norm_adds_one) for f in FAMILIES
    }
    qwen = ("post_norm", "embedding", False, "post_norm", True)
    assert columns == {
        "Qwen3-Next": qwen,
        "Qwen3.5 dense": qwen,
        "Qwen3.5 MoE": qwen,
        "DeepSeek-V3": ("post_norm", "embedding", True, "post_norm", False),
        "GLM-4.x MoE": ("post_norm", "embedding", True, "pre_norm", False),
        "MiMo": ("pre_norm", "hidden", True, "post_norm", False),
    }


def test_mimo_names_are_those_of_the_released_checkpoint():
    attention = ["self_attn.o_proj.weight"]
    attention += [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    norms = ["token_layernorm", "hidden_layernorm", "final_layernorm", "input_layernorm", "post_attention_layernorm"]
    mlp = [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    released = ["input_proj.weight", *attention, *mlp, *(f"{norm}.weight" for norm in norms)]
    assert set(_expected("mimo")) == {f"model.mtp_layers.0.{name}" for name in released}


def test_deepseek_shapes_are_those_of_the_released_checkpoint():
    released = {
        "eh_proj.weight": (7168, 14336),
        "shared_head.norm.weight": (7168,),
        "self_attn.q_a_proj.weight": (1536, 7168),
        "self_attn.q_b_proj.weight": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "self_attn.kv_b_proj.weight": (32768, 512),
        "self_attn.o_proj.weight": (7168, 16384),
        "mlp.gate.weight": (256, 7168),
        "mlp.gate.e_score_correction_bias": (256,),
        "mlp.experts.255.down_proj.weight": (7168, 2048),
        "mlp.shared_experts.gate_proj.weight": (2048, 7168),
    }
    sizes = {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "moe_intermediate_size": 2048}
    ranks = {"q_lora_rank": 1536, "kv_lora_rank": 512}
    heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    expected = _expected("deepseek_v3", **sizes, **ranks, **heads, n_routed_experts=256, n_shared_experts=1)
    assert {name: expected[f"model.layers.61.{name}"] for name in released} == released


def test_qwen_moe_has_as_many_tensors_as_the_released_checkpoints():
    """Qwen3.6-35B-A3B stores its experts stacked (19 tensors), its FP8 build one by one (785)."""
    full = config("qwen3_5_moe", num_experts=256)
    family = recognise(full)
    assert len(family.expected_tensors(full)) == len(family.expected_tensors(full, STACKED)) == 19
    assert len(family.expected_tensors(full, PER_EXPERT)) == 785


def test_qwen_query_projection_also_yields_the_output_gate():
    assert _expected("qwen3_next")["mtp.layers.0.self_attn.q_proj.weight"] == (2 * 4 * 32, 64)
    assert _expected("qwen3_next", attn_output_gate=False)["mtp.layers.0.self_attn.q_proj.weight"] == (4 * 32, 64)


@pytest.mark.parametrize(
    ("model_type", "key", "default"),
    [
        ("qwen3_next", "num_nextn_predict_layers", 1),  # absent from the released config.json
        ("qwen3_5", "mtp_num_hidden_layers", 1),
        ("deepseek_v3", "num_nextn_predict_layers", 1),
        ("glm4_moe", "num_nextn_predict_layers", 1),
        ("mimo", "num_nextn_predict_layers", 0),
    ],
)
def test_num_layers_key_and_default(model_type, key, default):
    family = recognise(config(model_type))
    for count in (0, 1, 3):
        assert family.num_layers(config(model_type, **{key: count})) == count
    absent = config(model_type)
    absent.get("text_config", absent).pop(key, None)
    assert family.num_layers(absent) == default
    assert not family.expected_tensors(config(model_type, **{key: 0}))


@pytest.mark.parametrize(
    ("model_type", "key", "prefixes"),
    [
        ("qwen3_next", "num_nextn_predict_layers", ("mtp.",)),
        ("glm4_moe", "num_nextn_predict_layers", ("model.layers.2.", "model.layers.3.")),
        ("mimo", "num_nextn_predict_layers", ("model.mtp_layers.0.", "model.mtp_layers.1.")),
    ],
)
def test_two_layers_have_twice_the_layer_tensors(model_type, key, prefixes):
    one, two = config(model_type, **{key: 1}), config(model_type, **{key: 2})
    family = recognise(one)
    assert family.prefixes(two) == prefixes
    shared = 4 if model_type == "qwen3_next" else 0  # fc and three norms stand outside the layers
    assert len(family.expected_tensors(two)) - shared == 2 * (len(family.expected_tensors(one)) - shared)


def test_expected_tensors_names_a_missing_size():
    with pytest.raises(FamilyError, match="config.json has no 'kv_lora_rank'"):
        _expected("deepseek_v3", kv_lora_rank=None)


def test_expected_tensors_refuses_a_layout_that_vllm_does_not_read():
    with pytest.raises(FamilyError, match="vLLM reads GLM-4.x MoE experts stored per_expert, not stacked"):
        recognise(config("glm4_moe")).expected_tensors(config("glm4_moe"), STACKED)


def test_target_copies_are_told_from_the_head():
    glm = config("glm4_moe")
    family = recognise(glm)
    for name in ("lm_head.weight", "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"):
        assert family.is_target_copy(name, glm)
    for name in family.expected_tensors(glm):
        assert family.is_head_tensor(name, glm) and not family.is_target_copy(name, glm)
    assert not family.is_head_tensor("model.layers.1.mlp.gate.weight", glm)


def test_differing_sizes_looks_into_the_text_config():
    ours, theirs = config("qwen3_5"), config("qwen3_5_text", hidden_size=128)
    assert recognise(ours).differing_sizes(ours, theirs) == [("hidden_size", 64, 128)]


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_vllm_loads_exactly_our_names_and_shapes(tmp_path, num_ranks):
    """vLLM's own head of every family takes the tensors, leaves no parameter unwritten, and holds the same elements.

    So do two tensor-parallel ranks together; an element changed on the last one is noticed.
    """
    families = list(CONFIGS)
    command = [sys.executable, "-m", "tests.support.vllm_heads", *families]
    world = {"WORLD_SIZE": str(num_ranks), "RENDEZVOUS": str(tmp_path / "rendezvous")}
    world["VLLM_DIST_IDENT"] = f"bebop_{os.getpid()}"  # else set by vLLM's executor
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_for_every_family() | world | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"{rank}.txt").open("w"),
            text=True,
        )
        for rank in range(num_ranks)
    ]
    for rank, process in enumerate(ranks):
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, (tmp_path / f"{rank}.txt").read_text()[-3000:]
        assert json.loads(printed.splitlines()[-1]) == {family: [[], True, False] for family in families}


def _expected(model_type, **changes):
    changed = config(model_type, **changes)
    return recognise(changed).expected_tensors(changed)
