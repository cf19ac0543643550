"""jaxformers."""
