"""From corpora to micro-batches: reading → vocabulary → tokens → batches; inspection beside them."""
