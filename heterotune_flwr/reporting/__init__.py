"""What a person sees of a run: live progress, how it stands, and the tables at its end.

Reads the journal and the results alone; it changes nothing and knows no channel by name.
"""
