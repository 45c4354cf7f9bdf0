"""Does the adapter cover what was meant?"""
