"""What files on disk hold."""
