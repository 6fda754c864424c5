"""The BERT-shaped frame: config fields, embeddings, layers, base model and task heads. It knows no mechanism.

Nothing is imported here: a config must be importable without loading any model code.
"""
