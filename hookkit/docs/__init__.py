"""The guide as Markdown pages, and the builder of the documentation: `make docs`."""
