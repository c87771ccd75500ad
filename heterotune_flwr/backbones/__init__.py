"""Which pre-trained models, from where, at which bits; import its modules directly."""
