"""Tells what the result files hold: ``docs/results.md``, ``headline.md`` and the figure. Measures nothing."""
