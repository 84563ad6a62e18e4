"""What was measured, for people: tables, plots, pages, TensorBoard, runs side by side."""
