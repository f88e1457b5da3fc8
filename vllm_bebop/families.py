"""The supported MTP head families: how to recognise one, what it computes, and which tensors make it complete.

One table, `FAMILIES`. Names and shapes are those of the released checkpoints, as vLLM's loaders read them
(model_executor/models/{qwen3_next_mtp,qwen3_5_mtp,deepseek_mtp,glm4_moe_mtp,mimo_mtp}.py and their decoder layers).
Only the standard library: usable wherever a config.json can be read.

A head never owns its embedding or lm_head: the engine gives it the target's, whatever the file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_bebop.errors import UserError

Config = Mapping[str, Any]  # a parsed config.json
Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

# How the routed experts of a mixture lie in the file. E experts, H hidden, I intermediate.
PER_EXPERT = "per_expert"  # mlp.experts.{e}.{gate,up}_proj.weight [I, H], .down_proj.weight [H, I]
STACKED = "stacked"  # mlp.experts.gate_up_proj [E, 2 I, H] (gate first), mlp.experts.down_proj [E, H, I]

_COMMON_SIZES = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_TARGET_COPIES = ("lm_head.weight", "model.embed_tokens.weight", "model.language_model.embed_tokens.weight")


class FamilyError(UserError):
    """A config.json that describes no supported MTP head. The message names the key."""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Recognition:
        model_types, architectures: values of config.json, or the architecture that vLLM puts there when it turns a
            target's config into its head's; one match suffices.
        layer_count_key: the key that says how many MTP layers there are.
        layer_count_default: what vLLM assumes where that key is absent.
    Numerics, which training must copy or acceptance falls in silence:
        hidden_in: the target hidden state fed in, before ("pre_norm") or after ("post_norm") the final norm.
        concat: what the input projection sees first: ("embedding", "hidden") or ("hidden", "embedding").
        zero_embedding_at_0: the embedding at position 0 is replaced by zeros.
        hidden_recycled: what the next draft step is fed, before or after the head's own last norm.
        built_after: whose config.json vLLM builds the layers after, the "target"'s or the "draft"'s (a target's own
            head is its draft too, but --hf-overrides do not reach it there).
        norm_adds_one: RMSNorm multiplies by (1 + weight) instead of weight.
    Tensors:
        prefix: of the native names; {index} is the MTP layer's number, {depth} continues the backbone's count.
        tensors: (config, prefixes, number of MTP layers, expert layout) -> every name and shape.
        copies: names under a prefix that duplicate the target's embedding or lm_head: allowed, never used.
        expert_layouts: layouts that vLLM's loader reads, the released checkpoints' own first; () without experts.
        sizes: config keys that fix the shapes, beyond the common ones.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    layer_count_key: str
    layer_count_default: int
    hidden_in: str
    concat: tuple[str, str]
    zero_embedding_at_0: bool
    hidden_recycled: str
    built_after: str
    norm_adds_one: bool
    prefix: str
    tensors: Callable[[Config, tuple[str, ...], int, str], Named]
    copies: tuple[str, ...]
    expert_layouts: tuple[str, ...]
    sizes: tuple[str, ...]

    def num_layers(self, config: Config) -> int:
        """MTP layers according to `config`; 0 means that the model has no head."""
        for level in (config, text_config(config)):  # multimodal configs carry the key at either level
            if level.get(self.layer_count_key) is not None:
                return int(level[self.layer_count_key])
        return self.layer_count_default

    def prefixes(self, config: Config) -> tuple[str, ...]:
        """Prefixes of the head's tensor names: one per MTP layer, or a single one for the Qwen families.

        A model exported without its head says 0 layers; the names of one layer are still the head's.
        """
        depth = _size(text_config(config), "num_hidden_layers")
        layers = range(max(1, self.num_layers(config)))
        return tuple(dict.fromkeys(self.prefix.format(index=i, depth=depth + i) for i in layers))

    def expected_tensors(self, config: Config, expert_layout: str | None = None) -> dict[str, Shape]:
        """Every tensor of a complete head, by native name, with its shape. Empty if the config says 0 MTP layers.

        Args:
            config: parsed config.json, multimodal or text only.
            expert_layout: PER_EXPERT or STACKED; None is the released checkpoints' own.
        Raises:
            FamilyError: a size is missing from the config, or vLLM does not read this layout for this family.
        """
        if expert_layout is None or not self.expert_layouts:
            expert_layout = (self.expert_layouts or (PER_EXPERT,))[0]
        elif expert_layout not in self.expert_layouts:
            accepted = " or ".join(self.expert_layouts)
            raise FamilyError(f"vLLM reads {self.name} experts stored {accepted}, not {expert_layout}")
        count = self.num_layers(config)
        if count == 0:
            return {}
        return dict(self.tensors(text_config(config), self.prefixes(config), count, expert_layout))

    def is_head_tensor(self, name: str, config: Config) -> bool:
        """True for any tensor under the head's prefixes, copies of the target's tensors included."""
        return name.startswith(self.prefixes(config))

    def is_target_copy(self, name: str, config: Config) -> bool:
        """True for a copy of the target's embedding or lm_head: allowed in a draft, never used."""
        return name in _TARGET_COPIES or name in {p + c for p in self.prefixes(config) for c in self.copies}

    def differing_sizes(self, config: Config, target_config: Config) -> list[tuple[str, Any, Any]]:
        """(key, value, target's value) for each size on which two configs of this family disagree."""
        ours, theirs = text_config(config), text_config(target_config)
        keys = [key for key in _COMMON_SIZES + self.sizes if key in ours and key in theirs]
        return [(key, ours[key], theirs[key]) for key in keys if ours[key] != theirs[key]]


