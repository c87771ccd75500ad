"""Control variates against client drift: the server's goes down, every client corrects its gradients by it."""
