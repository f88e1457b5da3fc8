"""Keeps a draft's head as it is when an RL stack pushes the target's weights.

verl and NeMo-RL push them into the drafter too, wherever its method reads "mtp". That is right for the target's own
head. A head trained apart would give way, without a word, to whatever `mtp.*` the target carries, and DeepSeek's module
refuses a push that has none. So the head of a draft takes weights only in a push that is meant for it, from vLLM's
`start_draft_weight_update` to `finish_weight_update`.

Upstream symbols: `Worker._weight_update_active`, and `load_weights` of the module that drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from vllm_bebop.engine.sleeping_head import draft_model

logger = logging.getLogger("vllm.bebop")


def guard(worker: Any) -> None:
    """Called once the draft is loaded; does nothing where the target's own head drafts."""
    draft = draft_model(worker)
    config = worker.vllm_config.speculative_config.draft_model_config
    if draft is None or config.model == worker.model_config.model:
        return
    load: Any = draft.load_weights
    has_warned = False

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        nonlocal has_warned
        if worker.head_is_pushed and worker._weight_update_active:  # a push that failed is over
            return load(weights)
        for _ in weights:  # some are received as they are read
            pass
        if not has_warned:
            logger.warning(
                "bebop: the target's weights were pushed to the drafter, whose head comes from %s and stays as it is; "
                "push another head by vLLM's start_draft_weight_update",
                config.model,
            )
        has_warned = True
        return set()

    draft.load_weights = load_weights  # type: ignore[assignment]
