"""Block-causal attention for scoring and teacher forcing."""
