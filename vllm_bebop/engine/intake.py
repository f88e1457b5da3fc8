"""Where a user's request for bebop enters vLLM: the only function of vLLM that is patched.

Upstream symbol: `vllm.engine.arg_utils.EngineArgs.create_speculative_config`. It runs after general plugins are loaded,
before the model loads and before `VllmConfig(additional_config=...)` is built, so that our options can travel to every
worker in there (multiprocessing and Ray executors alike). A public hook for speculative methods would retire it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_bebop.config import BebopConfigError, Translation, translate, unheeded
from vllm_bebop.engine.lifeline import announce_server
from vllm_bebop.families import recognise
from vllm_bebop.head_checks import quantised_module

logger = logging.getLogger("vllm.bebop")  # below vLLM's root logger, so that its format and level apply

_WORKER_MODULE = "vllm_bebop.engine.worker"
# vLLM's shorthand for keys of the speculative config, as EngineArgs holds it.
_FLAGS = {"method": "spec_method", "model": "spec_model", "num_speculative_tokens": "spec_tokens"}


def install() -> None:
    """Wrap `create_speculative_config` once."""
    original = EngineArgs.create_speculative_config
    if hasattr(original, "_bebop_original"):
        return

    @functools.wraps(original)
    def create_speculative_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if "bebop" not in (self.additional_config or {}):  # a second call finds its own translation and keeps it
            given = _as_given(self)
            translation = translate(given, os.environ)
            if given is not None and translation is not None:
                _refuse_contradictions(self, given)
                _apply(self, translation, *_target_configs(*args, **kwargs))
            elif given is not None and (why := unheeded(given.get("method"), os.environ)):
                logger.warning("bebop: %s", why)
        config = original(self, *args, **kwargs)
        is_ours = config is not None and "bebop" in (self.additional_config or {})
        if is_ours and self.speculative_config.get("max_model_len") is None:
            _extend_draft(config.draft_model_config, _target_configs(*args, **kwargs)[0])
        return config

    create_speculative_config._bebop_original = original  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


def _as_given(args: EngineArgs) -> dict[str, Any] | None:
    """The speculative config, with vLLM's shorthand flags folded in; None without either."""
    flags = _flags(args)
    if args.speculative_config is None and not flags:
        return None
    return flags | {key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()}


def _flags(args: EngineArgs) -> dict[str, Any]:
    values = {key: getattr(args, flag, None) for key, flag in _FLAGS.items()}
    return {key: value for key, value in values.items() if value is not None}


def _refuse_contradictions(args: EngineArgs, given: dict[str, Any]) -> None:
    """Newer versions of vLLM would refuse them too; older ones let the flag win."""
    for key, value in _flags(args).items():
        if value != given[key]:
            option = f"--{_FLAGS[key].replace('_', '-')}"
            raise BebopConfigError(
                f"{option} {value} contradicts {key!r}: {given[key]!r} in the speculative config; give only one"
            )


def _target_configs(target_model_config: Any, target_parallel_config: Any) -> tuple[Any, Any]:
    return target_model_config, target_parallel_config


def _apply(args: EngineArgs, translation: Translation, model_config: Any, parallel_config: Any) -> None:
    from vllm_bebop.engine.versions import require_supported_vllm

    require_supported_vllm()
    if not isinstance(args.additional_config, dict):
        raise BebopConfigError("'additional_config' must be a dict (or unset): bebop's options travel in it")
    translation = _with_absolute_path(translation)
    if translation.draft is not None and _is_the_target(translation, model_config):
        translation = dataclasses.replace(translation, draft=None)
    _refuse_bitsandbytes(model_config)
    if translation.draft is None:
        _check_own_head(translation, model_config)
    else:
        _check_draft(translation, model_config, parallel_config, args.download_dir)
    # As the target is loaded, but for the format, and for options that only concern that.
    load_config = dataclasses.asdict(args.create_load_config())
    load_config |= {"load_format": "bebop", "model_loader_extra_config": {}}
    speculative_config = translation.speculative_config | {"draft_load_config": load_config}
    if translation.draft is not None:
        speculative_config |= {"model": translation.draft, "revision": translation.revision}
    else:  # of the target's own repository vLLM would read the default revision
        own = {"revision": model_config.revision, "code_revision": model_config.code_revision}
        speculative_config = own | speculative_config

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
        translation.draft or "the target's own checkpoint",
    )


