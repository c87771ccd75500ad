"""Label probabilities on public texts: averaged on the server, fitted by the clients."""
