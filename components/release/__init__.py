"""Bundle, registry and activation."""
