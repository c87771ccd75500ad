"""What came of a run, for people: one structure of facts read from its directory, and what is made of it.

No Flower, no torch; a run is read, never changed. What is not in the files is absent (None, empty), never zero.
"""
