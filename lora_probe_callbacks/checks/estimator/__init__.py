"""Does the variance estimator see the adapter?"""
