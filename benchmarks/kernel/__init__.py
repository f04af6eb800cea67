"""What kernel_vs_ref.py alone needs: the implementations it times, the PyTorch they are compared with, and its tables."""