def text_config(config: Config) -> Config:
    """The language model's part of a config.json: `text_config` of a multimodal model, else the config itself."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def recognise(config: Config) -> Family:
    """The family of a parsed config.json.

    Raises:
        FamilyError: model_type and architectures match no supported family.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or ()
    # DeepSeek-V3.2 and GLM-5 add an indexer (index_topk) to the same layer: another head, not supported.
    if "index_topk" not in text_config(config):
        for family in FAMILIES:
            if model_type in family.model_types or any(a in family.architectures for a in architectures):
                return family
    supported = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise FamilyError(
        f"config.json: model_type {model_type!r} with architectures {list(architectures)} has no MTP head that "
        f"is supported; supported model types: {supported}"
    )


def _size(config: Config, key: str) -> int:
    if config.get(key) is None:
        raise FamilyError(f"config.json has no {key!r}, which fixes the shapes of the head: add it")
    return int(config[key])


def _attention(prefix: str, config: Config, head_dim: int, query_parts: int, bias: bool, qk_norm: bool) -> Named:
    """Grouped-query attention. query_parts is 2 where q_proj also yields the output gate."""
    hidden = _size(config, "hidden_size")
    query, key = (head_dim * _size(config, f"num_{kind}_heads") for kind in ("attention", "key_value"))
    for projection, rows in (("q_proj", query * query_parts), ("k_proj", key), ("v_proj", key)):
        yield f"{prefix}{projection}.weight", (rows, hidden)
        if bias:
            yield f"{prefix}{projection}.bias", (rows,)
    yield f"{prefix}o_proj.weight", (hidden, query)
    if qk_norm:
        yield f"{prefix}q_norm.weight", (head_dim,)
        yield f"{prefix}k_norm.weight", (head_dim,)


