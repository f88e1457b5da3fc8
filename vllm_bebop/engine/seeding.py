"""Seeds for requests that bring none."""

from typing import Any

import numpy as np


def seed_source(runner: Any) -> np.random.Generator:
    """Draws the same seeds on ranks that sample the same requests (tensor parallel), others on data-parallel ranks.

    Otherwise two replicas would answer the same prompt with the same text.
    """
    return np.random.default_rng((runner.model_config.seed, runner.parallel_config.data_parallel_index))
