"""Reads files of conversations and makes batches of token ids and labels from them."""
