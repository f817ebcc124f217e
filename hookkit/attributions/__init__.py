"""Effects estimated from gradients: attribution patching, edges, input tokens."""