def _extend_draft(draft: Any, target: Any) -> None:
    """Let the draft serve contexts as long as the target's.

    vLLM derives its length from its own config.json, which a dict of `hf_overrides` does not reach, and model runner V1
    stops drafting for the whole batch past it. Most heads are built after the target's config all the same.
    """
    if draft.max_model_len >= target.max_model_len:
        return
    family = recognise(draft.hf_config.to_dict())
    if family.built_after == "target":
        draft.max_model_len = target.max_model_len
        return
    logger.warning(
        "bebop: the draft's context ends at %d tokens, the target's at %d: vLLM builds a %s head after the head's own "
        "config.json, which --hf-overrides do not reach. Drafts past that length are useless or, on model runner V1, "
        "none; extend the context in config.json instead",
        draft.max_model_len,
        target.max_model_len,
        family.name,
    )


def _with_absolute_path(translation: Translation) -> Translation:
    """Workers may start in another directory. A Hub id stays as it is: other nodes have caches of their own."""
    path = Path(translation.draft or "").expanduser()
    if translation.draft is None or not path.exists():
        return translation
    return dataclasses.replace(translation, draft=str(path.absolute()))


def _is_the_target(translation: Translation, model_config: Any) -> bool:
    """Whether the draft named is the target itself: its path, or its Hub id."""
    draft, target = str(translation.draft), Path(model_config.model)
    if not _is_targets_revision(translation, model_config):
        return False
    in_hub_cache = f"models--{draft.replace('/', '--')}" in target.parts  # where vLLM looks for a Hub id when offline
    return in_hub_cache or Path(draft).resolve() == target.resolve()


def _is_targets_revision(translation: Translation, model_config: Any) -> bool:
    return translation.revision in (None, model_config.revision or "main")


def _refuse_bitsandbytes(model_config: Any) -> None:
    """Its weights are packed by a loader of its own, which takes no MTP head; one that it leaves alone is served."""
    if model_config.quantization != "bitsandbytes":
        return
    on_loading = {"quantization_config": {"quant_method": "bitsandbytes"}}
    config = on_loading | model_config.hf_config.to_dict()
    if (module := quantised_module(recognise(config), config, config)) is not None:
        raise BebopConfigError(
            f"bitsandbytes quantises the target, its MTP head included ({module}), and vLLM cannot load such a head: "
            "serve an unquantised target, or one whose quantization_config names the head in llm_int8_skip_modules"
        )


def _check_own_head(translation: Translation, model_config: Any) -> None:
    """Refuse a target without a usable head of its own before it loads."""
    from vllm_bebop import draft as drafts

    if not _is_targets_revision(translation, model_config):
        raise BebopConfigError(
            f"'revision': {translation.revision!r} without 'model' means the target's own head, and the target's "
            f"revision is {model_config.revision or 'main'!r}: name the draft by 'model', or drop the key"
        )
    drafts.refuse_misread_path(model_config.model)
    if getattr(model_config, "model_weights", ""):
        raise BebopConfigError(
            "the target's weights are streamed from object storage, where its own head cannot be read: give the head "
            "as a draft, a directory or a Hub repository named by 'model'"
        )
    if Path(model_config.model).is_dir():  # a Hub id may not be downloaded yet; then the loader checks
        drafts.inspect_checkpoint_head(model_config.model)


def _check_draft(translation: Translation, model_config: Any, parallel_config: Any, download_dir: str | None) -> None:
    """Refuse an unusable draft before any model loads."""
    from vllm_bebop import draft as drafts

    if parallel_config.pipeline_parallel_size > 1:
        raise BebopConfigError(
            f"'model': {translation.draft!r} cannot be served with pipeline parallelism, where vLLM gives a draft no "
            "embedding: serve without it, or stitch the draft into its target (`bebop merge`) and serve that"
        )
    target_config = model_config.hf_config.to_dict()
    assert translation.draft is not None
    path = drafts.resolve_draft(translation.draft, translation.revision, download_dir)
    draft = drafts.read_draft(path, target_config, target_dir=model_config.model)
    drafts.refuse_quantised_head(draft, target_config)
    for warning in draft.warnings:
        logger.warning("bebop: %s", warning)
