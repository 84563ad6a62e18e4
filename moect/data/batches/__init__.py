"""Tokens to micro-batches: corpora, packing, mixture, order."""
