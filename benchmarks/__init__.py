"""Numbers, and the commands that make them: science, speed, reliability, deployment; :mod:`.report` tells them all."""
