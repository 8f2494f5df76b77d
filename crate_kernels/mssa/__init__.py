"""MSSA, the compressing step of a white-box layer: projection, shared-QKV attention, projection."""
