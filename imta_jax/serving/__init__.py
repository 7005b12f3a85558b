"""Parts of the HTTP server, imta_jax.serve."""
