"""Tasks of lm-eval on the live model: which, on what data, and what came out."""
