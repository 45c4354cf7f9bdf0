"""Put back, bit by bit, what the probe itself has changed."""
