"""Starting a run on several nodes, and starting it again when one of them is lost."""
