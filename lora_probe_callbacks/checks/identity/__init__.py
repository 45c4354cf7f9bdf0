"""Is it one object that the forward uses and the optimizer owns?"""
