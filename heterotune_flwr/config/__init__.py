"""From YAML to the settings of :mod:`..schema`: groups, presets, dotted overrides, choices and their refusals.

Reads settings, and does nothing else: whether a run can work is asked in :mod:`..preflight`.
"""
