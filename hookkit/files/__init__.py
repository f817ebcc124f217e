"""Files: written whole, read with care, tensors as safetensors."""
