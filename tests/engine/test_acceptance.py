"""Train/serve parity in one number: what the engine accepts is what the head's maths predicts on the same contexts."""

import json

import numpy as np
import pytest

from tests.support.engines import BEBOP, ROOT, accepted_per_position, engine

NUM_PROMPTS, MAX_TOKENS, TEMPERATURE = 48, 96, 1.0
