"""What crosses model types besides the bank: one folder a channel, each with a server half, a client half and a record.

Nobody outside knows a channel by name; halves are found by the names in a message, among what is installed here.
"""
