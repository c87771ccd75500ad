"""The warm worker: one process per client machine and state directory that keeps its backbones loaded.

Flower starts a new ClientApp process for every message of a deployment. With the worker that
process is a thin one without torch: it hands the message over a local socket and waits. What a message means is not
known here: a worker runs the handlers of :mod:`..client`, whoever calls them.

    door.py      what the ClientApp calls: this process, or the worker?
    link.py      the client's side of the socket: hand a message over, survive a worker's death
    start.py     connect to the worker of a state directory, start it where there is none
    server.py    the worker: socket, queue, heartbeats, end
    jobs.py      one message: the handlers of client/handlers.py, the device's lock, counters
    frames.py    what travels over the socket
    places.py    where the socket and the locks lie, and who may use them
"""
