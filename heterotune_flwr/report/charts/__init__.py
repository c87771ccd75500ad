"""Charts of a run: what they show as plain data, drawn as inline SVG for a page or by matplotlib for a paper.

Pure functions of their data. Nothing here knows a run, a file or a strategy.
"""
