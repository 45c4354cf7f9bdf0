"""What is seen of the forwards and of their graphs."""
