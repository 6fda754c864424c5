"""EffReformer: Reformer (Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451)."""
