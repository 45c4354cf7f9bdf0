"""Does the step change the adapter?"""
