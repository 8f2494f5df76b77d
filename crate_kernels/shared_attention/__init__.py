"""Shared-QKV attention: softmax(scale * w w^T) w, where query, key and value are one tensor."""
