"""What a person sees of a run: live progress and the tables at its end."""