def _latent_attention(prefix: str, config: Config) -> Named:
    """DeepSeek's multi-head latent attention (MLA)."""
    hidden, heads, kv_rank = (_size(config, k) for k in ("hidden_size", "num_attention_heads", "kv_lora_rank"))
    nope, rope, value = (_size(config, k) for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query = heads * (nope + rope)
    if config.get("q_lora_rank") is None:
        yield f"{prefix}q_proj.weight", (query, hidden)
    else:
        query_rank = _size(config, "q_lora_rank")
        yield f"{prefix}q_a_proj.weight", (query_rank, hidden)
        yield f"{prefix}q_a_layernorm.weight", (query_rank,)
        yield f"{prefix}q_b_proj.weight", (query, query_rank)
    yield f"{prefix}kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden)
    yield f"{prefix}kv_a_layernorm.weight", (kv_rank,)
    yield f"{prefix}kv_b_proj.weight", (heads * (nope + value), kv_rank)
    yield f"{prefix}o_proj.weight", (hidden, heads * value)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Named:
    yield f"{prefix}gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}up_proj.weight", (intermediate, hidden)
    yield f"{prefix}down_proj.weight", (hidden, intermediate)


def _dense_mlp(prefix: str, config: Config) -> Named:
    return _mlp(prefix, _size(config, "hidden_size"), _size(config, "intermediate_size"))


def _experts(prefix: str, config: Config, num_experts: int, layout: str) -> Named:
    """The router and the routed experts."""
    hidden, intermediate = _size(config, "hidden_size"), _size(config, "moe_intermediate_size")
    yield f"{prefix}gate.weight", (num_experts, hidden)
    if layout == STACKED:
        yield f"{prefix}experts.gate_up_proj", (num_experts, 2 * intermediate, hidden)
        yield f"{prefix}experts.down_proj", (num_experts, hidden, intermediate)
    else:
        for expert in range(num_experts):
            yield from _mlp(f"{prefix}experts.{expert}.", hidden, intermediate)


def _layer_norms(prefix: str, hidden: int) -> Named:
    yield f"{prefix}input_layernorm.weight", (hidden,)
    yield f"{prefix}post_attention_layernorm.weight", (hidden,)


def _qwen(config: Config, prefixes: tuple[str, ...], count: int, layout: str) -> Named:
    """fc([norm(embedding); norm(hidden)]), then `count` gated-attention layers, then one norm."""
    hidden = _size(config, "hidden_size")
    (mtp,) = prefixes
    yield f"{mtp}fc.weight", (hidden, 2 * hidden)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield f"{mtp}{norm}.weight", (hidden,)
    for i in range(count):
        layer = f"{mtp}layers.{i}."
        yield from _layer_norms(layer, hidden)
        yield from _attention(
            f"{layer}self_attn.",
            config,
            head_dim=int(config.get("head_dim") or 256),  # 256 is the default of Transformers' Qwen configs
            query_parts=1 + bool(config.get("attn_output_gate", True)),
            bias=bool(config.get("qkv_bias", False)),
            qk_norm=True,
        )
        if not _is_qwen_moe_layer(config, i):
            yield from _dense_mlp(f"{layer}mlp.", config)
            continue
        yield from _experts(f"{layer}mlp.", config, _size(config, "num_experts"), layout)
        yield f"{layer}mlp.shared_expert_gate.weight", (1, hidden)
        if shared := _size(config, "shared_expert_intermediate_size"):
            yield from _mlp(f"{layer}mlp.shared_expert.", hidden, shared)


def _is_qwen_moe_layer(config: Config, index: int) -> bool:
    """vLLM asks of the MTP layer, by its own index, what Qwen3-Next asks of a backbone layer."""
    if not config.get("num_experts"):
        return False
    sparse_step = int(config.get("decoder_sparse_step") or 1)
    return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % sparse_step == 0


def _deepseek_style(config: Config, prefixes: tuple[str, ...], layout: str, attention: Callable, bias: bool) -> Named:
    """eh_proj([enorm(embedding); hnorm(hidden)]), then a decoder layer, then shared_head.norm."""
    hidden, depth = _size(config, "hidden_size"), _size(config, "num_hidden_layers")
    for number, prefix in enumerate(prefixes):
        yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        yield from _layer_norms(prefix, hidden)
        yield from attention(f"{prefix}self_attn.", config)
        num_experts = config.get("n_routed_experts")
        dense = depth + number < int(config.get("first_k_dense_replace") or 0)
        if num_experts is None or dense or (depth + number) % int(config.get("moe_layer_freq") or 1):
            yield from _dense_mlp(f"{prefix}mlp.", config)
            continue
        yield from _experts(f"{prefix}mlp.", config, num_experts, layout)
        if bias:
            yield f"{prefix}mlp.gate.e_score_correction_bias", (num_experts,)
        if config.get("n_shared_experts"):
            shared = _size(config, "moe_intermediate_size") * _size(config, "n_shared_experts")
            yield from _mlp(f"{prefix}mlp.shared_experts.", hidden, shared)


def _deepseek(config: Config, prefixes: tuple[str, ...], count: int, layout: str) -> Named:
    bias = config.get("topk_method") == "noaux_tc"
    return _deepseek_style(config, prefixes, layout, _latent_attention, bias)


def _glm(config: Config, prefixes: tuple[str, ...], count: int, layout: str) -> Named:
    def attention(prefix: str, config: Config) -> Named:
        head_dim = config.get("head_dim") or _size(config, "hidden_size") // _size(config, "num_attention_heads")
        bias, qk_norm = (bool(config.get(key, False)) for key in ("attention_bias", "use_qk_norm"))
        return _attention(prefix, config, int(head_dim), query_parts=1, bias=bias, qk_norm=qk_norm)

    return _deepseek_style(config, prefixes, layout, attention, bias=True)


def _mimo(config: Config, prefixes: tuple[str, ...], count: int, layout: str) -> Named:
    """input_proj([norm(hidden); norm(embedding)]), then a Qwen2 layer, then final_layernorm."""
    hidden = _size(config, "hidden_size")
    head_dim = hidden // _size(config, "num_attention_heads")  # vLLM's Qwen2 attention reads no head_dim key
    for prefix in prefixes:
        yield f"{prefix}input_proj.weight", (hidden, 2 * hidden)
        for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        yield from _layer_norms(prefix, hidden)
        yield from _attention(f"{prefix}self_attn.", config, head_dim, query_parts=1, bias=True, qk_norm=False)
        yield from _dense_mlp(f"{prefix}mlp.", config)


def _qwen_family(
    name: str, types: tuple[str, ...], architectures: tuple[str, ...], count_key: str, **row: Any
) -> Family:
    """What the three Qwen rows share."""
    return Family(
        name,
        types,
        architectures,
        count_key,
        layer_count_default=1,
        hidden_in="post_norm",
        concat=("embedding", "hidden"),
        zero_embedding_at_0=False,
        hidden_recycled="post_norm",
        built_after="target",
        norm_adds_one=True,
        prefix="mtp.",
        tensors=_qwen,
        copies=("embed_tokens.weight",),
        **row,
    )


_QWEN_MOE_SIZES = ("head_dim", "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size")
_DEEPSEEK_COPIES = ("embed_tokens.weight", "shared_head.head.weight")
_DEEPSEEK_MOE_SIZES = ("n_routed_experts", "n_shared_experts", "moe_intermediate_size", "first_k_dense_replace")
_MLA_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

FAMILIES = (
    _qwen_family(
        "Qwen3-Next",
        ("qwen3_next",),
        ("Qwen3NextForCausalLM", "Qwen3NextMTP"),
        "num_nextn_predict_layers",
        expert_layouts=(PER_EXPERT, STACKED),
        sizes=_QWEN_MOE_SIZES,
    ),
    _qwen_family(
        "Qwen3.5 dense",  # Qwen3.6 too
        ("qwen3_5", "qwen3_5_text"),
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", "Qwen3_5MTP"),
        "mtp_num_hidden_layers",
        expert_layouts=(),
        sizes=("head_dim", "intermediate_size"),
    ),
    _qwen_family(
        "Qwen3.5 MoE",  # Qwen3.6 too
        ("qwen3_5_moe", "qwen3_5_moe_text"),
        ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeMTP"),
        "mtp_num_hidden_layers",
        expert_layouts=(STACKED, PER_EXPERT),
        sizes=_QWEN_MOE_SIZES,
    ),
    Family(
        "DeepSeek-V3",
        ("deepseek_v3",),
        ("DeepseekV3ForCausalLM", "DeepSeekMTPModel"),
        "num_nextn_predict_layers",
        layer_count_default=1,  # Transformers' DeepseekV3Config and Glm4MoeConfig fill it in
        hidden_in="post_norm",
        concat=("embedding", "hidden"),
        zero_embedding_at_0=True,
        hidden_recycled="post_norm",
        built_after="draft",
        norm_adds_one=False,
        prefix="model.layers.{depth}.",
        tensors=_deepseek,
        copies=_DEEPSEEK_COPIES,
        expert_layouts=(PER_EXPERT,),
        sizes=_DEEPSEEK_MOE_SIZES + _MLA_SIZES,
    ),
    Family(
        "GLM-4.x MoE",
        ("glm4_moe",),
        ("Glm4MoeForCausalLM", "Glm4MoeMTPModel"),
        "num_nextn_predict_layers",
        layer_count_default=1,
        hidden_in="post_norm",
        concat=("embedding", "hidden"),
        zero_embedding_at_0=True,
        hidden_recycled="pre_norm",
        built_after="target",
        norm_adds_one=False,
        prefix="model.layers.{depth}.",
        tensors=_glm,
        copies=_DEEPSEEK_COPIES,
        expert_layouts=(PER_EXPERT,),
        sizes=_DEEPSEEK_MOE_SIZES + ("head_dim", "attention_bias", "use_qk_norm"),
    ),
    Family(
        "MiMo",
        ("mimo",),
        ("MiMoForCausalLM", "MiMoMTPModel"),
        "num_nextn_predict_layers",
        layer_count_default=0,
        hidden_in="pre_norm",  # step 0 only: later steps are fed the recycled, normed hidden state
        concat=("hidden", "embedding"),
        zero_embedding_at_0=True,
        hidden_recycled="post_norm",
        built_after="target",
        norm_adds_one=False,
        prefix="model.mtp_layers.{index}.",
        tensors=_mimo,
        copies=(),
        expert_layouts=(),
        sizes=("intermediate_size",),
    ),
)
