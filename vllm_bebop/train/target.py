"""The frozen target, from its checkpoint to the devices: never with a weight that the checkpoint does not hold."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from vllm_bebop.tensor_files import CheckpointError

_UNREAD = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]  # only safetensors are


class MiMoConfig(Qwen2Config):
    """Transformers knows no MiMo. Without its head it is a Qwen2; the released remote code says the same."""

    model_type = "mimo"


class MiMoForCausalLM(Qwen2ForCausalLM):
    config_class = MiMoConfig
    _keys_to_ignore_on_load_unexpected = [r"^model\.mtp_layers\."]


AutoConfig.register("mimo", MiMoConfig, exist_ok=True)
AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM, exist_ok=True)


def find_checkpoint(model: str | Path, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The target's directory: `model` itself, or the Hub repository of that name, downloaded.

    Args:
        revision: of the repository; None: its default.
        download_dir: the Hub cache to use; None: the usual one.
    Raises:
        CheckpointError: neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        found = snapshot_download(str(model), revision=revision, cache_dir=download_dir, ignore_patterns=_UNREAD)
        return Path(found)
    except Exception as error:  # not found, gated, offline, malformed: the Hub's own message says which
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        problem = f"neither an existing directory nor a Hub repository that can be fetched ({reason})"
        raise CheckpointError(problem, path=model) from error


def load_target(model: str | Path, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The target, without gradients.

    Weights that are stored as they are computed with stay mapped from their files until they go to a GPU.

    Args:
        model: a directory.
        dtype: None is the checkpoint's own, or fp32 without a GPU.
    Raises:
        CheckpointError: a weight is missing, or of another shape: Transformers would go on with random numbers.
    """
    auto: Any = AutoModelForCausalLM  # typed as if it never returned a report
    loaded, report = auto.from_pretrained(
        model,
        dtype=dtype or ("auto" if torch.cuda.is_available() else torch.float32),
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, which is refused here
    )
    wrong = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        problem = f"lacks the target's {', '.join(wrong[:5])}{more}, or has them in another shape: export it again"
        raise CheckpointError(problem, path=model)
    if hasattr(loaded, "ct_decompress_hook"):  # compressed-tensors would wait for the whole model to be called
        loaded.hf_quantizer.compressor.decompress_model(loaded)
    torch.nn.Module.to(loaded, device)
    return loaded.requires_grad_(False).eval()


def empty_target(model: str | Path) -> PreTrainedModel:
    """The same without weights, on the meta device: for a process that `Processes.hand_out` gives them to."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
