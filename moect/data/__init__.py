"""From corpora to micro-batches: sources → tokens (store) → packing → mixture → loader."""
