"""The recipe of the bundled checkpoint: data, vocabulary, training, evaluation. See checkpoints/README.md."""
