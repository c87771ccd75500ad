"""Class statistics in the shared latents: pooled into a classifier in closed form on the server."""
