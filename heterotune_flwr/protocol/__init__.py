"""What travels: the messages and queries, their fields, and what the other side is known to hold already.

Reads everything as hostile and knows no torch, no strategy and no channel by name.
"""
