"""``heterotune new``: looks at a user's own file, proposes a run for it, writes that down. No training lives here."""
