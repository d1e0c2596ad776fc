"""Embeddings of samples for components: from the model in training or from an encoder."""
