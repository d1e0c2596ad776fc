"""Embeddings of samples for components: of the model in training, or of an encoder."""
