"""Is the adapter active in the forward that makes the loss?"""
