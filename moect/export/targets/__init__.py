"""Architectures that a trained model can be written as, one file each. form.py says what a target is, choice.py which
there are."""
