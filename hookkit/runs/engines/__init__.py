"""Where forwards run: in this process, or on Ray actors."""
