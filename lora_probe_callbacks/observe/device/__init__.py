"""What is read from the tensors around a step, in one transfer."""
