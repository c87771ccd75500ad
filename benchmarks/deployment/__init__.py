"""A deployment on this machine: SuperLink, proxy and nodes over TLS, some of which die."""
