"""Does the file hold what was trained?"""
