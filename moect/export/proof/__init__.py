"""The proof of an export: what was written is loaded as its users will, and held against the model that was trained."""
