"""What travels with the weights: `save_pretrained` copies these files beside them, and they load without this package.

The folder is flat, because transformers copies the siblings of a class, and its files import only
installed packages and one another.
"""
