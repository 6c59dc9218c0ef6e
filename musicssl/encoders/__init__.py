"""Networks: audio in, embeddings of every layer out."""
