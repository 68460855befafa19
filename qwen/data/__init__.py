"""From files of conversations to batches of token ids and labels."""
