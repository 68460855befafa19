"""The model code that `save_pretrained` copies beside the weights, so that they load without this package.

transformers copies the siblings of a class by their file names. Therefore the folder is flat, and its files import only
installed packages and one another.
"""
