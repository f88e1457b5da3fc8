"""MTP heads in plain PyTorch: the maths that vLLM serves, differentiable, under the checkpoint's own tensor names.

A head turns (next token, hidden state) into the hidden state that predicts the token after:

    x = fc([norm_e(E[token]); norm_h(hidden)])        g = norm(decoder_layer(x))        draft logits = lm_head(g)

Embedding and lm_head are the target's. A head holds them as buffers: no optimizer sees them, no gradient reaches them.
How families differ in wiring and names stands in `vllm_bebop.families`; the modules are Transformers' own.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from vllm_bebop.families import STACKED, recognise

StepKeys = list[tuple[Tensor, Tensor]]  # (keys, values) of each step so far, [batch, kv_heads, rows, head_dim]


class _Modules(NamedTuple):
    norm: type[nn.Module]
    decoder_layer: type[nn.Module]
    rotary: type[nn.Module]


_MODULES = {  # by the model_type of the text config
    "qwen3_next": _Modules(
        qwen3_next.Qwen3NextRMSNorm, qwen3_next.Qwen3NextDecoderLayer, qwen3_next.Qwen3NextRotaryEmbedding
    ),
    "qwen3_5_text": _Modules(qwen3_5.Qwen3_5RMSNorm, qwen3_5.Qwen3_5DecoderLayer, qwen3_5.Qwen3_5TextRotaryEmbedding),
    "qwen3_5_moe_text": _Modules(
        qwen3_5_moe.Qwen3_5MoeRMSNorm, qwen3_5_moe.Qwen3_5MoeDecoderLayer, qwen3_5_moe.Qwen3_5MoeTextRotaryEmbedding
    ),
}


class MTPHead(nn.Module):
    """One native MTP layer, freshly initialised. `parameters()` are exactly what a checkpoint stores for the head.

    Args:
        config: the target model's; its `model_type` picks the family.
        embed_tokens, lm_head: the target's weights [vocab_size, hidden_size], shared, not copied. The head takes
            their dtype and device.
    Raises:
        ValueError: no such family, or more than one MTP layer.
    """

    embed_tokens: Tensor
    lm_head: Tensor

    def __init__(self, config: PretrainedConfig, embed_tokens: Tensor, lm_head: Tensor) -> None:
        super().__init__()
        config = copy.deepcopy(config.get_text_config())
        if config.model_type not in _MODULES:
            raise ValueError(f"no MTP head for model_type {config.model_type!r}; known: {', '.join(_MODULES)}")
        self.family = recognise(config.to_dict())
        if (num_layers := self.family.num_layers(config.to_dict())) != 1:
            raise ValueError(f"an MTP head has one layer here, this config asks for {num_layers}")
        (self.prefix,) = self.family.prefixes(config.to_dict())
        modules = _MODULES[config.model_type]
        # The MTP layer counts as layer 0 and attends fully, whatever the backbone's layer 0 does.
        config.layer_types = ["full_attention"] * len(config.layer_types)
        config._attn_implementation = _CHAIN_ATTENTION
        size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = modules.norm(size, eps=eps)
        self.pre_fc_norm_hidden = modules.norm(size, eps=eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([modules.decoder_layer(config, 0)])
        self.norm = modules.norm(size, eps=eps)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)
        self.to(embed_tokens)
        self.rotary = modules.rotary(config).to(embed_tokens.device)  # its frequencies stay fp32
        self.register_buffer("embed_tokens", embed_tokens.detach(), persistent=False)
        self.register_buffer("lm_head", lm_head.detach(), persistent=False)

    def forward(
        self, token_ids: Tensor, hidden_states: Tensor, positions: Tensor, keys: StepKeys
    ) -> tuple[Tensor, Tensor]:
        """One draft step for every row, each row an anchor with a chain of its own.

        Args:
            token_ids: [batch, rows] int64, the token after the one that `hidden_states` has read.
            hidden_states: [batch, rows, hidden_size]: the target's after its final norm, then the second result of
                the last step.
            positions: [batch, rows] int64, for the rotary embedding.
            keys: of the steps before, empty at step 0; this step's are appended.
        Returns:
            What the logits are computed from, and what the next step is fed; both [batch, rows, hidden_size].
        """
        embedding = F.embedding(token_ids, self.embed_tokens)
        if self.family.zero_embedding_at_0:
            embedding = embedding.masked_fill(positions[..., None] == 0, 0)
        normed = {"embedding": self.pre_fc_norm_embedding(embedding), "hidden": self.pre_fc_norm_hidden(hidden_states)}
        x = self.fc(torch.cat([normed[part] for part in self.family.concat], dim=-1))
        out = self.layers[0](x, position_embeddings=self.rotary(x, positions), keys=keys)
        normed_out = self.norm(out)
        return normed_out, normed_out if self.family.hidden_recycled == "post_norm" else out

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Draft logits [..., vocab_size] of `forward`'s first result [..., hidden_size]."""
        return F.linear(hidden_states, self.lm_head)


