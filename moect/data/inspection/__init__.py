"""What is wrong with text: duplicates, held-out text, other languages."""
