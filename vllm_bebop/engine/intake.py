"""Where a user's request for bebop enters vLLM: the only function of vLLM that is patched.

Upstream symbol: `vllm.engine.arg_utils.EngineArgs.create_speculative_config`. It runs after general plugins are loaded,
before the model loads and before `VllmConfig(additional_config=...)` is built, so that our options can travel to every
worker in there (multiprocessing and Ray executors alike). A public hook for speculative methods would retire it.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_bebop.config import BebopConfigError, Translation, translate
from vllm_bebop.engine.lifeline import announce_server

logger = logging.getLogger("vllm.bebop")  # below vLLM's root logger, so that its format and level apply

_WORKER_MODULE = "vllm_bebop.engine.worker"


def install() -> None:
    """Wrap `create_speculative_config` once."""
    original = EngineArgs.create_speculative_config
    if hasattr(original, "_bebop_original"):
        return

    @functools.wraps(original)
    def create_speculative_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if "bebop" not in (self.additional_config or {}):  # a second call finds its own translation and keeps it
            translation = translate(_as_given(self), os.environ)
            if translation is not None:
                _apply(self, translation, *_target_configs(*args, **kwargs))
        return original(self, *args, **kwargs)

    create_speculative_config._bebop_original = original  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


def _as_given(args: EngineArgs) -> dict[str, Any] | None:
    """The speculative config, with vLLM's shorthand flags (--spec-tokens, --spec-model) folded in."""
    if args.speculative_config is None:
        return None
    given = dict(args.speculative_config)
    for key, value in (("model", args.spec_model), ("num_speculative_tokens", args.spec_tokens)):
        if value is not None and key not in given:
            given[key] = value
    return given


def _target_configs(target_model_config: Any, target_parallel_config: Any) -> tuple[Any, Any]:
    return target_model_config, target_parallel_config


def _apply(args: EngineArgs, translation: Translation, model_config: Any, parallel_config: Any) -> None:
    from vllm_bebop.engine.versions import require_supported_vllm

    require_supported_vllm()
    if not isinstance(args.additional_config, dict):
        raise BebopConfigError("'additional_config' must be a dict (or unset): bebop's options travel in it")
    draft_dir = _check_draft(translation, model_config)
    speculative_config = translation.speculative_config | {
        "draft_load_config": {"load_format": "bebop", "download_dir": args.download_dir},
    }
    if draft_dir is not None:
        speculative_config["model"] = str(draft_dir)

    worker_cls = parallel_config.worker_cls
    # A framework's own worker is composed with: our module builds a subclass of the class named in the brackets.
    parallel_config.worker_cls = f"{_WORKER_MODULE}.Worker" + (
        "" if worker_cls == "auto" else f"[{worker_cls.replace('.', '/')}]"
    )
    args.worker_cls = parallel_config.worker_cls
    announce_server()
    args.additional_config = args.additional_config | {"bebop": translation.config.to_dict()}
    args.speculative_config = speculative_config
    args.spec_method = args.spec_model = args.spec_tokens = None
    logger.info(
        "bebop: %d speculative tokens, %s acceptance, draft head from %s",
        speculative_config["num_speculative_tokens"],
        translation.config.acceptance,
        draft_dir or "the target's own checkpoint",
    )


def _check_draft(translation: Translation, model_config: Any) -> Path | None:
    """Refuse an unusable head before any model loads; returns the draft's directory, None for the target's own head."""
    from vllm_bebop import draft as drafts

    target_config = model_config.hf_config.to_dict()
    if translation.draft is None:
        target_dir = Path(model_config.model)
        if target_dir.is_dir():  # a Hub id may not be downloaded yet; then the loader checks
            drafts.inspect_checkpoint_head(target_dir)
        return None
    path = drafts.resolve_draft(translation.draft, translation.revision)
    drafts.refuse_misread_path(path)
    draft = drafts.read_draft(path, target_config, target_dir=model_config.model)
    for warning in draft.warnings:
        logger.warning("bebop: %s", warning)
    return path