def head_tensors(head: MTPHead) -> dict[str, Tensor]:
    """The head's parameters under their checkpoint names: views, so that writing to them loads the head.

    Transformers stacks the experts of a layer; most checkpoints keep each expert's three matrices apart.
    """
    stacked = head.family.expert_layouts[:1] == (STACKED,)
    tensors: dict[str, Tensor] = {}
    for name, parameter in head.state_dict().items():
        experts, _, projection = name.rpartition(".")
        if stacked or not experts.endswith(".experts"):
            tensors[name] = parameter
            continue
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        for index, expert in enumerate(parameter):
            for part, tensor in zip(parts, expert.chunk(len(parts)), strict=True):
                tensors[f"{experts}.{index}.{part}.weight"] = tensor
    return {head.prefix + name: tensor for name, tensor in tensors.items()}


def new_head(model: PreTrainedModel) -> MTPHead:
    """An untrained head on the embedding and lm_head of `model`, in its dtype and on its device."""
    embed_tokens, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    return MTPHead(model.config, embed_tokens.get_parameter("weight"), lm_head.get_parameter("weight"))


def load_head(directory: str | Path, model: PreTrainedModel) -> MTPHead:
    """Read a head for `model` from a checkpoint or draft directory's safetensors, memory-mapped.

    Args:
        directory: holds *.safetensors with the head's tensors under their native names; others are left unread.
        model: the target; gives config, embedding, lm_head, dtype and device.
    Raises:
        ValueError: a tensor is missing, unknown, or of the wrong shape. vLLM itself loads a head that misses `mtp.fc`
            or an expert without a word.
    """
    head = new_head(model)
    wanted = head_tensors(head)
    copies = {head.prefix + name for name in head.family.copies}  # of the target's own tensors
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                if not name.startswith(head.prefix) or name in copies:
                    continue
                shape = tuple(file.get_slice(name).get_shape())
                tensor = wanted.pop(name, None)
                if tensor is None or tuple(tensor.shape) != shape:
                    raise ValueError(f"{path}: {name} of shape {shape} does not belong in this model's head")
                tensor.copy_(file.get_tensor(name))
    if wanted:
        raise ValueError(f"{directory} lacks {', '.join(sorted(wanted))}")
    return head


def _chain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    scaling: float,
    keys: StepKeys,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention as served: row t sees step 0's keys of rows s <= t, and of the later steps' only its own.

    query [batch, heads, rows, head_dim], key and value [batch, kv_heads, rows, head_dim]; the result is
    [batch, rows, heads, head_dim].
    Memory: after step 0 the scores are materialised, batch * heads * rows * (rows + steps).
    """
    keys.append((key, value))
    (shared_key, shared_value), *own = keys
    if not own:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    rows = query.shape[2]
    query = query.unflatten(1, (key.shape[1], -1)) * scaling  # [batch, kv_heads, group, rows, head_dim]
    future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    shared_scores = (query @ shared_key[:, :, None].mT).masked_fill(future, -torch.inf)
    own_scores = torch.stack([(query * k[:, :, None]).sum(-1) for k, _ in own], dim=-1)
    weights = torch.cat([shared_scores, own_scores], dim=-1).softmax(-1, dtype=torch.float32).to(value.dtype)
    out = weights[..., :rows] @ shared_value[:, :, None]
    for step, (_, v) in enumerate(own):
        out = out + weights[..., rows + step, None] * v[:, :, None]
    return out.flatten(1, 2).transpose(1, 2), None


_CHAIN_ATTENTION = "bebop_mtp_chain"
AttentionInterface.register(_CHAIN_ATTENTION, _chain_attention)
