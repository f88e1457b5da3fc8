"""Everything that touches vLLM internals, one file per seam."""
