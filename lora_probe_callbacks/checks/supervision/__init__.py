"""Is the loss made of the tokens that were meant?"""
