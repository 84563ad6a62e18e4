"""`moect bench`: what the parts that are ours cost, beside their rivals and beside what the machine could do."""
