"""MTP heads in plain torch: maths, rollout, losses, training. Never imports vLLM."""
