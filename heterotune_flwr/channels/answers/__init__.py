"""Answers in words to public texts: drawn on the server, fitted token by token by the clients."""
