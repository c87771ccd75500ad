"""Makes the latent spaces of different models one: public texts, factors, GCCA, frozen maps, views of a text.

Nothing of a client's data, no training and no adapter: what is here depends on public texts and frozen weights alone.
"""
