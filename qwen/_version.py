"""The version of this package, in its own file so that it can be read without importing the package."""

__version__ = "0.2.0"
