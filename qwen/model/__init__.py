"""Model code that `save_pretrained` copies next to the weights, so that checkpoints load without this package.

transformers copies sibling files by name, without folders. The folder is therefore flat, and its files import only
installed packages and one another.
"""
