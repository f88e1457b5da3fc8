"""MTP heads in plain PyTorch: the maths that vLLM serves, differentiable, under the checkpoint's own tensor names.

A head turns (next token, hidden state) into the hidden state that predicts the token after:

    x = project([norm_e(E[token]); norm_h(hidden)])     g = norm(decoder_layer(x))     draft logits = lm_head(g)

Embedding and lm_head are the target's. A head holds them as buffers: no optimizer sees them, no gradient reaches them.
How families differ in wiring and tensors stands in `vllm_bebop.families`; the modules are Transformers' own.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from vllm_bebop.families import PER_EXPERT, STACKED, FamilyError, recognise
from vllm_bebop.head_checks import CACHE_SCALES, is_quantised
from vllm_bebop.tensor_files import CheckpointError, TensorEntry, list_tensors, read_tensors
from vllm_bebop.train.chain_attention import CHAIN_ATTENTION, Packing, StepKeys


class _Names(NamedTuple):
    """The checkpoint's names of a head's modules, after the family's prefix."""

    norm_embedding: str
    norm_hidden: str
    project: str
    layer: str
    norm: str


class _Modules(NamedTuple):
    names: _Names
    norm: type[nn.Module]
    layer: type[nn.Module]
    rotary: type[nn.Module]
    required: Mapping[str, str] = {}  # what the config must say for Transformers' modules to compute what vLLM serves


