"""A client's kept model as a folder that others load, and what measures, chats with or converts such a folder.

No Flower and no server here: everything is read from files of this machine.
"""
