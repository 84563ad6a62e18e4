"""Text to tokens: stores, made once, and what they are like."""