_QWEN = _Names("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "layers.0", "norm")
_DEEPSEEK = _Names("enorm", "hnorm", "eh_proj", "", "shared_head.norm")
_MIMO = _Names("token_layernorm", "hidden_layernorm", "input_proj", "", "final_layernorm")

_MODULES = {  # by the model_type of the text config
    "qwen3_next": _Modules(
        _QWEN, qwen3_next.Qwen3NextRMSNorm, qwen3_next.Qwen3NextDecoderLayer, qwen3_next.Qwen3NextRotaryEmbedding
    ),
    "qwen3_5_text": _Modules(
        _QWEN, qwen3_5.Qwen3_5RMSNorm, qwen3_5.Qwen3_5DecoderLayer, qwen3_5.Qwen3_5TextRotaryEmbedding
    ),
    "qwen3_5_moe_text": _Modules(
        _QWEN,
        qwen3_5_moe.Qwen3_5MoeRMSNorm,
        qwen3_5_moe.Qwen3_5MoeDecoderLayer,
        qwen3_5_moe.Qwen3_5MoeTextRotaryEmbedding,
    ),
    "deepseek_v3": _Modules(
        _DEEPSEEK,
        deepseek_v3.DeepseekV3RMSNorm,
        deepseek_v3.DeepseekV3DecoderLayer,
        deepseek_v3.DeepseekV3RotaryEmbedding,
        required={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},  # without them vLLM routes by softmax
    ),
    "glm4_moe": _Modules(
        _DEEPSEEK, glm4_moe.Glm4MoeRMSNorm, glm4_moe.Glm4MoeDecoderLayer, glm4_moe.Glm4MoeRotaryEmbedding
    ),
    "mimo": _Modules(_MIMO, qwen2.Qwen2RMSNorm, qwen2.Qwen2DecoderLayer, qwen2.Qwen2RotaryEmbedding),
}


_UNQUANTISED = (torch.float32, torch.bfloat16, torch.float16)


class MTPHead(nn.Module):
    """One native MTP layer, freshly initialised.

    `parameters()` are what a checkpoint stores for the head, less the router's score-correction bias, which only
    chooses experts and gets no gradient: a buffer, part of `head_tensors`, always fp32.

    Args:
        config: the target model's; its `model_type` picks the family.
        embed_tokens, lm_head: the target's weights [vocab_size, hidden_size], shared, not copied, on the device where
            the head is to be.
        dtype: of the parameters and of all that the head computes; None is the embedding's.
    Raises:
        FamilyError: no such family, more than one MTP layer, or experts that vLLM would route in another way.
    """

    embed_tokens: Tensor
    lm_head: Tensor

    def __init__(
        self, config: PretrainedConfig, embed_tokens: Tensor, lm_head: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        config = copy.deepcopy(config.get_text_config())
        if config.model_type not in _MODULES:
            raise FamilyError(f"no MTP head for model_type {config.model_type!r}; known: {', '.join(_MODULES)}")
        modules = _MODULES[config.model_type]
        for key, value in modules.required.items():
            if (found := getattr(config, key, None)) != value:
                raise FamilyError(f"config.json: {key} is {found!r}, only {value!r} can be trained: set it if it is so")
        described = config.to_dict()
        self.family = recognise(described)
        if (num_layers := self.family.num_layers(described)) > 1:
            raise FamilyError(f"a head of one MTP layer can be trained, this config asks for {num_layers}")
        (self.prefix,) = self.family.prefixes(described)
        self.names = modules.names
        # The MTP layer attends fully, whatever the backbone's layers do. By its number it has experts or has not: it
        # continues the backbone's count where its name does, else it is layer 0.
        index = config.num_hidden_layers if "{depth}" in self.family.prefix else 0
        config.layer_types = ["full_attention"] * (config.num_hidden_layers + 1)
        config._attn_implementation = CHAIN_ATTENTION
        size, eps = config.hidden_size, config.rms_norm_eps
        with embed_tokens.device:
            self.norm_embedding = modules.norm(size, eps=eps)
            self.norm_hidden = modules.norm(size, eps=eps)
            self.project = nn.Linear(2 * size, size, bias=False)
            self.layer = modules.layer(config, index)
            self.norm = modules.norm(size, eps=eps)
            self.rotary = modules.rotary(config)  # its frequencies stay fp32
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            parameter.data = parameter.data.to(dtype or embed_tokens.dtype)
        self.register_buffer("embed_tokens", embed_tokens.detach(), persistent=False)
        self.register_buffer("lm_head", lm_head.detach(), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of what `forward` returns."""
        return self.project.weight.dtype

    def forward(
        self,
        token_ids: Tensor,
        hidden_states: Tensor,
        positions: Tensor,
        keys: StepKeys,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One draft step for every row, each row an anchor with a chain of its own.

        Args:
            token_ids: [batch, rows] int64, the token after the one that `hidden_states` has read.
            hidden_states: [batch, rows, hidden_size]: at step 0 the target's, before or after its final norm as
                `family.hidden_in` says (`rollout.target_hidden_states`); then the second result of the last step.
            positions: [batch, rows] int64, for the rotary embedding.
            keys: of the steps before, empty at step 0; this step's are appended.
            packing: where documents begin; None: every batch entry is one.
        Returns:
            What the logits are computed from, and what the next step is fed; both [batch, rows, hidden_size].
        """
        embedding = F.embedding(token_ids, self.embed_tokens).to(self.dtype)
        if self.family.zero_embedding_at_0:
            embedding = embedding.masked_fill(positions[..., None] == 0, 0)
        hidden_states = hidden_states.to(self.dtype)
        normed = {"embedding": self.norm_embedding(embedding), "hidden": self.norm_hidden(hidden_states)}
        x = self.project(torch.cat([normed[part] for part in self.family.concat], dim=-1))
        out = self.layer(x, position_embeddings=self.rotary(x, positions), attention_mask=packing, keys=keys)
        normed_out = self.norm(out)
        return normed_out, normed_out if self.family.hidden_recycled == "post_norm" else out

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Draft logits [..., vocab_size], in lm_head's dtype, of `forward`'s first result [..., hidden_size]."""
        return F.linear(hidden_states.to(self.lm_head.dtype), self.lm_head)


def head_tensors(head: MTPHead, expert_layout: str | None = None) -> dict[str, Tensor]:
    """The head's tensors under their checkpoint names: views, so that writing to them loads the head.

    Args:
        expert_layout: Transformers stacks the experts of a layer, most checkpoints keep each expert's three matrices
            apart (`families.STACKED`, `families.PER_EXPERT`). None is the way of the family's released checkpoints.
    """
    stacked = (expert_layout or next(iter(head.family.expert_layouts), None)) == STACKED
    tensors: dict[str, Tensor] = {}
    for name, tensor in head.state_dict().items():
        module, _, rest = name.partition(".")
        name = ".".join(part for part in (getattr(head.names, module), rest) if part)
        experts, _, projection = name.rpartition(".")
        if stacked or not experts.endswith(".experts"):
            tensors[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        for index, expert in enumerate(tensor):
            for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
                tensors[f"{experts}.{index}.{part}.weight"] = matrix
    return {head.prefix + name: tensor for name, tensor in tensors.items()}


def new_head(model: PreTrainedModel, dtype: torch.dtype | None = None) -> MTPHead:
    """An untrained head on the embedding and lm_head of `model`, on its device; `dtype` None is the embedding's.

    Raises:
        FamilyError: see `MTPHead`.
        ValueError: these weights are spread over processes (FSDP), of which a head cannot compute.
    """
    embed_tokens, lm_head = (
        module.get_parameter("weight") for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if isinstance(embed_tokens, DTensor) or isinstance(lm_head, DTensor):
        raise ValueError("the model's embedding or lm_head is sharded (DTensor): leave both out of fully_shard")
    return MTPHead(model.config, embed_tokens, lm_head, dtype)


def load_head(directory: str | Path, model: PreTrainedModel, dtype: torch.dtype | None = None) -> MTPHead:
    """Read a head for `model` from a checkpoint or draft directory's safetensors, memory-mapped.

    Args:
        directory: holds *.safetensors with the head's tensors under their native names; others are left unread.
        model: the target; gives config, embedding, lm_head and device.
        dtype: of the head; None is the embedding's.
    Raises:
        CheckpointError: a file is unreadable, or a tensor quantised, missing, unknown, or of the wrong shape. vLLM
            itself loads a head that misses `mtp.fc` or an expert without a word.
    """
    head = new_head(model, dtype)
    _fill(head, directory, _stored_head(Path(directory), head))
    return head


def initial_head(directory: str | Path, model: PreTrainedModel, dtype: torch.dtype | None = None) -> MTPHead:
    """Where training starts: the checkpoint's own head, or one made of the target's last full-attention layer.

    A head made so passes its hidden state through: `project` is zero on the embedding and on the hidden state undoes
    the weight of the target's final norm (where the head is fed from behind it), the layer is a copy of the target's,
    the last norm a copy of its final norm, so that a layer that adds nothing would give back what came in. The norms
    before `project` are the identity.

    Args:
        directory: of the target's checkpoint.
    Raises:
        CheckpointError: as `load_head`, if the checkpoint has tensors of a head; the target's last layer is quantised.
    """
    head = new_head(model, dtype)
    if stored := _stored_head(Path(directory), head):
        _fill(head, directory, stored)
        return head
    decoder = model.get_decoder()
    donor = [layer for layer in decoder.layers if hasattr(layer, "self_attn")][-1].state_dict()
    if any(tensor.dtype not in _UNQUANTISED for tensor in donor.values()):
        problem = (
            "has no head, and its last layer, of which one could be made, is quantised: give a draft to start from, or "
            "the checkpoint before quantisation"
        )
        raise CheckpointError(problem, path=directory)
    final_norm = decoder.norm.weight
    with torch.no_grad():
        for name, tensor in head.layer.state_dict().items():
            if name in donor and donor[name].shape == tensor.shape:
                tensor.copy_(donor[name])
        head.norm.get_parameter("weight").copy_(final_norm)
        head.project.weight.zero_()
        hidden = head.project.weight.chunk(2, dim=-1)[head.family.concat.index("hidden")]
        hidden.copy_(torch.diag(_undo_final_norm(head, final_norm)))
    return head


def _undo_final_norm(head: MTPHead, weight: Tensor) -> Tensor:
    """What to multiply the normed hidden state by, [hidden_size]; ones if the head is fed the hidden state unnormed."""
    scale = weight.float() + head.family.norm_adds_one
    if head.family.hidden_in == "pre_norm":
        return torch.ones_like(scale)
    return scale / (scale.square() + 1e-4 * scale.square().mean())  # 1 / scale, bounded where it is next to nothing


def _stored_head(directory: Path, head: MTPHead) -> dict[str, TensorEntry]:
    """The head's tensors in a directory, less copies of the target's own and scales of the KV cache."""
    entries, problems = list_tensors(directory, allow_links=True)
    if problems:
        raise CheckpointError(*problems, path=directory)
    copies = {head.prefix + name for name in head.family.copies}
    names = {name for name in entries if name.startswith(head.prefix) and not name.endswith(CACHE_SCALES)} - copies
    return {name: entry for name, entry in entries.items() if name in names}


def _fill(head: MTPHead, directory: str | Path, stored: Mapping[str, TensorEntry]) -> None:
    if is_quantised(stored):
        raise CheckpointError("the head is quantised: convert it to bf16, fp16 or fp32", path=directory)
    stacked = any(name.endswith(".experts.gate_up_proj") for name in stored)
    wanted = head_tensors(head, STACKED if stacked else PER_EXPERT)
    for name, tensor in read_tensors(stored):
        place = wanted.pop(name, None)
        if place is None or place.shape != tensor.shape:
            shape = tuple(tensor.shape)
            problem = f"{name} of shape {shape} does not belong in this model's head"
            raise CheckpointError(problem, path=stored[name].file)
        place.copy_(tensor)
    if wanted:
        raise CheckpointError(f"lacks {', '.join(sorted(wanted))}", path=directory)
