"""Configuration: schema, composition of groups, dotted overrides, preflight checks."""
