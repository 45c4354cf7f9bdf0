"""Does the gradient arrive?"""
