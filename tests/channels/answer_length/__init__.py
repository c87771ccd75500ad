"""How long clients' answers are: the smallest channel there can be. Nobody learns from it."""
