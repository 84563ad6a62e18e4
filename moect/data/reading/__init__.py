"""Text: files and datasets, their documents, and what they are."""
