"""The engine for Ray at its former path, until the public names change."""
