"""Tokenizers: loaded, trained, extended."""
