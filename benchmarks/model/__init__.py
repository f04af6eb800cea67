"""What model_latency.py alone needs: the models it times, their gate, and its tables."""
